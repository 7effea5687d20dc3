"""The layer language: grammar, truncation, runs and errors."""

import pytest

from effarch.models import layer_language as language

pytestmark = pytest.mark.smoke

HYBRID = "3*gdn/glu + attn/glu"


def names(text: str, depth: int) -> list[str]:
    return [str(layer) for layer in language.layers(text, depth)]


def test_text_without_colon_is_the_repeat_clause():
    assert language.layers(HYBRID, 8) == language.layers(f"repeat: {HYBRID}", 8)
    assert names("a/b", 2) == ["a/b", "a/b"]


def test_first_and_last_are_laid_once_and_repeat_fills_the_middle():
    text = "first: attn/glu; repeat: 2*gdn/moe + attn/moe; last: attn/none"
    assert names(text, 7) == [
        "attn/glu", "gdn/moe", "gdn/moe", "attn/moe", "gdn/moe", "gdn/moe", "attn/none",
    ]  # fmt: skip


def test_repeat_is_cut_off_at_the_depth():
    assert names(HYBRID, 6) == ["gdn/glu"] * 3 + ["attn/glu"] + ["gdn/glu"] * 2
    assert names(HYBRID, 2) == ["gdn/glu"] * 2
    assert names("first: a/b; repeat: c/d; last: e/f", 2) == ["a/b", "e/f"]


@pytest.mark.parametrize("depth", range(1, 15))
@pytest.mark.parametrize("text", [HYBRID, "a/b", f"first: 2*a/b; repeat: {HYBRID}", "a/b + c/d"])
def test_runs_cover_every_layer_once_in_order(text, depth):
    if depth < 2 and text.startswith("first"):
        depth = 2
    start = 0
    for run in language.runs(text, depth):
        assert run.start == start
        start += len(run.period) * run.repeats
    assert start == depth


def test_equal_layers_are_one_run_of_the_shortest_period():
    assert language.runs("24*gla/glu + attn/glu", 24) == (
        language.Run(0, (language.Layer("gla", "glu"),), 24),
    )
    assert [len(run.period) for run in language.runs(HYBRID, 14)] == [4, 1]
    assert [run.repeats for run in language.runs(HYBRID, 14)] == [3, 2]


def test_white_space_and_order_of_clauses_do_not_matter():
    assert language.layers(" last :a/b;repeat:3 * c/d+a/b ", 9) == language.layers(
        "repeat: 3*c/d + a/b; last: a/b", 9
    )


@pytest.mark.parametrize(
    ("text", "depth", "words"),
    [
        ("", 4, "model.layers is empty"),
        ("attn", 4, "'attn' is not a block"),
        ("attn/glu + ", 4, "'' is not a block"),
        ("0*attn/glu", 4, "0 times"),
        ("-1*attn/glu", 4, "is not a block"),
        ("middle: a/b", 4, "'middle' is not a clause"),
        ("first: a/b; first: c/d", 4, "stands twice"),
        ("first: 3*a/b; last: 2*a/b", 4, "model.depth=4 is less than the 3 first and 2 last"),
        ("first: a/b; last: a/b", 4, "add a repeat: clause"),
    ],
)
def test_errors_are_one_sentence(text, depth, words):
    with pytest.raises(ValueError, match="model") as error:
        language.runs(text, depth)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
