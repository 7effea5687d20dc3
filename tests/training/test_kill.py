"""Real processes killed at random moments, and checkpoints damaged on disk: resumed bit for bit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from effarch.training import writers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def config_file(make_tiny, write_config):
    """A hybrid that saves at every second of its 28 steps."""
    c = make_tiny()
    c.model.layers = "gated_delta_net/glu + attention/glu"
    c.model.blocks.gated_delta_net.update(num_heads=2, head_dim=8)
    c.train.num_steps = 28
    c.checkpoint.every_steps = 2
    c.eval.every_steps = 14
    return write_config(c)


def start(config_file, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "effarch.train", f"--config={config_file}", f"--workdir={folder}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finish(config_file, folder) -> str:
    process = start(config_file, folder)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return stderr


def lines(folder):
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in writers.read_metrics(folder)
    ]


def arrays(folder):
    """The hashes of the final checkpoint's arrays are not stable; their restored values are."""
    import jax

    from effarch.training import restore

    return jax.tree.map(lambda leaf: leaf.tobytes(), jax.device_get(restore.open_run(folder)[1]))


def wait_for_step(folder, step, process):
    while process.poll() is None:
        if folder.exists():
            records = writers.read_metrics(folder)
            if records and records[-1]["step"] >= step:
                return
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    finish(config_file, folder)
    return folder


@pytest.mark.ci
def test_kill_at_random_moments_and_during_saves(config_file, whole, tmp_path):
    """Three kills in one run, each some milliseconds after a step that starts a save."""
    folder = tmp_path / "killed"
    draw = random.Random(1)
    for step in (3, 11, 19):
        process = start(config_file, folder)
        wait_for_step(folder, step, process)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(config_file, folder)
    assert lines(folder) == lines(whole)
    assert arrays(folder) == arrays(whole)


def test_sigterm_saves_and_says_so(config_file, whole, tmp_path):
    folder = tmp_path / "stopped"
    process = start(config_file, folder)
    wait_for_step(folder, 9, process)
    process.terminate()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 143, stderr
    assert "told to stop" in stderr
    finish(config_file, folder)
    assert lines(folder) == lines(whole)
    assert arrays(folder) == arrays(whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_falls_back_in_one_sentence(
    config_file, whole, tmp_path, damage
):
    folder = tmp_path / damage
    process = start(config_file, folder)
    wait_for_step(folder, 13, process)
    process.terminate()
    process.communicate(timeout=300)
    steps = sorted(
        int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()
    )
    newest = folder / "checkpoints" / str(steps[-1])
    victim = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    stderr = finish(config_file, folder)
    told = [line for line in stderr.splitlines() if str(steps[-1]) in line and victim.name in line]
    assert len(told) == 1, stderr
    assert f"step {steps[-2]}" in stderr
    assert lines(folder) == lines(whole)
    assert arrays(folder) == arrays(whole)
