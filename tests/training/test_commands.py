"""evaluate, generate and report on the folder of a run, as a user calls them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from effarch.training import loop, run_folder, setup

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.ci]


@pytest.fixture(scope="module")
def trained(make_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    plan = setup.prepare(make_tiny())
    run_folder.create(folder, plan.config, data=plan.dataset.fingerprint)
    return folder, loop.Loop(plan, folder).run()


def call(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"effarch.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_evaluate_gives_what_the_run_measured(trained):
    folder, outcome = trained
    done = call("evaluate", f"--run={folder}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["step"] == 12
    assert result["loss"] == pytest.approx(outcome.final["loss"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(outcome.final["bits_per_byte"], rel=1e-6)
    earlier = json.loads(call("evaluate", f"--run={folder}", "--step=8").stdout)
    assert earlier["step"] == 8
    assert earlier["loss"] > result["loss"]


def test_evaluate_rounds_after_training_if_asked(trained):
    """Without rounding as measured; with four bits further from it than with eight."""
    folder, outcome = trained
    loss = {}
    for recipe in ("none", "int8", "nvfp4"):
        done = call("evaluate", f"--run={folder}", f"--recipe={recipe}")
        assert done.returncode == 0, done.stderr
        loss[recipe] = json.loads(done.stdout)["loss"]
    assert loss["none"] == pytest.approx(outcome.final["loss"], rel=1e-6)
    error = {recipe: abs(loss[recipe] - loss["none"]) for recipe in ("int8", "nvfp4")}
    assert 0 < error["int8"] < error["nvfp4"]


def test_generate_streams_one_prompt_and_repeats_with_the_seed(trained):
    folder, _ = trained
    options = (f"--run={folder}", "--max_tokens=12")
    texts = [
        call("generate", *options, "--prompt=the fox", f"--seed={seed}").stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0].startswith("the fox")
    assert len(texts[0]) > len("the fox\n")
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    several = call("generate", *options, "--prompt=the", "--prompt=a lazy dog")
    assert several.returncode == 0, several.stderr
    assert several.stdout.count("===") == 2
    assert "a lazy dog" in several.stdout


def test_report_writes_a_page(trained):
    folder, _ = trained
    done = call("report", str(folder), f"--out={folder / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert (folder / "page.html").read_text().count("<svg") >= 2


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("evaluate", ["--run=nowhere"], "nowhere is not a run folder"),
        ("evaluate", [], "--run is missing"),
        ("evaluate", ["--run={run}", "--recipe=mxfp5"], "mxfp"),
        ("evaluate", ["--run={run}", "--recipe=lsq"], "--recipe=lsq: it keeps statistics or step"),
        ("generate", ["--run={run}", "--top_p=2"], "--top_p=2.0 must be above 0 and at most 1"),
        ("generate", ["--run={run}", "--step=7"], "7"),
        ("report", ["nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(trained, module, arguments, words):
    filled = [argument.replace("{run}", str(trained[0])) for argument in arguments]
    done = call(module, *filled)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
