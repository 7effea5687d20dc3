"""The report: whole, self-contained, safe, and right for runs in every state."""

import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

import effarch.report
from effarch.training import report_figures, report_page, report_runs, writers

_VOID = {"meta", "br", "img", "link", "input", "hr", "base", "source", "wbr"}


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order and collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.loads, self.texts = [], [], [], [], []
        self.rows = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loads += [attributes[n] for n in ("src", "href", "xlink:href") if n in attributes]
        if tag == "tr":
            self.row = []
        if tag in ("td", "th"):
            self.row.append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows[self.row[0]] = self.row[1:]

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.row[-1] += data
        if self.open and self.open[-1] not in ("style", "text"):
            self.texts.append(data)


def _run(folder, steps=40, every_eval=10, offset=0.0, summary=None, config=None, samples=()):
    """A run folder with a loss that falls from 8 towards 2, whose values the tests know."""
    with writers.MetricsWriter(folder, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            loss = 2 + offset + 6 / step
            values = {"loss": loss, "learning_rate": 1e-3, "grad_norm": loss / 2}
            clock = {"time/tokens_per_second": 5000.0, "time/mfu": 0.3, "time/hfu": 0.4}
            writer.write(step, {**values, "tokens": 64 * step, **clock})
            if step % every_eval == 0:
                bits = {"bits_per_byte": loss / 2, "code/bits_per_byte": loss / 4}
                writer.write(step, {"loss": loss, **bits}, kind="eval")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"fingerprint": "f00d", "config": config}))
    for name, text in samples:
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / name).write_text(text)
    return folder


def _page(folders, out):
    path = report_page.write_report(folders, out)
    assert path == out
    return Page(out.read_text(encoding="utf-8"))


_SUMMARY = {
    "status": "finished",
    "params_total": 1234567,
    "params_active": 234567,
    "flops_model": 3.25e15,
    "flops_hw": 4.5e15,
    "backend/attention": "pallas_tpu, xla",
    "device": "1x <GPU>",
    "seconds": 245.0,
    "compile_seconds": 12.5,
    "val/loss": 2.15,
    "val/bits_per_byte": 1.075,
    "val/code/bits_per_byte": 0.5375,
    "gzip_bits_per_byte": 2.5,
    "skipped_steps": 3,
    "resumes": 2,
    "optimizer_state_bytes": 948760,
    "note_of_mine": 17,
}


def test_a_finished_run(tmp_path):
    config = {"train": {"num_steps": 40}, "model": {"width": 64, "layers": "repeat: attention/glu"}}
    samples = [("step_9.txt", "nine"), ("step_10.txt", "ten")]
    run = _run(tmp_path / "run", summary=_SUMMARY, config=config, samples=samples)
    page = _page([run], tmp_path / "page.html")
    assert page.tags.count("svg") == page.tags.count("figure") == 6
    assert page.rows["Validation loss, nats per token"] == ["2.1500"]
    assert page.rows["Bits per byte, code"] == ["0.5375"]
    assert page.rows["Bits per byte of gzip"] == ["2.5000"]
    assert page.rows["Parameters"] == ["1.23M (1,234,567)"]
    assert page.rows["Tokens"] == ["2.56k (2,560)"]
    assert page.rows["Steps"] == ["40 of 40"]
    assert page.rows["Model FLOPs"] == ["3.25e15"]
    assert page.rows["Tokens per second"] == ["5.00k"]
    assert page.rows["Model FLOP utilization"] == ["30.0%"]
    assert page.rows["attention"] == ["pallas_tpu, xla"]
    assert page.rows["Hardware FLOPs"] == ["4.50e15"]
    assert page.rows["Hardware FLOP utilization"] == ["40.0%"]
    assert page.rows["Wall-clock"] == ["4:05"]
    assert page.rows["Compilation"] == ["12.5 s"]
    assert page.rows["Device"] == ["1x <GPU>"]
    assert page.rows["Skipped steps"] == ["3"]
    assert page.rows["Resumed"] == ["2 times"]
    assert page.rows["Config fingerprint"] == ["f00d"]
    assert page.rows["Optimizer state"] == ["949kB"]
    assert page.rows["note_of_mine"] == ["17"]
    texts = "\n".join(page.texts)
    for title in ("Training loss", "Validation loss", "Validation, bits per byte", "Learning rate"):
        assert title in page.texts
    assert {"Gradient norm", "Speed", "code", "gzip 2.500"} <= set(page.texts)
    assert texts.index("step_9.txt") < texts.index("step_10.txt")  # in order, as numbers
    assert '"layers": "repeat: attention/glu"' in texts


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    run = _run(tmp_path / "run", summary=_SUMMARY, config={}, samples=[("a.txt", "text")])
    page = _page([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert all(load.startswith("#") and load[1:] in page.ids for load in page.loads)
    assert len(page.ids) == len(set(page.ids))
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?:|//\w|@import", without_names)
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target[0] == "#" and target[1:] in page.ids
    for name in set(re.findall(r"var\((--\w[\w-]*)\)", text)):
        assert f"{name}:" in text  # every colour and font that the figures use is defined
    assert "#010203" not in text and "#040506" not in text


def test_everything_from_files_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&amp;'
    run = _run(
        tmp_path / "a<b>&run",
        summary={"status": evil, "device": evil, evil: evil, f"val/{evil}/bits_per_byte": 1.0},
        config={evil: evil},
        samples=[("<i>.txt", evil + "\x00\x1b[2J")],
    )
    with writers.MetricsWriter(run, start_step=40, tensorboard=False) as writer:
        writer.write(41, {f"{evil}/bits_per_byte": 1.0}, kind="eval")
        writer.write(42, {f"{evil}/bits_per_byte": 1.0}, kind="eval")
    other = _run(tmp_path / "other", config={evil: "x"})
    for folders in ([run], [run, other]):
        page = _page(folders, tmp_path / "page.html")
        assert "script" not in page.tags
        assert page.texts.count(evil) >= 4
        assert "\x1b" not in (tmp_path / "page.html").read_text()


def test_several_runs_are_compared(tmp_path):
    base = {"model": {"width": 64, "mixer": "attention"}, "seed": 1}
    other = {"model": {"width": 64, "mixer": "kda", "heads": 4}, "seed": 1}
    runs = [
        _run(tmp_path / "attention", config=base, offset=0.25, summary={"params_total": 10}),
        _run(tmp_path / "kda", config=other),
        _run(tmp_path / "short", config=base, steps=20, offset=1.0),
    ]
    page = _page(runs, tmp_path / "page.html")
    assert page.rows[""] == ["attention", "kda", "short"]
    # Losses at the last evaluation: 2.25 + 6/40, 2 + 6/40, 3 + 6/20.
    assert page.rows["Validation loss, nats per token"] == ["2.4000", "2.1500", "3.3000"]
    assert page.rows["Parameters"] == ["10", "", ""]
    assert page.rows["Steps"] == ["40", "40", "20"]
    assert page.rows["model.mixer"] == ["attention", "kda", "attention"]
    assert page.rows["model.heads"] == ["(absent)", "4", "(absent)"]
    assert "seed" not in page.rows and "model.width" not in page.rows
    assert (
        "Lowest in validation: kda with 1.0750 bits per byte, 0.1250 below attention." in page.texts
    )
    text = (tmp_path / "page.html").read_text()
    assert re.findall(r'<td class="best">([\d.]+)', text) == ["2.1500", "1.0750", "0.5375"]
    assert page.tags.count("svg") == 7  # as for one run, and bits per byte of the source apart
    for colour in report_figures.COLOURS[:3]:  # every run is drawn and named in every figure
        assert all(colour in figure for figure in text.split("<figure>")[1:])


def test_a_crashed_run_still_gives_a_page(tmp_path):
    run = _run(tmp_path / "run", config={"train": {"num_steps": 100}})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "ki')
    (run / "summary.json").write_text('{"status": "fin')
    page = _page([run], tmp_path / "page.html")
    assert "unfinished" in page.texts and page.rows["Steps"] == ["40 of 100"]
    assert page.rows["Validation loss, nats per token"] == ["2.1500"]
    assert page.rows["Tokens"] == ["2.56k (2,560)"]
    assert "summary.json does not hold a JSON object and was left out." in page.texts


def test_a_run_that_has_only_begun_gives_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page = _page([tmp_path], tmp_path / "page.html")
    assert "No records yet." in page.texts and "svg" not in page.tags
    _run(tmp_path, steps=1)
    page = _page([tmp_path, tmp_path], tmp_path / "page.html")
    assert page.tags.count("svg") == 4


def test_losses_that_are_not_finite_are_named_and_not_drawn(tmp_path):
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 61):
            writer.write(step, {"loss": math.nan if step in (7, 9) else 3.0, "grad_norm": math.inf})
        writer.write(30, {"loss": 2.5}, kind="eval")
        writer.write(60, {"loss": math.nan}, kind="eval")
    page = _page([tmp_path], tmp_path / "page.html")
    assert page.rows["Losses not finite"] == ["2 first at step 7"]
    assert page.rows["Validation loss, nats per token"] == ["nan best 2.5000 at step 30"]
    assert page.tags.count("svg") == 2
    paths = re.findall(r' d="([^"]*)"', (tmp_path / "page.html").read_text())
    assert paths and not any("nan" in path or "inf" in path for path in paths)


def test_a_page_about_many_records_stays_small(tmp_path):
    random = np.random.default_rng(0)
    folders = []
    for name in ("a", "b"):
        folders.append(tmp_path / name)
        with writers.MetricsWriter(folders[-1], tensorboard=False) as writer:
            for step in range(1, 5001):
                noise = random.standard_normal(3)
                values = {"loss": 3 + noise[0], "grad_norm": math.exp(noise[1])}
                writer.write(step, {**values, "time/tokens_per_second": 1e5 + noise[2]})
    report_page.write_report(folders[:1], tmp_path / "one.html")
    report_page.write_report(folders, tmp_path / "two.html")
    assert 50_000 < (tmp_path / "one.html").stat().st_size < 300_000
    assert (tmp_path / "two.html").stat().st_size < 400_000
    paths = re.findall(r' d="([^"]*)"', (tmp_path / "one.html").read_text())
    assert 500 < max(path.count("L") for path in paths) < 1700


def test_thinning_keeps_ends_and_extremes():
    steps = np.arange(5000.0)
    values = np.sin(steps / 50)
    values[1234], values[4321] = 100.0, -100.0
    thin_steps, thin_values = report_figures.thin(steps, values, 400)
    assert len(thin_steps) <= 402 and np.all(np.diff(thin_steps) > 0)
    assert thin_steps[0] == 0 and thin_steps[-1] == 4999
    assert np.array_equal(thin_values, values[thin_steps.astype(int)])
    assert {1234.0, 4321.0} <= set(thin_steps)
    for got, want in zip(report_figures.thin(steps[:300], values[:300], 400), (steps, values)):
        np.testing.assert_array_equal(got, want[:300])  # few points stay as they are


def test_smoothing_keeps_a_constant_follows_a_ramp_and_averages_noise():
    assert np.allclose(report_figures.smooth(np.full(1000, 3.5)), 3.5)
    # An exponential mean of window w lags w - 1 points behind a ramp: here w = 5000/50.
    ramp = report_figures.smooth(np.arange(5000.0))
    assert ramp[-1] == pytest.approx(4999 - 99, abs=1e-6)
    noise = np.random.default_rng(0).standard_normal(5000)
    # Variance of the mean: 1/(2w - 1).
    assert report_figures.smooth(noise)[1000:].std() == pytest.approx(199**-0.5, rel=0.3)
    assert np.allclose(report_figures.smooth(noise[:30]), noise[:30])


def test_the_steep_start_is_left_out_of_the_frame_and_said(tmp_path):
    run = _run(tmp_path / "run", steps=400)
    page = _page([run], tmp_path / "page.html")
    # Evaluations at 10, 20, ...: those from step 20 (a twentieth) on are in the frame.
    assert "Values up to 2.6 lie above the frame." in page.texts
    assert "Values up to 8 lie above the frame." in page.texts


def test_many_samples_and_long_texts_are_cut(tmp_path):
    samples = [(f"step_{n}.txt", "x" * 10**5 if n == 1 else "y") for n in range(1, 32)]
    run = _run(tmp_path / "run", samples=samples)
    (found,) = report_runs.read_runs([run])
    assert [name for name, _ in found.samples] == [f"step_{n}.txt" for n in range(1, 13)]
    assert found.samples[0][1] == "x" * report_runs.MAX_SAMPLE_CHARACTERS + " [cut here]"
    assert found.notes == ["19 further text samples were left out."]


def test_the_cross_entropy_is_drawn_where_the_loss_holds_more(tmp_path):
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 3.0 + step, "ce": 2.0 + step})
    (panel,) = report_figures.panels(report_runs.read_runs([tmp_path]))
    assert panel.title == "Training cross-entropy"
    assert panel.curves[0].values.tolist() == [3.0, 4.0]


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(ValueError, match=r"gone' does not exist; name the folder of a run\."):
        report_page.write_report([tmp_path / "gone"], tmp_path / "page.html")
    with pytest.raises(
        ValueError, match=r"is not a run folder, because it holds no metrics\.jsonl"
    ):
        report_page.write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(ValueError, match="no run folder was given"):
        report_page.write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = (str(_run(tmp_path / name, steps=3)) for name in ("first", "second"))
    effarch.report.main([first])
    effarch.report.main([first, second])
    effarch.report.main([first, second, "--out=deep/page.html"])
    paths = [f"{first}/report.html", "report.html", "deep/page.html"]
    assert capsys.readouterr().out.split() == paths
    assert all((tmp_path / path).stat().st_size > 10_000 for path in paths)
    with pytest.raises(SystemExit) as stopped:
        effarch.report.main(["gone"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "run folder 'gone' does not exist" in error


def test_importing_the_report_loads_no_matplotlib_and_no_jax():
    program = "import sys, effarch.report; print({'matplotlib', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_load_of_experts_is_drawn(tmp_path):
    """Two layers of 8 experts: one even but for an expert with all of another's tokens."""
    load = {"3": [0.125] * 8, "10": [0.25, 0.0, *[0.125] * 6]}
    run = _run(tmp_path / "run")
    (run / "expert_load.json").write_text(json.dumps(load))
    page = _page([run], tmp_path / "page.html")
    said = next(text for text in page.texts if "Tokens of an expert" in text)
    assert "Most: 2.00, expert 0 of layer 10. Without tokens: 1 of 16." in said
    pictures = [load for load in page.loads if not load.startswith("#")]
    assert pictures and all(load.startswith("data:image/png;base64,") for load in pictures)
    cells = _pixels(next(p for p in pictures if _pixels(p).shape[:2] == (2, 8)))
    assert len(np.unique(cells[0], axis=0)) == 1  # even
    assert len(np.unique(cells[1], axis=0)) == 3
    assert cells[1, 0, 0] > cells[1, 0, 2] and cells[1, 1, 2] > cells[1, 1, 0]  # warm, cold
    (run / "expert_load.json").write_text('{"a": 3}')
    page = _page([run], tmp_path / "page.html")
    assert any("does not hold the load of experts" in text for text in page.texts)


def _pixels(address):
    import base64
    import io

    import matplotlib.image

    return matplotlib.image.imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))
