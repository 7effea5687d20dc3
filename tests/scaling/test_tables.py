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


def runs_of_a_law():
    """Header and lines of a Chinchilla law, by the names that a sweep's file has."""
    rows = ["run,params_matmul,tokens,flops_6nd,val/loss"]
    for size in (1e7, 3e7, 1e8, 3e8, 1e9):
        for tokens in (1e9, 1e10, 1e11):
            loss = 1.8 + 480 * size**-0.35 + 2000 * tokens**-0.37
            rows.append(f"r{len(rows)},{size},{tokens},{6 * size * tokens},{loss}")
    return rows


def test_the_command_fits_a_file(tmp_path, capsys):
    rows = runs_of_a_law()
    rows[0] = rows[0].replace("params_matmul", "params").replace("val/", "")
    path = write(tmp_path, "\n".join(rows))
    command.main([f"--csv={path}", "--starts=6", "--bootstrap=5"])
    result = json.loads(capsys.readouterr().out)
    assert result["runs"] == 15 and result["dropped"] == []
    assert list(result["columns"]) == ["params", "tokens", "loss"] and result["delta"] == 1e-3
    assert result["params"]["alpha"] == pytest.approx(0.35, abs=1e-3)
    assert result["params"]["E"] == pytest.approx(1.8, abs=1e-3)
    assert set(result["se"]) == {"A", "B", "E", "alpha", "beta"}
    with pytest.raises(SystemExit):
        command.main([f"--csv={path}", "--law=chinchila"])
    assert "Did you mean 'chinchilla'?" in capsys.readouterr().err


def test_the_command_fits_the_file_of_a_sweep(tmp_path, capsys):
    """Its columns by name; a failed run has no loss; the largest run and one beyond are predicted."""
    rows = [*runs_of_a_law(), "r16,1e8,1e9,6e17,"]
    path = write(tmp_path, "\n".join(rows))
    columns = "--columns=params=params_matmul,loss=val/loss,flops=flops_6nd"
    at = "--at=params=1e10,tokens=1e12"
    command.main([f"--csv={path}", columns, at, "--starts=6", "--bootstrap=5"])
    result = json.loads(capsys.readouterr().out)
    assert result["columns"]["params"] == "params_matmul"
    assert result["runs"] == 15 and result["dropped"] == ["run 16: no val/loss"]
    assert result["leave_largest_out"]["held_out"] == 1
    assert result["leave_largest_out"]["percent"] < 0.01
    loss = 1.8 + 480 * 1e10**-0.35 + 2000 * 1e12**-0.37
    assert result["prediction"]["loss"] == pytest.approx(loss, rel=1e-3)
    low, high = result["prediction"]["band_95"]
    assert low <= result["prediction"]["loss"] * 1.0001 and high >= loss * 0.9999
    few = write(tmp_path, "\n".join(rows[:6]))
    command.main([f"--csv={few}", columns, "--starts=2"])
    assert "only 4 runs" in json.loads(capsys.readouterr().out)["leave_largest_out"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--columns=params=params_matmul,loss=run"], "column run holds text, such as 'r1'"),
        (["--columns=params=params_matmul,loss=val/los"], "Did you mean 'val/loss'?"),
        (["--columns=los=val/loss"], "--columns.los is not an option"),
        (["--columns=loss"], "write --columns=NAME=VALUE"),
        (["--at=params=1e9"], "--at needs tokens above 0"),
        (["--at=params=x,tokens=1"], "params='x' is not a number"),
        (["--starts=0"], "--starts=0 must be at least 1"),
        (["--bootstrap=1"], "--bootstrap=1 0 (none) or at least 2"),
    ],
)
def test_mistakes_in_the_command(tmp_path, capsys, flags, words):
    path = write(tmp_path, "\n".join(runs_of_a_law()))
    with pytest.raises(SystemExit) as stopped:
        command.main([f"--csv={path}", "--columns=params=params_matmul,loss=val/loss", *flags])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
