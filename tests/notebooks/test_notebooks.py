"""Every notebook is stored without outputs, begins alike, and runs on a CPU in under three minutes."""

import functools
import json
import os
import pathlib
import resource
import subprocess
import sys

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    content = json.loads(path.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert code[0]["source"] == _setup()
    assert content["cells"][0]["cell_type"] == "markdown"
    for cell in code:
        compile("".join(cell["source"]), path.name, "exec")


_WITHOUT_EFFARCH = """
import subprocess, sys
sys.path.insert(0, "")
subprocess.run = lambda command, check: print(*command[1:])
exec(sys.argv[1])
print(sys.path[0])
"""


@pytest.mark.parametrize("place", ["beside a clone", "in a clone", "alone"])
def test_the_first_cell_installs_where_effarch_is_not(place, tmp_path):
    """As in Colab: an interpreter that finds no effarch; pip and git are only printed."""
    root = tmp_path / "effarch"
    if place != "alone":
        for name in ("effarch", "kernels", "notebooks"):
            (root / name).mkdir(parents=True)
    cell = "".join(_setup())
    folder = root / "notebooks" if place == "in a clone" else tmp_path
    command = [sys.executable, "-I", "-S", "-c", _WITHOUT_EFFARCH]
    run = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True)
    done = run([*command, cell])
    wanted = [f"-m pip install -q -e {root} treescope", str(root)]
    if place == "alone":
        assert "write the address of effarch's repository in REPOSITORY" in done.stderr
        done = run([*command, cell.replace('REPOSITORY = ""', 'REPOSITORY = "ADDRESS"')])
        wanted.insert(0, "clone -q ADDRESS effarch")
    assert done.stdout.splitlines() == wanted, done.stderr


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.multiprocess
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_in_under_three_minutes(path):
    """On two cores: processor time, which depends less on what else the machine does."""
    notebook = nbformat.read(path, as_version=4)
    # As a user has it: the tests' own compiler flags make slow programs, and notebooks train.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    start = _seconds_of_children()
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}
    ).execute(env=environment)
    assert 1 < _seconds_of_children() - start < 2 * 180


def _seconds_of_children() -> float:
    """User and system time of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _setup() -> list[str]:
    """The first code cell, which is the same in all."""
    cells = json.loads(NOTEBOOKS[0].read_text())["cells"]
    return next(cell["source"] for cell in cells if cell["cell_type"] == "code")
