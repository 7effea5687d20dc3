"""One contract for every launcher; the clusters are real ones, where there are any."""

import importlib.util
import os
import shutil
import signal
import sys
import time

import pytest

from effarch.sweeping import launchers
from effarch.sweeping.launchers import local

SAVING = """
import signal, sys, time

def save(*_):
    print("saving", flush=True)
    time.sleep(5)
    print("saved", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(100)
"""
OPTIONS = {"local": {}, "slurm": {"time": "5", "cpus_per_task": "1"}, "ray": {"cpus": "1"}}
HAVE = {
    "local": True,
    "slurm": shutil.which("sbatch") and importlib.util.find_spec("submitit"),
    "ray": "RAY_ADDRESS" in os.environ and importlib.util.find_spec("ray"),
}


@pytest.fixture(
    params=[
        pytest.param(kind, marks=(pytest.mark.slow, *[pytest.mark.ci] * (kind == "local")))
        for kind in launchers.KINDS
    ],
    scope="module",
)
def launcher(request, tmp_path_factory):
    if not HAVE[request.param]:
        pytest.skip(f"no {request.param} cluster here (extra clusters)")
    root = tmp_path_factory.mktemp("launcher")
    return launchers.build(request.param, root, parallel=2, gpus=0, options=OPTIONS[request.param])


def python(code):
    return [sys.executable, "-c", code]


def end(job, seconds=100):
    deadline = time.monotonic() + seconds
    while job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return job.poll()


def wait_for(text, log, seconds=100):
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_exit_codes_and_logs(launcher, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    assert end(launcher.start("good", python("print('hello')"), log)) == 0
    assert log.read_text().startswith("before\nhello\n")
    assert end(launcher.start("bad", python("raise SystemExit(7)"), log)) == 7


def test_a_stopped_job_has_time_to_save(launcher, tmp_path):
    job = launcher.start("long", python(SAVING), tmp_path / "log")
    wait_for("up", tmp_path / "log")
    assert job.poll() is None
    if job.id is not None:
        job = launcher.attach(job.id, tmp_path / "log")  # as another process would
    job.stop()
    end(job)
    wait_for("saved", tmp_path / "log", 20)
    assert (tmp_path / "log").read_text().count("saving") == 1


def test_local_processes_have_their_log_their_gpus_and_their_end(tmp_path):
    launcher = local.Local(tmp_path, parallel=2, gpus=2, options={})
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES']); raise SystemExit(3)"
    first = launcher.start("a", [sys.executable, "-c", code], tmp_path / "a.log")
    sleep = [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"]
    second = launcher.start("b", sleep, tmp_path / "b.log")
    first._process.wait(timeout=60)
    assert first.poll() == 3
    assert (tmp_path / "a.log").read_text() == "0,1\n"
    assert second.poll() is None
    third = launcher.start("c", [sys.executable, "-c", code], tmp_path / "c.log")
    third._process.wait(timeout=60)
    assert (tmp_path / "c.log").read_text() == "0,1\n"  # the place of the first
    second.stop()
    assert second._process.wait(timeout=60) == -signal.SIGTERM
    with pytest.raises(ValueError, match=r"--launcher_options\.partition is not an option"):
        local.Local(tmp_path, parallel=1, gpus=0, options={"partition": "gpu"})
