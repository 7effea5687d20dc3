"""Every notebook is stored without outputs, begins alike, and runs on a CPU in under three minutes."""

import json
import os
import pathlib
import resource

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
