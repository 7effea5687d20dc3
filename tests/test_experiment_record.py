"""What an experiment's script writes into its README and results."""

import json

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
