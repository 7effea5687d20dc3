"""Fits a scaling law to a CSV file of runs and prints the result as JSON.

python -m effarch.scaling --csv=runs.csv --law=chinchilla [--bootstrap=300] [--delta=1e-3]
"""

import argparse
import json
from collections.abc import Sequence

from effarch import names
from effarch.scaling import bootstrap, fits, laws, tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, fits and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m effarch.scaling", description="Fits a scaling law to a CSV file of runs."
    )
    parser.add_argument("--csv", required=True, help="a header line, then a line for each run")
    parser.add_argument("--law", default="chinchilla", help=", ".join(laws.LAWS))
    parser.add_argument(
        "--delta", type=float, default=1e-3, help="where Huber's loss turns linear; 0: squares"
    )
    parser.add_argument("--starts", type=int, default=24, help="starting points of the fit")
    parser.add_argument("--bootstrap", type=int, default=0, help="refits for standard errors")
    flags = parser.parse_args(arguments)
    try:
        print(json.dumps(_fit(flags), indent=1))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _fit(flags: argparse.Namespace) -> dict:
    law = names.lookup(laws.LAWS, flags.law, "--law")
    table = tables.read_csv(flags.csv)
    options = fits.Options(delta=flags.delta or None)
    found = fits.fit(law, table, options, num_starts=flags.starts)
    result = {
        "law": law.name,
        "columns": [*law.inputs, law.output],
        "delta": options.delta,
        "params": found.params,
        "objective": found.objective,
        "runs": found.num_runs,
        "starts_agreeing": f"{found.num_agreeing} of {found.num_starts}",
    }
    if flags.bootstrap:
        refits = bootstrap.bootstrap(found, table, resamples=flags.bootstrap)
        result |= {"se": refits.se(), "interval_95": refits.interval()}
    return result


if __name__ == "__main__":
    main()
