import collections
import itertools
import logging

import numpy as np
import pytest

from effarch.data import pipeline, tokenizers

WEIGHTS = (0.5, 0.3, 0.2)


def expected_row(stream, begin, seq_len, document_token):
    """One full window, token by token."""
    row = collections.defaultdict(list)
    segment = position = 0
    for place in range(seq_len):
        token = int(stream[begin + place])
        if place == 0 or token == document_token:
            segment, position = segment + 1, 0
        row["inputs"].append(token)
        row["targets"].append(int(stream[begin + place + 1]))
        row["segment_ids"].append(segment)
        row["positions"].append(position)
        row["loss_weights"].append(1.0)
        position += 1
    return row


def test_hand_made_documents(prepare_texts):
    data = prepare_texts(["abc", "de", "f"])
    stream = [256, 97, 98, 99, 256, 100, 101, 256, 102, 256]
    assert data.tokens("only", "train").tolist() == stream
    train = pipeline.TrainBatches(data, batch_size=2, seq_len=4, seed=0)
    batch = train(0)
    order = [window for _, window, _ in train.window_ids(0)]
    assert sorted(order) == [0, 1]  # the tenth token is only a target
    rows = {window: {k: v[i].tolist() for k, v in batch.items()} for i, window in enumerate(order)}
    assert rows[0] == {
        "inputs": [256, 97, 98, 99],
        "targets": [97, 98, 99, 256],
        "segment_ids": [1, 1, 1, 1],
        "positions": [0, 1, 2, 3],
        "loss_weights": [1, 1, 1, 1],
    }
    assert rows[1] == {
        "inputs": [256, 100, 101, 256],
        "targets": [100, 101, 256, 102],
        "segment_ids": [1, 1, 1, 2],
        "positions": [0, 1, 2, 0],
        "loss_weights": [1, 1, 1, 1],
    }
    # A window that begins inside a document begins segment 1 there.
    train = pipeline.TrainBatches(data, batch_size=1, seq_len=3, seed=0)
    rows = {train.window_ids(step)[0][1]: train(step) for step in range(3)}
    assert rows[1]["inputs"].tolist() == [[99, 256, 100]]
    assert rows[1]["segment_ids"].tolist() == [[1, 2, 2]]
    assert rows[1]["positions"].tolist() == [[0, 0, 1]]


def test_batches_are_the_windows_that_window_ids_names(mixed):
    train = pipeline.TrainBatches(mixed, batch_size=8, seq_len=24, seed=3, weights=WEIGHTS)
    for step in (0, 5, 1000):
        batch = train(step)
        for row, (source, window, _) in enumerate(train.window_ids(step)):
            stream = mixed.tokens(source, "train")
            expected = expected_row(stream, window * 24, 24, mixed.document_token)
            for name, values in expected.items():
                assert batch[name][row].tolist() == values
    assert {name: array.dtype.name for name, array in batch.items()} == {
        **dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), "int32"),
        "loss_weights": "float32",
    }


def test_segments_agree_with_the_offsets_on_disk(mixed):
    train = pipeline.TrainBatches(mixed, batch_size=16, seq_len=40, seed=1)
    batch = train(2)
    for row, (source, window, _) in enumerate(train.window_ids(2)):
        places = window * 40 + np.arange(40)
        offsets = mixed.offsets(source, "train")
        document = np.searchsorted(offsets, places, side="right") - 1
        assert (batch["segment_ids"][row] == document - document[0] + 1).all()
        begin = np.maximum(offsets[document], places[0])
        assert (batch["positions"][row] == places - begin).all()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_draw_the_batch_of_one(mixed, hosts):
    whole = pipeline.TrainBatches(mixed, batch_size=8, seq_len=16, seed=5, weights=WEIGHTS)
    parts = [
        pipeline.TrainBatches(mixed, batch_size=8, seq_len=16, seed=5, weights=WEIGHTS)
        for _ in range(hosts)
    ]
    share = 8 // hosts
    for step in range(200):
        rows = [part.rows(step, h * share, (h + 1) * share) for h, part in enumerate(parts)]
        for name, array in whole(step).items():
            assert np.concatenate([row[name] for row in rows]).tobytes() == array.tobytes()


def test_a_step_does_not_depend_on_the_steps_before(mixed):
    def make(seed):
        return pipeline.TrainBatches(mixed, batch_size=4, seq_len=16, seed=seed, weights=WEIGHTS)

    straight = make(0)
    batches = [straight(step) for step in range(12)]
    resumed = make(0)
    for step in (7, 11, 3):
        for name, array in resumed(step).items():
            assert array.tobytes() == batches[step][name].tobytes()
    assert make(1)(0)["inputs"].tobytes() != batches[0]["inputs"].tobytes()


def test_every_epoch_is_another_permutation(mixed):
    train = pipeline.TrainBatches(mixed, batch_size=1, seq_len=16, seed=0, weights=(0, 0, 1))
    count = train.windows["three"]
    drawn = [train.window_ids(step)[0] for step in range(3 * count)]
    assert {source for source, _, _ in drawn} == {"three"}
    epochs = [[w for _, w, epoch in drawn if epoch == e] for e in range(3)]
    for windows in epochs:
        assert sorted(windows) == list(range((mixed.count("three", "train") - 1) // 16))
    assert len({tuple(windows) for windows in epochs}) == 3
    assert [epoch for _, _, epoch in drawn] == sorted(epoch for _, _, epoch in drawn)


def test_mixture_follows_the_weights(mixed):
    train = pipeline.TrainBatches(mixed, batch_size=10, seq_len=16, seed=0, weights=WEIGHTS)
    counts = collections.Counter()
    for step in range(40):
        counts.update(source for source, _, _ in train.window_ids(step))
        for source, weight in zip(mixed.sources, WEIGHTS):
            assert abs(counts[source] - weight * 10 * (step + 1)) <= 1
    epochs = train.epochs(40)
    assert epochs == {name: counts[name] / train.windows[name] for name in mixed.sources}


def test_no_weights_means_by_token_count(mixed):
    train = pipeline.TrainBatches(mixed, batch_size=50, seq_len=8, seed=0)
    counts = collections.Counter(s for step in range(8) for s, _, _ in train.window_ids(step))
    tokens = {source: mixed.count(source, "train") for source in mixed.sources}
    for source in mixed.sources:
        assert abs(counts[source] - 400 * tokens[source] / sum(tokens.values())) <= 1.01


def test_the_fifth_epoch_warns_once(mixed, caplog):
    train = pipeline.TrainBatches(mixed, batch_size=1, seq_len=16, seed=0, weights=(0, 0, 1))
    count = train.windows["three"]
    with caplog.at_level(logging.WARNING, logger="absl"):
        train(4 * count - 1)
        assert not caplog.records
        train(4 * count)
        train(4 * count + 1)
    [record] = caplog.records
    assert "'three' has been read 4 times by step" in record.getMessage()
    assert train.epochs(4 * count) == {"one": 0, "two": 0, "three": 4}


def test_wrong_arguments(mixed):
    def make(**changes):
        arguments = {"batch_size": 2, "seq_len": 8, "seed": 0, **changes}
        return pipeline.TrainBatches(mixed, **arguments)

    with pytest.raises(ValueError, match=r"weights \(0.5, 0.5\) has 2 entries for 3 source"):
        make(weights=(0.5, 0.5))
    for weights in ((1, -1, 1), (0, 0, 0), (1, float("nan"), 1)):
        with pytest.raises(ValueError, match="must be finite, not negative and not all zero"):
            make(weights=weights)
    with pytest.raises(ValueError, match="seq_len 100000 is longer than the training text of"):
        make(seq_len=100_000)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match=r"rows \[1, 3\) do not lie in a batch of 2"):
        make().rows(0, 1, 3)
    short = mixed.count("three", "train")  # shorter than the others: weight 0 leaves it out
    assert make(seq_len=short, weights=(1, 1, 0))(0)["inputs"].shape == (2, short)


def collect(validation):
    """{source: [(inputs, targets) of every scored place]} in order."""
    found = collections.defaultdict(list)
    for index in range(len(validation)):
        batch = validation[index]
        for row in range(len(batch["source"])):
            kept = batch["loss_weights"][row] == 1
            pairs = zip(batch["inputs"][row][kept].tolist(), batch["targets"][row][kept].tolist())
            found[validation.sources[batch["source"][row]]] += list(pairs)
    return found


def test_validation_scores_every_token_once(mixed):
    validation = pipeline.ValidationBatches(mixed, batch_size=8, seq_len=24)
    found = collect(validation)
    for source in mixed.sources:
        stream = mixed.tokens(source, "val").tolist()
        assert found[source] == list(itertools.pairwise(stream))
    assert [len(batch["source"]) for batch in validation] == [8] * len(validation)


def test_the_tail_is_padding(prepare_texts):
    data = prepare_texts(["abcdefg", *map(str, range(200))], val_permille=500)
    data.meta["sources"]["only"]["val"]["tokens"] = 7  # a stream of 7 tokens: 6 targets
    stream = np.asarray([256, 97, 98, 256, 99, 100, 256])
    data.tokens = lambda source, split: stream
    validation = pipeline.ValidationBatches(data, batch_size=3, seq_len=4)
    assert len(validation) == 1
    batch = {name: array.tolist() for name, array in validation[0].items()}
    assert batch == {
        "inputs": [[256, 97, 98, 256], [99, 100, 256, 256], [256] * 4],
        "targets": [[97, 98, 256, 99], [100, 256, 256, 256], [256] * 4],
        "segment_ids": [[1, 1, 1, 2], [1, 1, 0, 0], [0] * 4],
        "positions": [[0, 1, 2, 0], [0, 1, 0, 0], [0] * 4],
        "loss_weights": [[1, 1, 1, 1], [1, 1, 0, 0], [0] * 4],
        "source": [0, 0, 0],
    }
    with pytest.raises(IndexError):
        validation[1]


def test_bytes_of_is_the_length_of_the_text(mixed, prepare_texts):
    validation = pipeline.ValidationBatches(mixed, batch_size=8, seq_len=24)
    for number, source in enumerate(mixed.sources):
        texts = [mixed.tokenizer.decode(ids) for ids in mixed.documents(source, "val")]
        assert any(not text.isascii() for text in texts)
        assert validation.bytes_of(source) == sum(len(text.encode()) for text in texts)
        assert validation.bytes_of(number) == validation.bytes_of(source)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_bytes_of_a_cut_set_is_the_length_of_the_scored_text(prepare_texts, tokenizer):
    texts = [f"{i} größe 日本 😀 naïve" * (1 + i % 4) for i in range(60)]
    data = prepare_texts(texts, tokenizer, val_permille=500)
    validation = pipeline.ValidationBatches(data, batch_size=2, seq_len=16, max_batches=5)
    assert len(validation) == 5
    scored = collect(validation)["only"]
    assert len(scored) == 160 < data.count("only", "val") - 1
    raw = data.tokenizer.decode_bytes([target for _, target in scored])
    assert validation.bytes_of("only") == len(raw) > 0


def test_a_cut_set_is_spread_evenly(mixed):
    whole = pipeline.ValidationBatches(mixed, batch_size=2, seq_len=8)
    total = sum(-(-(mixed.count(source, "val") - 1) // 8) for source in mixed.sources)
    assert len(whole) == -(-total // 2)
    cut = pipeline.ValidationBatches(mixed, batch_size=2, seq_len=8, max_batches=10)
    rows = [row.tobytes() for batch in whole for row in batch["inputs"]]
    kept = [row.tobytes() for batch in cut for row in batch["inputs"]]
    assert kept == [rows[i * total // 20] for i in range(20)]
    more = pipeline.ValidationBatches(mixed, batch_size=2, seq_len=8, max_batches=10**6)
    assert len(more) == len(whole)


def test_validation_of_some_sources(mixed):
    validation = pipeline.ValidationBatches(mixed, batch_size=4, seq_len=16, sources=["three"])
    assert validation.sources == ("three",)
    stream = mixed.tokens("three", "val")
    assert len(collect(validation)["three"]) == len(stream) - 1
    with pytest.raises(ValueError, match=r"'thre' is not in the prepared folder.*mean 'three'"):
        pipeline.ValidationBatches(mixed, batch_size=4, seq_len=16, sources=["thre"])


def test_no_validation_text(prepare_texts):
    data = prepare_texts(["abc", "def"], val_permille=0)
    with pytest.raises(ValueError, match=r"hold no validation text \(val_permille 0\)"):
        pipeline.ValidationBatches(data, batch_size=4, seq_len=16)


def test_bytes_of_a_tokenizer_that_is_not_byte_level(prepare_texts):
    """The table may be off by a factor; the whole stream's known bytes set it right."""
    texts = [f"{i} größe" for i in range(80)]
    data = prepare_texts(texts, val_permille=500)

    class Doubled(tokenizers.ByteTokenizer):
        is_exact = False

        def __init__(self):
            super().__init__()
            self.is_exact = False
            self.token_bytes = tuple(piece * 2 for piece in self.token_bytes)

    exact = pipeline.ValidationBatches(data, batch_size=2, seq_len=8, max_batches=6)
    data.tokenizer = Doubled()
    near = pipeline.ValidationBatches(data, batch_size=2, seq_len=8, max_batches=6)
    assert near.bytes_of("only") == exact.bytes_of("only")
