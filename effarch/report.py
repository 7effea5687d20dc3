"""Writes an HTML page about finished, running or crashed runs.

python -m effarch.report RUN [RUN...] [--out=FILE]
"""

import argparse
import pathlib
from collections.abc import Sequence

from effarch.training import report_page


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, writes the page and prints its path."""
    parser = argparse.ArgumentParser(
        prog="python -m effarch.report",
        description="Writes one HTML page about a run, or comparing several.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page; default: report.html in the folder of the run, or here for several runs",
    )
    flags = parser.parse_args(arguments)
    folder = pathlib.Path(flags.runs[0]) if len(flags.runs) == 1 else pathlib.Path()
    try:
        print(report_page.write_report(flags.runs, flags.out or folder / "report.html"))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
