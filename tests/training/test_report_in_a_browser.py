"""The report in a headless Chromium: no complaint, and nothing wider than a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest

from effarch.training import report_page, writers

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
PHONE = 390
# Chromium's own windows are no narrower than 500. What scrolls in a box of its own may be wider.
FRAME = """<!DOCTYPE html><body><iframe width="{width}" height="800" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = frames[0].document, edge = page.documentElement.clientWidth;
  const reaches = [...page.body.querySelectorAll("*")].filter((e) => !e.parentNode.closest(".scroll"))
    .map((e) => e.getBoundingClientRect().right);
  document.title = [frames[0].innerWidth, edge, page.documentElement.scrollWidth,
    Math.ceil(Math.max(...reaches))].join(" ");
}};
</script></body>"""


def shown(page, profile) -> tuple[str, list[str]]:
    """The document after loading, and what the console says."""
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    command = [BROWSER, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def run(folder, layers):
    """A run with everything that the page can show."""
    with writers.MetricsWriter(folder, tensorboard=False) as writer:
        for step in range(1, 41):
            parts = {"metric/active_fraction": 0.1, "loss/router_balance": 0.0201 + step * 1e-5}
            clock = {"time/step_seconds": 0.5 + 0.1 * len(layers), "time/tokens_per_second": 1e5}
            costs = {"tokens": 64 * step, "flops_model": 2e9 * len(layers) * step}
            values = {"loss": 2 + 6 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
            writer.write(step, values | parts | costs | clock)
            if step % 8 == 0:
                writer.write(step, {"loss": 2 + 6 / step, "bits_per_byte": 1.5}, kind="eval")
                writer.write(step, {"layers/0/ffn/up/x_error": 0.03}, kind="rounding")
    config = {"model": {"layers": layers}, "data": {"sources": ["files:" + "a_long_path/" * 9]}}
    (folder / "config.json").write_text(json.dumps({"fingerprint": "f" * 16, "config": config}))
    (folder / "expert_load.json").write_text(json.dumps({"0": [0.01] * 64, "1": [0.02] * 64}))
    summary = {"status": "finished", "seconds": 1e5, "params_total": 1234567890, "key_" * 20: 1}
    backends = {"backend/linear_cross_entropy": "pallas_tpu, xla"}
    (folder / "summary.json").write_text(json.dumps(summary | backends))
    (folder / "samples").mkdir()
    (folder / "samples" / "00.txt").write_text("a_word_without_an_end" * 20)
    return folder


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed here; it is no part of a Python environment"
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_page_on_a_phone(tmp_path, number):
    names = ("first", "a_second_run_with_a_name_that_is_long_" * 3, "third")[:number]
    layers = "first: attention/glu; repeat: 3*gated_delta_net/moe + attention/moe"
    folders = [run(tmp_path / name, layers[: 30 + 9 * i]) for i, name in enumerate(names)]
    page = report_page.write_report(folders, tmp_path / "report.html")
    document, complaints = shown(page, tmp_path / "profile")
    assert not complaints
    assert document.count("<svg") == page.read_text().count("<svg") >= 10
    frame = tmp_path / "phone.html"
    frame.write_text(FRAME.format(width=PHONE, page=html.escape(page.read_text())))
    document, complaints = shown(frame, tmp_path / "profile")
    width, edge, content, reach = map(int, re.search(r"<title>([\d ]+)", document)[1].split())
    assert not complaints
    assert width == PHONE and content <= edge and reach <= edge
