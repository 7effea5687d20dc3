"""The report in a headless Chromium: no complaint, and nothing wider than a phone."""

import re
import shutil
import subprocess

import pytest

from effarch.training import report_page, writers

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
PHONE = "390,844"
MEASURE = (
    "<script>document.title = innerWidth + ' ' + document.documentElement.scrollWidth</script>"
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def shown(page, profile) -> tuple[str, list[str]]:
    """The document after loading, and what the console says."""
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    window = (f"--user-data-dir={profile}", f"--window-size={PHONE}")
    command = [BROWSER, *flags, *window, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed here; it is no part of a Python environment"
)
def test_two_runs_on_a_phone(tmp_path):
    folders = [tmp_path / name for name in ("first", "a_second_run_with_a_name_that_is_long_" * 3)]
    for folder in folders:
        with writers.MetricsWriter(folder, tensorboard=False) as writer:
            for step in range(1, 41):
                writer.write(step, {"loss": 2 + 6 / step, "learning_rate": 1e-3})
    page = report_page.write_report(folders, tmp_path / "report.html")
    document, complaints = shown(page, tmp_path / "profile")
    assert not complaints
    assert "2 runs compared" in document and document.count("<svg") >= 2
    text = page.read_text()
    assert (
        len(POLICY.findall(text)) == 1
    )  # no script runs in the page; in this copy one measures it
    page.write_text(POLICY.sub("", text).replace("</body>", f"{MEASURE}</body>"))
    document, complaints = shown(page, tmp_path / "profile")
    width, content = map(int, re.search(r"<title>(\d+) (\d+)", document).groups())
    assert not complaints and width <= 500 and content <= width
