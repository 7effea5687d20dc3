"""python -m effarch.convert, as a user types it."""

import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
ROOT = DATA.parent.parent


def convert(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "effarch.convert", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.ci
def test_there_and_back(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    source = DATA / "model_qwen3"
    done = convert(f"--from={source}", f"--to={run}", "--config=quickstart")
    assert done.returncode == 0, done.stderr
    assert "attention/glu" in done.stdout and "checkpoint of step 0" in done.stdout
    assert "no tokenizer.json: texts are cut by data.tokenizer=bpe:4096" in done.stdout
    again = convert(f"--from={source}", f"--to={run}", "--config=quickstart")
    assert again.returncode == 2 and "holds a model or a run already" in again.stderr
    done = convert(f"--from={run}", f"--to={out}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "qwen3, bfloat16" in done.stdout
    theirs = safetensors.numpy.load_file(source / "model.safetensors")
    written = safetensors.numpy.load_file(out / "model.safetensors")
    for name, array in theirs.items():
        assert written[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(written[name], array.astype(written[name].dtype))


def test_a_mistake_is_one_sentence(tmp_path):
    done = convert(f"--from={tmp_path}", f"--to={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --from={tmp_path} holds no config.json")
    (tmp_path / "config.json").write_text("{oops")
    done = convert(f"--from={tmp_path}", f"--to={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'config.json'} is damaged")
