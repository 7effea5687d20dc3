"""What an experiment's script writes into its README and results."""

import json

import numpy as np
import pytest

from effarch import experiment_record

PAGE = "# Title\n\n<!-- table:a -->\nold\n<!-- end -->\n\n<!-- table:b -->\n<!-- end -->\nlast\n"


def test_a_table_goes_between_its_markers_and_nowhere_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    experiment_record.write_table(path, "a", ["x", "y"], [[1, r"\1"], ["b", 2.5]])
    table = "| x | y |\n| --- | --- |\n| 1 | \\1 |\n| b | 2.5 |"
    assert path.read_text() == PAGE.replace("old", table)
    experiment_record.write_table(path, "a", ["x", "y"], [[1, r"\1"], ["b", 2.5]])
    assert path.read_text() == PAGE.replace("old", table)
    with pytest.raises(ValueError, match="needs one pair <!-- table:c -->"):
        experiment_record.write_text(path, "c", "text")


def test_results_keep_six_digits(tmp_path):
    path = tmp_path / "results" / "a.json"
    experiment_record.write_json(path, {"pi": 3.14159265, "many": [1, 2e-9 / 3], 4: "text"})
    assert json.loads(path.read_text()) == {"pi": 3.14159, "many": [1, 6.66667e-10], "4": "text"}


def test_what_an_interval_says_of_a_claim():
    values = np.array([-0.02, -0.03, -0.04])  # half-width 0.01 t(0.975, 2) / sqrt(3) = 0.0248
    sentence = experiment_record.claim("a below b", values, "loss {:+.2%}")
    assert sentence == "*a below b* holds (loss -3.00%, 95 % interval -5.48% to -0.52%)."
    assert "*a* fails (+0.0300 nats" in experiment_record.claim("a", -values, "{:+.4f} nats")
    assert "holds" in experiment_record.claim("a", -values, "{:.1f}", most=0.06)
    assert "is not decided" in experiment_record.claim("a", -values, "{:.1f}", most=0.03)
    assert experiment_record.interval(values) == "-0.0300 (-0.0548 to -0.0052)"
    assert experiment_record.interval(values[:1]) == "-0.0200"
    assert experiment_record.interval(values[:0]) == ""
    assert experiment_record.ranged(values) == "-0.030 (-0.040 to -0.020)"
    assert experiment_record.ranged([0.5]) == "0.500"


def test_panels_are_saved_where_the_block_ends(tmp_path):
    path = tmp_path / "figures" / "a.png"
    with experiment_record.panels(path, 2, size=(4, 2)) as (left, right):
        experiment_record.bar(left, 1.0, np.array([1.0, 2.0, 6.0]), "three")
        right.plot([1, 2])
        assert not path.exists()
    (line,) = left.containers
    assert line.lines[0].get_ydata() == [3.0] and line.get_label() == "three"
    assert path.read_bytes()[:4] == b"\x89PNG"
