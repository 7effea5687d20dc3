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
        means = [_means(table, share) for share in SHARES]
        shown = [experiment_record.ranged(values) if len(values) else "" for values in means]
        rows.append(["mean of the mixers", *shown])
        seeds = [_seeds(table, share) for share in SHARES]
        rows.append(["seeds", *seeds])
        header = ["mixer", *(f"{share} of {MOST}" for share in SHARES)]
        experiment_record.write_table(HERE / "README.md", data, header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(tables, found))


def _cell(table: dict, mixer: str, share: int) -> str:
    values = table.get((mixer, share))
    return experiment_record.ranged(values) if values else ""


def _means(table: dict, share: int) -> np.ndarray:
    """Of the mixers that have every share, over those mixers, for each seed that all of them have."""
    whole = [mixer for mixer in MIXERS if all((mixer, other) in table for other in SHARES)]
    seeds = min((len(table[mixer, other]) for mixer in whole for other in SHARES), default=0)
    return np.array([np.mean([table[mixer, share][i] for mixer in whole]) for i in range(seeds)])


def _seeds(table: dict, share: int) -> str:
    counts = {len(values) for (_, other), values in table.items() if other == share}
    return (
        " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "0"
    )


def _verdict(tables: dict, found: list[dict]) -> str:
    loss, recall = (np.array([_means(tables[data], share) for share in SHARES]) for data in DATA)
    start = f"{experiment_record.effort(found)} "
    if not loss.size or not recall.size:
        return start + "No verdict yet: no mixer has every share."
    hybrids = loss[1:-1]
    spread = hybrids.max(0) / hybrids.min(0) - 1
    pure, few, many = recall[0], recall[1:-1].min(0), recall[1:-1].max(0)
    rises = (np.diff(recall[:-1], axis=0) > -FLAT).all(0)
    least = pure < np.minimum(few, recall[-1])
    best = [(hybrids.min(0) < end).sum() for end in (loss[0], loss[-1])]
    of = f"of {loss.shape[1]} seeds"
    return start + (
        f"**Verdict**, in the means over the mixers. Loss over the hybrid shares differs by "
        f"{_percent(spread)}: {'flat' if spread.max() <= FLAT else 'not flat'} by the claim's 1 %. "
        f"Recall of pure recurrence is {experiment_record.ranged(pure)}, that of hybrids "
        f"{experiment_record.ranged(few)} at the share where it is least and "
        f"{experiment_record.ranged(many)} where it is most; it rises with every further layer of "
        f"attention on {rises.sum()} {of}. Pure recurrence recalls less than any hybrid on "
        f"{(pure < few).sum()} {of}, and less than attention alone as well on {least.sum()}. The best "
        f"hybrid has a lower loss than pure recurrence on {best[0]} and than attention alone on "
        f"{best[1]} {of}."
    )


def _percent(parts: np.ndarray) -> str:
    ends = f" ({100 * parts.min():.1f} to {100 * parts.max():.1f} %)" if len(parts) > 1 else ""
    return f"{100 * parts.mean():.1f} %{ends}"


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
