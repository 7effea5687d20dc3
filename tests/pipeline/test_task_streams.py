"""Batches of tasks: functions of the step, epochs, disjoint streams, the config."""

import numpy as np
import pytest

from effarch import config, config_check
from effarch.data import batches, tasks
from effarch.data.tasks import rows, streams

pytestmark = pytest.mark.smoke


def section(name="mqar", **fields):
    """config.data.task for a small task."""
    c = config.default()
    c.data.task.name = name
    if name == "mqar":
        c.data.task.mqar.update(vocab_size=64, num_pairs=(2, 4))
    c.data.task.update(fields)
    return c.data.task


def training(batch_size=8, seed=3, **fields):
    data = streams.open_task(section(**fields), seq_len=16)
    return streams.TrainBatches(data, batch_size=batch_size, seed=seed)


def test_a_batch_follows_from_seed_and_step():
    first, again, other = training(), training(), training(seed=4)
    for step in (5, 0, 5):
        for name, x in first(step).items():
            np.testing.assert_array_equal(x, again(step)[name])
    assert not np.array_equal(first(5)["inputs"], other(5)["inputs"])
    assert not np.array_equal(first(5)["inputs"], first(6)["inputs"])
    assert {x.dtype.name for name, x in first(0).items()} == {"int32", "float32"}
    assert all(x.shape == (8, 16) for x in first(0).values())


def test_hosts_load_their_rows_of_the_same_batch():
    whole = training()(2)
    parts = [training().rows(2, start, start + 2) for start in (0, 2, 4, 6)]
    for name, x in whole.items():
        np.testing.assert_array_equal(x, np.concatenate([part[name] for part in parts]))


def test_a_fixed_number_of_examples_comes_back_every_epoch_in_another_order():
    drawn = training(num_examples=12)
    rows = np.concatenate([drawn(step)["inputs"] for step in range(3)])  # 24 rows: two epochs
    first, second = ({row.tobytes() for row in part} for part in (rows[:12], rows[12:]))
    assert first == second
    assert len(first) == 12
    assert not np.array_equal(rows[:12], rows[12:])
    ids = [entry for step in range(3) for entry in drawn.window_ids(step)]
    assert sorted(place for _, place, epoch in ids if epoch == 1) == list(range(12))
    by_id = {place: rows[i] for i, (_, place, epoch) in enumerate(ids) if epoch == 0}
    for (_, place, _), row in zip(ids, rows):
        np.testing.assert_array_equal(by_id[place], row)


def test_no_scored_example_is_trained_on():
    data = streams.open_task(section(num_validation=200), seq_len=16)
    seen = {row.tobytes() for row in data.validation.inputs}
    assert len(seen) == 200
    for seed in (0, 1):
        drawn = streams.TrainBatches(data, batch_size=64, seed=seed)
        for step in range(10):
            assert not seen & {row.tobytes() for row in drawn(step)["inputs"]}


def test_validation_takes_every_example_once_and_fills_up_with_nothing():
    data = streams.open_task(section(num_validation=21), seq_len=16)
    windows = streams.ValidationBatches(data, batch_size=8)
    assert len(windows) == 3
    rows = np.concatenate([windows[i]["inputs"] for i in range(3)])
    np.testing.assert_array_equal(rows[:21], data.validation.inputs)
    assert windows[2]["loss_weights"][5:].sum() == windows[2]["segment_ids"][5:].sum() == 0
    source, tokens = windows.scored(1)
    np.testing.assert_array_equal(source, data.validation.groups[8:16])
    np.testing.assert_array_equal(tokens, np.array([2, 4])[source])
    np.testing.assert_array_equal(windows.rows(1, 2, 5)["inputs"], rows[10:13])
    assert len(streams.ValidationBatches(data, batch_size=8, max_batches=2)) == 2
    with pytest.raises(IndexError):
        windows.scored(3)


def test_positions_count_in_each_segment():
    segment_ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    np.testing.assert_array_equal(streams._positions(segment_ids), [[0, 1, 2, 0, 1, 0, 0, 0]])


def test_the_fingerprint_of_a_run_counts_its_task_alone():
    base = config.default()
    unused = config.default()
    unused.data.task.mqar.power = 1.0
    assert config.fingerprint(unused) == config.fingerprint(base)
    base.data.task.name = unused.data.task.name = "mqar"
    assert config.differences(base, unused) == [("data.task.mqar.power", 0.01, 1.0)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task.name": "mqr"}, "data.task.name='mqr' is not known. Known: .* Did you mean 'mqar'?"),
        ({"task.num_validation": 0}, "data.task.num_validation=0 must be above 0"),
    ],
)
def test_mistakes_in_the_section_are_one_sentence(change, words):
    c = config.default()
    c.data.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=words):
        config_check.finish(c)


def test_an_unknown_option_names_the_nearest():
    c = config.default()
    with c.unlocked():
        c.data.task.mqar.num_pair = 3
    with pytest.raises(ValueError, match=r"data\.task\.mqar\.num_pair .* mean 'num_pairs'"):
        config_check.finish(c)


@pytest.mark.parametrize("name", tasks.KINDS)
def test_every_task_opens_by_its_defaults(name):
    c = config.default()
    c.data.task.name, c.data.seq_len, c.data.task.num_validation = name, 512, 4
    data = batches.open_source(c.data)
    batch = batches.validation(data, c.data)[0]
    assert batch["inputs"].shape == (16, 512)
    assert batch["inputs"].min() >= 0 and batch["inputs"].max() < data.vocab_size
    assert batch["loss_weights"].sum() > 0
    assert data.num_words == data.vocab_size


class Echo:
    """A newcomer's task: the word due is the word itself."""

    groups = ()

    def __init__(self, seq_len: int, *, vocab_size: int = 5, delay: int | None = None):
        self.seq_len, self.vocab_size, self.delay = seq_len, vocab_size, delay or 0

    def draw(self, rng, count):
        words = rng.integers(self.vocab_size, size=(count, self.seq_len))
        answers = np.arange(self.seq_len) >= np.full((count, 1), self.delay)
        return rows.Rows(words, np.roll(words, self.delay, axis=1), answers)


def test_a_task_is_one_class_and_one_line_of_the_registry(monkeypatch):
    monkeypatch.setitem(tasks.KINDS, "echo", Echo)
    c = config.default()
    c.data.task.name = "echo"
    c.data.task.echo.delay = 2
    checked = config_check.finish(c, num_devices=1)
    data = batches.open_source(checked.data)
    assert (data.vocab_size, data.sources) == (5, ("echo",))
    batch = batches.training(data, checked.data, seed=0)(0)
    np.testing.assert_array_equal(batch["targets"][:, 2:], batch["inputs"][:, :-2])
    assert batch["loss_weights"].sum() == 16 * 254
    c.data.task.echo.delay = 3
    assert config.fingerprint(c) != config.fingerprint(checked)
