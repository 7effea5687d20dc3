"""One device against eight emulated ones: first loss, every gradient, four steps, in float32."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from effarch.parallel import mesh, partitioner

SCRIPT = pathlib.Path(__file__).parent / "eight_devices.py"
ALONE = tuple(f"{axis}=8" for axis in mesh.AXES)
PAIRS = tuple(f"{a}=2,{b}=4" for a, b in itertools.combinations(mesh.AXES, 2))


def compare(model: str, meshes: tuple[str, ...]) -> list[dict]:
    """A line a mesh, from two processes that share the meshes out."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), model, *part],
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (meshes[::2], meshes[1::2])
    ]
    found = []
    for process in processes:
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr[-3000:]
        assert partitioner.REMATERIALIZATION not in stderr
        found += [json.loads(line) for line in stdout.splitlines()]
    assert {line["mesh"] for line in found} == set(meshes)
    return found


def check(found: list[dict], gradient: float = 1e-5) -> None:
    for line in found:
        print(line)
        assert abs(line["fall"]) > 1e-3, line  # the parameters move, so the steps mean something
        assert line["leaves"] > 10, line
        assert line["first_loss"] < 1e-5, line
        assert line["gradient"] < gradient, line
        assert line["losses"] < 1e-4, line


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.multiprocess
def test_a_hybrid_with_weights_heads_or_time_cut():
    check(compare("hybrid", ("fsdp=2,tensor=4", "fsdp=2,context=4")))


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "hybrid"])
def test_every_axis(model):
    check(compare(model, ALONE))


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "hybrid"])
def test_every_pair_of_axes(model):
    check(compare(model, PAIRS))


MIXERS = ("gates", "decays", "channels")
GRADIENT = {"decays": 5e-5}
"""Where it is not 1e-5: another chunk size on one device moves that of GLA's keys by 6e-6 already."""


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("model", MIXERS)
def test_every_mixer_with_time_or_heads_cut(model):
    check(compare(model, ("context=8", "tensor=8")), GRADIENT.get(model, 1e-5))


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("model", [*MIXERS, "sparse"])
def test_every_mixer_with_time_cut_beside_another_axis(model):
    meshes = ("data=2,context=4", "context=2,tensor=4")
    meshes += ("context=8", "tensor=8") if model == "sparse" else ()
    check(compare(model, meshes), GRADIENT.get(model, 1e-5))
