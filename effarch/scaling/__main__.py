"""Fits a scaling law to a CSV file of runs and prints the result as JSON.

python -m effarch.scaling --csv=runs.csv --law=chinchilla [--bootstrap=300] [--delta=1e-3]

The file of a sweep has other names for what a law calls params, tokens and loss:

python -m effarch.scaling --csv=runs/sweep-ladder-attention/results.csv \\
    --columns=params=params_matmul,loss=val/loss,flops=flops_6nd --at=params=7e9,tokens=1.4e11
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from effarch import names
from effarch.scaling import bootstrap, fits, laws, tables

FLOPS = "flops"
"""The column by which the largest runs are held out; 6 N D where there is none."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, fits and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m effarch.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--csv", required=True, help="a header line, then a line for each run")
    parser.add_argument("--law", default="chinchilla", help=", ".join(laws.LAWS))
    parser.add_argument(
        "--columns", default="", help="NAME=COLUMN,... where the file's names are not the law's"
    )
    parser.add_argument(
        "--delta", type=float, default=1e-3, help="where Huber's loss turns linear; 0: squares"
    )
    parser.add_argument("--starts", type=int, default=24, help="starting points of the fit")
    parser.add_argument(
        "--bootstrap", type=int, default=0, help="refits for standard errors and bands; 0: none"
    )
    parser.add_argument("--at", default="", help="NAME=VALUE,...: predicts the loss of such a run")
    flags = parser.parse_args(arguments)
    try:
        print(json.dumps(_fit(flags), indent=1))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _fit(flags: argparse.Namespace) -> dict:
    law = names.lookup(laws.LAWS, flags.law, "--law")
    if flags.starts < 1 or flags.bootstrap == 1 or flags.bootstrap < 0:
        raise ValueError(
            f"--starts={flags.starts} must be at least 1, and --bootstrap={flags.bootstrap} 0 (none) or "
            "at least 2."
        )
    at = _predicted_run(law, flags.at)
    columns = {name: name for name in (*law.inputs, law.output)}
    given = names.pairs(flags.columns, "--columns")
    names.refuse_unknown(given, (*columns, FLOPS), "--columns")
    table = tables.read_csv(flags.csv)
    columns |= ({FLOPS: FLOPS} if FLOPS in table else {}) | given
    table, dropped = _complete(_named(table, columns), columns)
    options = fits.Options(delta=flags.delta or None)
    found = fits.fit(law, table, options, num_starts=flags.starts)
    result = {
        "law": law.name,
        "columns": columns,
        "delta": options.delta,
        "params": found.params,
        "objective": found.objective,
        "runs": found.num_runs,
        "dropped": dropped,
        "starts_agreeing": f"{found.num_agreeing} of {found.num_starts}",
        "leave_largest_out": _leave_largest_out(law, table, options, flags.starts),
    }
    if at:
        result["prediction"] = {**at, law.output: float(found.predict(_rows(at))[0])}
    if flags.bootstrap:
        refits = bootstrap.bootstrap(found, table, resamples=flags.bootstrap)
        result |= {"se": refits.se(), "interval_95": refits.interval()}
        if at:
            result["prediction"]["band_95"] = [float(end[0]) for end in refits.band(_rows(at))]
    return result


def _named(table: tables.Table, columns: dict[str, str]) -> dict[str, np.ndarray]:
    """The columns that a fit uses, by the law's names."""
    for column in columns.values():
        names.lookup(table, column, "--columns: column")
    return {name: tables.numbers(table, column) for name, column in columns.items()}


def _complete(table: tables.Table, columns: dict[str, str]) -> tuple[tables.Table, list[str]]:
    """The runs without empty cells, and what was left out and why."""
    is_empty = np.isnan(np.stack([table[name] for name in columns], axis=1))
    whole = ~is_empty.any(axis=1)
    dropped = [
        f"run {row + 1}: no {', '.join(np.array(list(columns.values()))[is_empty[row]])}"
        for row in np.flatnonzero(~whole)
    ]
    return tables.take(table, whole), dropped


def _leave_largest_out(law: laws.Law, table, options: fits.Options, starts: int) -> dict | str:
    """The error on the largest runs, or why there is none."""
    sizes = [name for name in law.inputs if name.startswith("params")]
    if FLOPS not in table and sizes and "tokens" in law.inputs:
        table = {**table, FLOPS: 6 * table[sizes[0]] * table["tokens"]}
    try:
        return fits.leave_largest_out(law, table, options, num_starts=starts)
    except ValueError as error:
        return f"not possible: {error}"


def _predicted_run(law: laws.Law, text: str) -> dict[str, float]:
    """`--at` as numbers, one for each input of the law; {} if it is not given."""
    found = {}
    for name, value in names.pairs(text, "--at").items():
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--at: {name}={value!r} is not a number.") from None
    names.refuse_unknown(found, law.inputs, "--at")
    if missing := [name for name in law.inputs if found and not found.get(name, 0) > 0]:
        raise ValueError(
            f"--at needs {missing[0]} above 0; {law.name} takes {', '.join(law.inputs)}."
        )
    return found


def _rows(run: dict[str, float]) -> dict[str, np.ndarray]:
    return {name: np.array([value]) for name, value in run.items()}


if __name__ == "__main__":
    main()
