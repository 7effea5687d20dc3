"""Loss on text and recall against the share of full attention: trains what is missing, then writes.

    python experiments/hybrid_ratio/run.py --seeds=1 --parallel=1

Finished runs in --runs are kept. The order of the runs makes every beginning of them a result: first
attention alone and one mixer at every share, then mixer by mixer, then the next seed. Tables, figure and
verdict come from whatever is finished; --write_only trains nothing.
"""

import collections
import pathlib

import grid
import numpy as np

from effarch import experiment_record, experiment_runs

HERE = pathlib.Path(__file__).resolve().parent
DATA = {"text": "bits_per_byte", "recall": "accuracy"}
FLAT = 0.01
"""Losses within this of the best share's, as a part of it, count as equal."""
SHARES = sorted(grid.STACKS)
MOST = SHARES[-1]
MIXERS = ("gated_delta_net", "gla", "delta_net", "hgrn2", "retnet", "hgrn")
"""In the order of training."""


def cells(seeds: int) -> list[dict]:
    """Every run; attention alone stands for all mixers at the largest share."""
    pairs = [(MIXERS[0], MOST), *((mixer, share) for mixer in MIXERS for share in SHARES[:-1])]
    return [
        {"mixer": mixer, "attention": share, "data": data, "seed": seed}
        for seed in range(seeds)
        for mixer, share in pairs
        for data in DATA
    ]


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/hybrid_ratio", seeds=1)
    options = flags.parse_args()
    named = {"{data}-{mixer}-{attention}-seed{seed}".format(**x): x for x in cells(options.seeds)}
    found = [
        cell | _figures(cell, summary)
        for cell, _, summary in experiment_runs.finished(named, _flags, options)
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        tables = {data: _table(found, data) for data in DATA}
        _write(tables, found)
        _draw(tables)


def _flags(seed: int, **switches) -> list[str]:
    return experiment_runs.flags(HERE / "grid.py", seed, **switches)


def _figures(cell: dict, summary: dict) -> dict:
    figures = {name: summary[name] for name in ("params_total", "steps", "seconds")}
    return {"value": summary[f"val/{DATA[cell['data']]}"], **figures}


def _table(found: list[dict], data: str) -> dict[tuple[str, int], list[float]]:
    """(mixer, attention layers) -> the figure of every seed; attention alone counts for every mixer."""
    table = collections.defaultdict(list)
    for run in found:
        if run["data"] == data:
            mixers = MIXERS if run["attention"] == MOST else (run["mixer"],)
            for mixer in mixers:
                table[mixer, run["attention"]].append(run["value"])
    return table


def _write(tables: dict, found: list[dict]) -> None:
    for data, table in tables.items():
        rows = [
            [mixer, *(_cell(table, mixer, share) for share in SHARES)]
            for mixer in MIXERS
            if any((mixer, share) in table for share in SHARES[:-1])
        ]
        means = [_mean(table, share) for share in SHARES]
        rows.append(["mean of the mixers", *(f"{x:.3f}" if x is not None else "" for x in means)])
        seeds = [_seeds(table, share) for share in SHARES]
        rows.append(["seeds", *seeds])
        header = ["mixer", *(f"{share} of {MOST}" for share in SHARES)]
        experiment_record.write_table(HERE / "README.md", data, header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(tables, found))


def _cell(table: dict, mixer: str, share: int) -> str:
    values = table.get((mixer, share))
    return experiment_record.ranged(values) if values else ""


def _mean(table: dict, share: int) -> float | None:
    """Over the mixers that have every share."""
    whole = [mixer for mixer in MIXERS if all((mixer, other) in table for other in SHARES)]
    return float(np.mean([np.mean(table[mixer, share]) for mixer in whole])) if whole else None


def _seeds(table: dict, share: int) -> str:
    counts = {len(values) for (_, other), values in table.items() if other == share}
    return (
        " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "0"
    )


def _verdict(tables: dict, found: list[dict]) -> str:
    loss, recall = ([_mean(tables[data], share) for share in SHARES] for data in DATA)
    start = f"{experiment_record.effort(found)} "
    if None in loss or None in recall:
        return start + "No verdict yet: no mixer has every share."
    hybrids = loss[1:-1]
    spread = max(hybrids) / min(hybrids) - 1
    steps = np.diff(recall[:-1])
    largest = int(np.argmax(steps))
    rises = all(step > -FLAT for step in steps)
    ends = {"pure recurrence": loss[0], "attention alone": loss[-1]}
    beaten = [name for name, end in ends.items() if min(hybrids) < end]
    return start + (
        f"**Verdict.** Loss over the hybrid shares differs by {100 * spread:.1f}% in the mean of the "
        f"mixers: {'flat' if spread <= FLAT else 'not flat'} by the claim's 1%. Recall "
        f"{'rises' if rises else 'does not rise steadily'} with the share, from {recall[0]:.3f} "
        f"(pure) over {recall[1]:.3f} to {recall[-2]:.3f}, most between {SHARES[largest]} and "
        f"{SHARES[largest + 1]} layers of attention; pure recurrence "
        f"{'recalls least' if recall[0] == min(recall) else 'does not recall least'}. The best hybrid "
        f"share has a lower loss than {' and '.join(beaten) or 'neither end'}."
    )


def _draw(tables: dict) -> None:
    labels = {"text": "bits per byte of held-out text", "recall": "accuracy of recall"}
    with experiment_record.panels(HERE / "figures/ratio.png", 2, size=(10, 3.8)) as axes:
        for panel, (data, table) in zip(axes, tables.items()):
            for mixer in MIXERS:
                points = [(s, np.mean(table[mixer, s])) for s in SHARES if (mixer, s) in table]
                if len(points) > 1:
                    panel.plot(*zip(*points), marker="o", ms=4, label=mixer)
            across = f"layers of full attention of {MOST}"
            panel.set(xlabel=across, xticks=SHARES, ylabel=labels[data])
        if axes[0].lines:
            axes[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
