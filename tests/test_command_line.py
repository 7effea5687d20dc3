"""The command line: help, overrides, and one sentence for every mistake."""

import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAST = "--config=configs/transformer.py:size=tiny"


def children_seconds():
    """Processor seconds of finished child processes; the wall clock depends on the neighbours."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*arguments, module="effarch.train", cwd=ROOT, **env):
    start = children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        check=False,
    )
    return done, children_seconds() - start


def assert_one_sentence(done, *words):
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_help_shows_examples_and_flags_without_loading_jax():
    done, _ = run("--help")
    assert done.returncode == 0
    assert "--config=configs/quickstart.py" in done.stdout
    assert "--workdir" in done.stdout
    assert "143" in done.stdout
    flags = done.stdout.partition("Flags:")[2]
    assert all(f"\n  --{name} " in flags for name in ("config", "print_config", "workdir"))


def test_overrides_reach_the_printed_config():
    done, _ = run(FAST, "--config.model.width=96", "--config.seed=7", "--print_config")
    assert done.returncode == 0, done.stderr
    assert "width: 96" in done.stdout
    assert "seed: 7" in done.stdout
    assert "name: transformer-tiny" in done.stdout


MISTAKES = {
    "unknown field": (
        [FAST, "--config.model.wdith=3"],
        ["model.wdith is not a config field", "Did you mean 'width'?"],
    ),
    "unknown section": (
        [FAST, "--config.modle.width=3"],
        ["modle.width is not a config field", "Did you mean 'model'?"],
    ),
    "wrong type": ([FAST, "--config.model.depth=deep"], ["config.model.depth", "deep"]),
    "bad layer text": (
        [FAST, "--config.model.layers=3*atention/glu"],
        ["'atention' (layer 0)", "Did you mean 'attention'?"],
    ),
    "indivisible batch": (
        [FAST, "--config.train.accumulate=3"],
        ["data.batch_size=8 is not a multiple of train.accumulate=3", "data.batch_size=9"],
    ),
    "missing data": (
        [FAST, "--config.data.sources=('files:nowhere/*.txt',)"],
        ["no file matches 'files:nowhere/*.txt'"],
    ),
    "missing prepared folder": (
        [FAST, "--config.data.path=nowhere"],
        ["nowhere is not a prepared folder", "effarch.prepare_data"],
    ),
    "empty file": (
        [FAST, "--config.data.sources=('files:{tmp}/empty.txt',)"],
        ["empty.txt", "holds no text"],
    ),
    "vocabulary mismatch": (
        [
            FAST,
            "--config.data.sources=('files:{tmp}/*.md',)",
            "--config.data.tokenizer=bytes",
            "--config.model.vocab_size=100",
        ],
        ["model.vocab_size=100 is smaller than the data's 257"],
    ),
    "unwritable folder": (
        [
            FAST,
            "--config.data.sources=('files:{tmp}/*.md',)",
            "--config.data.tokenizer=bytes",
            "--workdir=/proc/effarch",
        ],
        ["--workdir=/proc/effarch cannot be written"],
    ),
    "impossible mesh": (
        [FAST, "--config.mesh.tensor=3"],
        ["mesh: ", "tensor 3", "does not fit 1 device"],
    ),
    "missing config": (["--config=qickstart"], ["no such file", "Did you mean 'quickstart'?"]),
    "no config": ([], ["--config is missing", "quickstart"]),
    "unknown size": (["--config=transformer:size=2b"], ["--config: size='2b' is not known"]),
    "unknown flag": ([FAST, "--wrkdir=x"], ["wrkdir", "workdir"]),
    "a word that is no flag": ([FAST, "resume"], ["'resume' is not a flag"]),
}
PLAIN = ("unknown field", "missing data")


def check(name, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for number in range(40):
        (tmp_path / f"{number}.md").write_text(f"text number {number}, " * 40)
    arguments, words = MISTAKES[name]
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if not any(argument.startswith("--workdir") for argument in filled):
        filled.append(f"--workdir={tmp_path}/run")
    done, seconds = run(*filled, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert_one_sentence(done, *words)
    assert not (tmp_path / "run" / "checkpoints").exists()
    return seconds


@pytest.mark.parametrize("name", PLAIN)
def test_a_mistake_is_one_sentence(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in PLAIN])
def test_every_mistake_is_one_sentence_within_ten_seconds(name, tmp_path):
    assert check(name, tmp_path) < 10
