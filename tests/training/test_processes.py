"""A run of two real processes: its losses, joint checkpoints, stopping, and the death of one."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from effarch.training import watchdog, writers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
TIMEOUT = 8
STEPS = 150


@pytest.fixture(scope="module")
def config_file(make_tiny, write_config):
    c = make_tiny()
    c.train.num_steps = STEPS
    c.checkpoint.every_steps = 20
    c.eval.every_steps = 0
    c.hosts.timeout_seconds = float(TIMEOUT)
    return write_config(c)


def start(config_file, folder, count):
    """The processes of a run, one or two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "effarch.train"]
    command += [f"--config={config_file}", f"--workdir={folder}"]
    joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            command + ([*joined, f"--process_id={index}"] if count > 1 else []),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for index in range(count)
    ]


def ended(processes) -> tuple[list[int], list[str]]:
    """Exit codes and what was written to stderr."""
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [process.returncode for process in processes], errors


def losses(folder):
    return {line["step"]: line["loss"] for line in writers.read_metrics(folder, "train")}


def wait_for_step(folder, step, processes):
    while max(losses(folder), default=0) < step:
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
    """The losses of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    codes, errors = ended(start(config_file, folder, 1))
    assert codes == [0], errors
    return losses(folder)


def assert_same_losses(folder, expected):
    found = losses(folder)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5


@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 1, marks=pytest.mark.ci), (1, 2)])
def test_two_processes_are_one_run_and_either_continues_the_other(
    config_file, tmp_path, alone, before, after
):
    processes = start(config_file, tmp_path, before)
    wait_for_step(tmp_path, 30, processes)
    processes[-1].send_signal(signal.SIGTERM)  # told to one, all save and stop
    codes, errors = ended(processes)
    assert codes == [143] * before, errors
    stopped_at = max(losses(tmp_path))
    assert (tmp_path / "checkpoints" / str(stopped_at) / "manifest.json").exists()
    codes, errors = ended(start(config_file, tmp_path, after))
    assert codes == [0] * after, errors
    assert f"resumed from the checkpoint of step {stopped_at}" in errors[0]
    assert_same_losses(tmp_path, alone)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGKILL),
        (1, signal.SIGSTOP),
    ],
)
def test_when_one_dies_the_other_says_so_and_the_run_resumes(
    config_file, tmp_path, alone, victim, number
):
    processes = start(config_file, tmp_path, 2)
    wait_for_step(tmp_path, 30, processes)
    processes[victim].send_signal(number)
    begin = time.monotonic()
    survivor = processes[1 - victim]
    _, error = survivor.communicate(timeout=10 * TIMEOUT)
    assert time.monotonic() - begin < 3 * TIMEOUT
    processes[victim].kill()
    ended([processes[victim]])
    assert survivor.returncode == watchdog.LOST, error
    assert f"error: process {victim} on {socket.gethostname()} died or is frozen" in error
    stacks = tmp_path / watchdog.FOLDER / f"stacks-{1 - victim}.txt"
    assert "most recent call first" in stacks.read_text()
    codes, errors = ended(start(config_file, tmp_path, 2))
    assert codes == [0, 0], errors
    assert "resumed from the checkpoint" in errors[0]
    assert_same_losses(tmp_path, alone)


def test_processes_of_different_runs_do_not_train_together(config_file, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "effarch.train", f"--config={config_file}"),
                *(f"--config.seed={index}", f"--workdir={tmp_path}"),
                *(f"--coordinator=127.0.0.1:{port}", "--num_processes=2"),
                f"--process_id={index}",
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for index in range(2)
    ]
    codes, errors = ended(processes)
    assert codes == [2, 2], errors
    assert all("process 1 has another config than process 0" in error for error in errors)
    assert not (tmp_path / "config.json").exists()
