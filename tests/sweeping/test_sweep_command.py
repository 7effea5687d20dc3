"""A sweep of 12 real runs, killed half-way with everything it started, then run again."""

import csv
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from effarch import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven"]
CONFIG = """
import pathlib
from effarch import config, sweeps


def get_config(arg=""):
    return config.from_json(pathlib.Path(__file__).with_name("config.json").read_text())


def get_sweep(arg=""):
    return sweeps.product(
        sweeps.together({"optimizer.learning_rate": [1e-3, 3e-3], "model.width": [16, 16]}),
        {"seed": range(int(arg or 6))},
    )
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A 1-layer model on a corpus of 40 small texts that trains for 12 steps."""
    folder = tmp_path_factory.mktemp("sweep")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        text = " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(120))
        (texts / f"{number:02d}.txt").write_text(text)
    c = config_lib.default()
    c.name = "tiny"
    c.data.sources, c.data.tokenizer = (f"files:{texts}/*.txt",), "bytes"
    c.data.val_permille, c.data.cache_dir = 150, str(folder / "cache")
    c.data.seq_len, c.data.batch_size = 32, 4
    c.model.width, c.model.depth, c.model.layers = 16, 1, "attention/glu"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 32
    c.optimizer.schedule.warmup_steps = 2
    c.train.num_steps = 12
    c.eval.every_steps = 0
    c.checkpoint.every_steps = 4
    c.log.every_steps, c.log.tensorboard, c.log.sample_prompts = 1, False, ()
    (folder / "config.json").write_text(config_lib.to_json(c))
    (folder / "tiny.py").write_text(CONFIG)
    return folder / "tiny.py"


def start(config_file, root, *arguments, switches=""):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "effarch.sweep", f"--config={config_file}{switches}"),
            *(f"--workdir={root}", *arguments),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def finish(*arguments, **options):
    process = start(*arguments, **options)
    stdout, stderr = process.communicate(timeout=280)
    return process.returncode, stdout, stderr


def summaries(root):
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("*/summary.json")}


def kill_runs(root):
    """The runs of a sweep that was killed, as when a machine loses power."""
    for log in (root / "logs").glob("*.log"):
        name = log.stem
        for command in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if f"--workdir={root / name}".encode() in command.read_bytes().split(b"\0"):
                    os.kill(int(command.parent.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue


CLUSTERS = {
    "slurm": ("--launcher=slurm", "--launcher_options=cpus_per_task=1,time=20"),
    "ray": ("--launcher=ray", "--launcher_options=cpus=1"),
}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_twelve_runs_killed_half_way_finish_without_repeating_any(config_file, tmp_path):
    check_killed_half_way(config_file, tmp_path / "sweep", ["--parallel=2"], local=True)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_same_on_a_cluster(config_file, tmp_path, cluster):
    """Jobs outlive the sweep: the next one takes them over."""
    if cluster == "slurm" and not (shutil.which("sbatch") and importlib.util.find_spec("submitit")):
        pytest.skip("no Slurm cluster here, or no submitit (extra clusters)")
    if cluster == "ray" and "RAY_ADDRESS" not in os.environ:
        pytest.skip("RAY_ADDRESS names no Ray cluster's dashboard here (extra clusters)")
    check_killed_half_way(config_file, tmp_path / "sweep", CLUSTERS[cluster], local=False)


def check_killed_half_way(config_file, root, arguments, *, local):
    process = start(config_file, root, *arguments)
    deadline = time.monotonic() + 250
    while len(summaries(root)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    _, stderr = process.communicate()
    if local:
        kill_runs(root)
    before = summaries(root)
    assert 5 <= len(before) < 12, stderr
    code, stdout, stderr = finish(config_file, root, *arguments)
    assert code == 0, stderr
    after = summaries(root)
    assert len(after) == 12
    assert {name: after[name] for name in before} == before
    for name in before:
        assert f"{name} started" not in stderr
        assert f"{name} resumed" not in stderr
    if local:
        assert f"sweep of 12 runs, {len(before)} of them settled before" in stderr
        assert stderr.count(" finished ") == 12 - len(before)
    else:
        assert " started " not in stderr  # all jobs had been submitted before
    assert str(root / "results.csv") in stdout
    with open(root / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["optimizer.learning_rate"], row["seed"]) for row in rows} == {
        (rate, str(seed)) for rate in ("0.001", "0.003") for seed in range(6)
    }
    assert all(float(row["val/loss"]) < 6 for row in rows)
    assert "12 runs compared" in (root / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.multiprocess
def test_stop_failures_and_a_second_sweep(config_file, tmp_path):
    root = tmp_path / "sweep"
    process = start(config_file, root, "--config.train.num_steps=4000", switches=":1")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not list(root.glob("*/checkpoints/8")):
        time.sleep(0.05)
    code, _, stderr = finish(config_file, root, "--config.train.num_steps=4000", switches=":1")
    assert code == 2
    assert "in use by another sweep" in stderr
    process.terminate()
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 143, stderr
    assert "stopped at step" in stderr
    code, _, stderr = finish(
        *(config_file, root, "--config.optimizer.clip_norm=1"),
        *("--config.data.sources=('files:nowhere/*.txt',)", "--retry_failed"),
        switches=":1",
    )
    assert code == 1
    assert stderr.count(" failed  error: ") == 2
    assert "no file matches 'files:nowhere/*.txt'" in stderr
    failures = list((root / "failures").iterdir())
    assert len(failures) == 2
    assert failures[0].read_text().startswith("exit code 2\n")


@pytest.mark.slow
@pytest.mark.ci
def test_dry_run_and_mistakes(config_file, tmp_path):
    root = tmp_path / "sweep"
    code, stdout, stderr = finish(config_file, root, "--dry_run")
    assert code == 0, stderr
    assert stdout.count("tiny-") == 12
    assert "width=16" in stdout
    assert not root.exists()
    (config_file.parent / "plain.py").write_text(CONFIG.partition("def get_sweep")[0])
    code, _, stderr = finish(config_file.parent / "plain.py", root)
    assert code == 2
    assert "has no get_sweep" in stderr
    assert json.loads(config_file.with_name("config.json").read_text())["name"] == "tiny"
