"""Tables of runs, and the command that fits one."""

import json

import numpy as np
import pytest

from effarch.scaling import __main__ as command
from effarch.scaling import tables


def write(folder, text):
    path = folder / "runs.csv"
    path.write_text(text)
    return path


def test_columns_are_numbers_or_text(tmp_path):
    table = tables.read_csv(write(tmp_path, "name,loss,note\na,3.5,1\nb,2e1,\nc,1,x\n"))
    assert list(table["name"]) == ["a", "b", "c"]
    np.testing.assert_array_equal(table["loss"], [3.5, 20, 1])
    assert list(table["note"]) == ["1", "", "x"]
    assert tables.num_rows(table) == 3
    assert list(tables.where(table, name="b")["loss"]) == [20]
    holes = tables.read_csv(write(tmp_path, "name,loss\na,1\nb,\n"))
    np.testing.assert_array_equal(holes["loss"], [1, np.nan])


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n", "holds no runs"), ("a,b\n1,2\n3\n", "line 3 has 1 cells, the header 2")],
)
def test_a_damaged_file_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        tables.read_csv(write(tmp_path, text))


def test_an_unknown_column_is_refused(tmp_path):
    table = tables.read_csv(write(tmp_path, "loss\n1\n"))
    with pytest.raises(ValueError, match=r"column='los' is not known.*Did you mean 'loss'"):
        tables.where(table, los=1)


def test_the_command_fits_a_file(tmp_path, capsys):
    rows = ["params,tokens,loss"]
    for size in (1e7, 3e7, 1e8, 3e8, 1e9):
        for tokens in (1e9, 1e10, 1e11):
            rows.append(f"{size},{tokens},{1.8 + 480 * size**-0.35 + 2000 * tokens**-0.37}")
    path = write(tmp_path, "\n".join(rows))
    command.main([f"--csv={path}", "--starts=6", "--bootstrap=5"])
    result = json.loads(capsys.readouterr().out)
    assert result["runs"] == 15
    assert result["columns"] == ["params", "tokens", "loss"] and result["delta"] == 1e-3
    assert result["params"]["alpha"] == pytest.approx(0.35, abs=1e-3)
    assert result["params"]["E"] == pytest.approx(1.8, abs=1e-3)
    assert set(result["se"]) == {"A", "B", "E", "alpha", "beta"}
    with pytest.raises(SystemExit):
        command.main([f"--csv={path}", "--law=chinchila"])
    assert "Did you mean 'chinchilla'?" in capsys.readouterr().err
