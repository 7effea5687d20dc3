"""Every generator against the rule it should follow, found again by plain loops."""

import itertools
import re

import numpy as np
import pytest

from effarch.data import tasks
from effarch.data.tasks import needles, rows, state_tracking

pytestmark = pytest.mark.smoke


def draw(name, seq_len, count=40, *, seed=0, scored=False, **options):
    task = tasks.KINDS[name](seq_len, **options)
    function = task.draw_scored if scored else task.draw
    found = function(np.random.default_rng(seed), count)
    assert found.inputs.shape == found.targets.shape == found.answers.shape == (count, seq_len)
    assert found.inputs.min() >= 0
    assert found.inputs.max() < task.vocab_size
    assert task.vocab_size > np.where(found.answers, found.targets, 0).max()
    return task, found


def scored(found, row):
    """[(place, word due)] of a row."""
    return [(int(t), int(found.targets[row, t])) for t in np.flatnonzero(found.answers[row])]


@pytest.mark.parametrize("random_fill", [True, False])
def test_mqar_asks_for_the_value_that_followed_the_key(random_fill):
    options = dict(vocab_size=128, num_pairs=(4, 8), random_fill=random_fill)
    task, found = draw("mqar", 64, 100, **options)
    assert task.groups == ("4_pairs", "8_pairs")
    for row, words in enumerate(found.inputs):
        num = (4, 8)[found.groups[row]]
        keys, values = words[0 : 2 * num : 2], words[1 : 2 * num : 2]
        assert len(set(keys)) == len(set(values)) == num
        assert keys.min() >= 1 and keys.max() < 64 <= values.min()
        value_of = dict(zip(keys, values))
        due = scored(found, row)
        assert sorted(words[t] for t, _ in due) == sorted(keys)  # each key is asked for once
        for t, word in due:
            assert t >= 2 * num and t % 2 == 0
            assert word == value_of[words[t]]
        others = set(range(2 * num, 64)) - {t for t, _ in due}
        assert random_fill or not words[list(others)].any()
    assert 30 < (found.groups == 0).sum() < 70


def test_mqar_queries_follow_the_power_law():
    """The slot of the first key has exactly p(g) ~ g^(a-1)."""
    _, found = draw("mqar", 40, 20_000, vocab_size=64, num_pairs=(1,), power=0.01)
    slots = (np.argmax(found.answers, axis=1) - 2) // 2
    expected = np.arange(1, 20) ** -0.99
    expected /= expected.sum()
    counts = np.bincount(slots, minlength=19)
    assert np.all(np.abs(counts - 20_000 * expected) < 4.5 * np.sqrt(20_000 * expected))


def test_a_draw_without_repeats_is_uniform_in_order():
    found = rows.distinct(np.random.default_rng(0), 24_000, 4, 3)
    counts = dict.fromkeys(itertools.permutations(range(4), 3), 0)
    for row in found.tolist():
        counts[tuple(row)] += 1
    assert all(abs(count - 1000) < 4.5 * np.sqrt(1000) for count in counts.values())


def test_first_places_are_the_smallest_in_order():
    values = np.random.default_rng(0).random((50, 9))
    for num in (1, 4, 9):
        np.testing.assert_array_equal(
            rows.first_places(values, num), np.argsort(values, axis=1)[:, :num]
        )


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall"])
def test_recall_repeats_the_value_of_a_keys_first_sight(name):
    task, found = draw(name, 128, 60)
    keys = 8  # of 16 words, in both
    noisy = 0
    for row, words in enumerate(found.inputs):
        known, due = {}, []
        for t in range(0, 128, 2):
            key, value = int(words[t]), int(words[t + 1])
            if key >= 16:
                noisy += 1
                assert value >= 16  # noise comes in pairs
                continue
            assert key < keys <= value < 16
            if key in known:
                due.append((t, known[key]))
            assert known.setdefault(key, value) == value
        assert scored(found, row) == due
        assert due[-1][0] == 126  # the last pair repeats a key
    np.testing.assert_array_equal(found.targets[:, :-1], found.inputs[:, 1:])
    np.testing.assert_array_equal(found.trained.sum(axis=1), 127)
    fraction = noisy / (60 * 64)
    assert fraction == 0 if name == "in_context_recall" else 0.17 < fraction < 0.23
    assert task.vocab_size == (16 if name == "in_context_recall" else 32)


def test_recall_with_much_noise_still_has_a_pair_to_recall():
    _, found = draw("noisy_recall", 16, 200, noise_fraction=0.9)
    assert found.answers[:, 14].all()


def read_fuzzy(words):
    """[(key tuple, value tuple, place of the value)] of a row and the padding before it."""
    start = int(np.argmax(words != 15))
    pairs, t = [], start
    while t < len(words):
        key = list(itertools.takewhile(lambda w: w < 7, words[t:]))
        value = list(itertools.takewhile(lambda w: 7 <= w < 15, words[t + len(key) :]))
        pairs.append((tuple(key), tuple(value), t + len(key)))
        t += len(key) + len(value)
    return start, pairs


@pytest.mark.parametrize("is_scored", [True, False])
def test_fuzzy_recall_repeats_whole_tuples(is_scored):
    _, found = draw("fuzzy_recall", 128, 60, scored=is_scored)
    lengths = set()
    for row in range(60):
        words = [*found.inputs[row], found.targets[row, -1]]
        start, pairs = read_fuzzy(np.array(words))
        assert start <= 12  # a pair more would have had room
        known, due = {}, []
        for key, value, place in pairs:
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            lengths.add((len(key), len(value)))
            if key in known:
                due += [(place + i - 1, word) for i, word in enumerate(value)]
            assert known.setdefault(key, value) == value
        assert scored(found, row) == due
        assert pairs[-1][0] in [key for key, _, _ in pairs[:-1]]
    keys = {3} if is_scored else {1, 2, 3}
    assert lengths == set(itertools.product(keys, {1, 2, 3}))
    np.testing.assert_array_equal(found.targets[:, :-1], found.inputs[:, 1:])
    assert found.trained.all()


def test_selective_copying_keeps_the_order():
    task, found = draw("selective_copying", 256)
    for row, words in enumerate(found.inputs):
        kept = [int(word) for word in words[: 256 - 17] if word != 14]
        assert len(kept) == 16
        assert words[256 - 17] == 15
        assert (words[256 - 16 :] == 14).all()
        assert scored(found, row) == list(zip(range(240, 256), kept))
    last = np.argmax(found.inputs[:, 238:239] != 14)  # nothing is blank after the last word
    assert last == 0 and (found.inputs[:, 238] != 14).all()
    assert task.vocab_size == 16


def test_compression_asks_for_all_words_after_the_last():
    _, found = draw("compression", 33)
    for row, words in enumerate(found.inputs):
        assert (words[16:] == 15).all() and (words[:16] < 15).all()
        assert scored(found, row) == list(zip(range(16, 32), words[:16]))
    assert (found.segment_ids[:, :32] == 1).all() and (found.segment_ids[:, 32:] == 0).all()


def test_memorization_has_one_map_for_all_examples():
    value_of = {}
    for seed in (0, 1):
        _, found = draw("memorization", 32, 300, seed=seed, vocab_size=64)
        for row, words in enumerate(found.inputs):
            assert (words[1::2] == 63).all()
            assert [t for t, _ in scored(found, row)] == list(range(1, 32, 2))
            for t, word in scored(found, row):
                assert value_of.setdefault(words[t - 1], word) == word
    assert set(value_of) == set(range(31))
    assert len(set(value_of.values())) == 31
    assert min(value_of.values()) >= 31 and max(value_of.values()) < 63
    other = tasks.KINDS["memorization"](32, vocab_size=64, map_seed=1).values
    assert list(other) != [value_of[key] for key in range(31)]


@pytest.mark.parametrize("name", ["copy", "prefix_ngram", "suffix_ngram"])
def test_copying_answers_with_what_follows(name):
    task, found = draw("copying", 120, 30, task=name, letters=5)
    text = np.array([*"abcde", "$", "|", ".", "*"])
    whole = 0
    for row in range(30):
        words = "".join(text[[*found.inputs[row], found.targets[row, -1]]])
        due = dict(scored(found, row))
        for start, example in [(m.start(), m[0]) for m in re.finditer(r"\$[^$]*", words)]:
            segment = {
                int(found.segment_ids[row, t]) for t in range(start, len(words) - 1)[: len(example)]
            }
            assert len(segment) <= 1
            places = range(start - 1, start + len(example) - 1)
            marked = [t for t in places if t in due]
            if not example.endswith("."):
                assert not marked
                continue
            whole += 1
            x, head = parse_copying(example, name)
            answer = example[len(head) :]
            assert x.endswith(answer[:-1])
            assert 5 <= len(x) <= 20
            assert [text[due[t]] for t in marked] == list(answer)
            assert marked[0] == start + len(head) - 1
            if name != "copy":
                q = x[: -len(answer[:-1])][-3:]
                assert len(re.findall(f"(?={q})", x)) == 1  # overlapping places count
                assert q in head
    assert whole > 60
    assert task.vocab_size == 9


def parse_copying(example, name):
    """The string of an example, and what stands before its answer."""
    parts = example.rstrip(".")[1:].split("|")
    if name == "copy":
        return parts[0], f"${parts[0]}|"
    if name == "prefix_ngram":
        return parts[1], f"${parts[0]}|{parts[1]}|"
    return parts[0], f"${parts[0]}|{parts[1][:3]}"


def test_parity_is_the_exclusive_or_so_far():
    _, found = draw("state_tracking", 50, group="Z2")
    np.testing.assert_array_equal(found.targets, np.bitwise_xor.accumulate(found.inputs, axis=1))
    assert found.answers.all()
    assert 0.45 < found.inputs.mean() < 0.55


@pytest.mark.parametrize(("group", "order"), [("S5", 120), ("A5", 60), ("A4xZ5", 60), ("Z60", 60)])
def test_group_words_multiply(group, order):
    table = state_tracking.products(group)
    assert table.shape == (order, order)
    everyone = np.arange(order)
    np.testing.assert_array_equal(table[0], everyone)
    np.testing.assert_array_equal(table[:, 0], everyone)
    assert all(len(set(row)) == order for row in table)
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == group.startswith("Z")


def test_s5_words_are_products_of_permutations():
    _, found = draw("state_tracking", 20, 10, group="S5")
    elements = list(itertools.permutations(range(5)))
    for row in range(10):
        state = np.arange(5)
        for t in range(20):
            state = np.array(elements[found.inputs[row, t]])[state]
            assert elements[found.targets[row, t]] == tuple(state)


def test_linear_regression_has_one_plane_a_row():
    """Least squares on the words' midpoints finds y, as far as intervals of 6/512 allow."""
    _, found = draw("linear_regression", 52, 20, dimension=4, bins=512)
    for row in range(20):
        numbers = (found.inputs[row, :50].reshape(10, 5) + 0.5) * 6 / 512 - 3
        inside = np.abs(numbers).max(axis=1) < 2.99
        x, y = numbers[inside, :4], numbers[inside, 4]
        w = np.linalg.lstsq(x, y, rcond=None)[0]
        assert np.abs(x @ w - y).max() < 0.05
        expected = [(5 * i + 3, int(found.inputs[row, 5 * i + 4])) for i in range(10)]
        assert scored(found, row) == expected
    assert (found.segment_ids[:, 50:] == 0).all()


def test_linear_regression_words_are_intervals():
    task = tasks.KINDS["linear_regression"](10, bins=6)
    np.testing.assert_array_equal(
        task.words(np.array([-9, -2.5, -0.1, 0.1, 2.9, 9])), [0, 0, 2, 3, 5, 5]
    )
    _, found = draw("linear_regression", 50, 400, bins=32)
    y = found.inputs[:, 4::5]
    assert 0.9 < np.std((y + 0.5) * 6 / 32 - 3) < 1.1


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_needles_hide_the_value_in_the_text(variant):
    _, found = draw("needles", 700, 12, variant=variant)
    places = []
    for row in range(12):
        due = scored(found, row)
        answer = bytes(word for _, word in due).decode()
        text = bytes([*found.inputs[row, : due[-1][0] + 1].tolist(), due[-1][1]]).decode()
        assert re.fullmatch(r"\d{7}" if variant < 3 else r"[0-9a-f-]{36}", answer)
        assert text.endswith(f"mentioned in the provided text is {answer}")
        needle = re.search(r"One of the special magic \w+s for ([a-z]+-[a-z]+) is: (\S+)\.", text)
        assert needle[2] == answer
        assert text.count(needle[1]) == 3 and text.count(answer) == 2
        assert (needles.NOISE in text) == (variant == 1)
        places.append(needle.start())
        size = len(text.encode())
        assert (found.segment_ids[row, : size - 1] == 1).all()
        assert size > 500 and (found.segment_ids[row, size:] == 0).all()
    assert len(set(places)) > 2


@pytest.mark.parametrize(
    ("name", "seq_len", "options", "words"),
    [
        (
            "mqar",
            64,
            {"num_pairs": (32,)},
            r"mqar\.num_pairs=\(32,\) does not fit data\.seq_len=64",
        ),
        ("mqar", 64, {"vocab_size": 32}, "mqar.vocab_size=32 must exceed data.seq_len=64"),
        ("selective_copying", 30, {}, "num_words=16 does not fit data.seq_len=30"),
        ("copying", 30, {}, r"max_length=\(5, 20\) must lie between"),
        ("copying", 64, {"task": "cope"}, "copying.task='cope' is not one of copy"),
        ("state_tracking", 8, {"group": "S9"}, "group='S9' is not known: write Z2"),
        ("needles", 128, {}, "data.seq_len=128 must be at least 512"),
        ("in_context_recall", 7, {}, "data.seq_len=7 must be even"),
        ("noisy_recall", 8, {"noise_fraction": 1.0}, "noise_fraction=1.0 must be at least 0"),
        ("fuzzy_recall", 20, {}, "it must exceed 4 times their sum"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(name, seq_len, options, words):
    with pytest.raises(ValueError, match=words):
        tasks.KINDS[name](seq_len, **options)
