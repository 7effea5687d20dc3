"""Which mixer recalls how many pairs at which size of its state: trains what is missing, then writes.

    python experiments/mqar_state_size/run.py --seeds=2 --parallel=1

Finished runs in --runs are kept. The order of the runs makes every beginning of them a result: all
mixers at the middle state size, then the other sizes, then the next seed. Tables, figure and verdict
come from whatever is finished; --write_only trains nothing.
"""

import collections
import pathlib

import numpy as np

from effarch import experiment_record, experiment_runs, sweeps

HERE = pathlib.Path(__file__).resolve().parent
RECURRENT = ("kda", "gated_delta_net", "delta_net", "gla", "mamba2", "retnet")
HEAD_DIMS = (16, 32, 8)
HEADS = 2
PAIRS = (4, 8, 16)
CLAIMS = (("kda", "gla"), ("gated_delta_net", "gla"), ("delta_net", "gla"))
CLAIMS += (("gla", "mamba2"), ("gla", "retnet"))
"""(higher, lower) accuracy at every state size, from the published results."""
TIE = 0.01
"""Accuracies nearer than this count as equal."""


def grid(seeds: int) -> sweeps.Runs:
    """Every run as {mixer, head_dim, seed}, the most telling first."""
    return sweeps.chain(
        *(
            part
            for seed in range(seeds)
            for part in (
                sweeps.product(
                    {"head_dim": HEAD_DIMS[:1], "mixer": ("attention", *RECURRENT), "seed": [seed]}
                ),
                sweeps.product({"head_dim": HEAD_DIMS[1:], "mixer": RECURRENT, "seed": [seed]}),
            )
        )
    )


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/mqar_state_size", seeds=2)
    options = flags.parse_args()
    cells = {"{mixer}-{head_dim}-seed{seed}".format(**cell): cell for cell in grid(options.seeds)}
    found = [
        cell | _figures(summary)
        for cell, _, summary in experiment_runs.finished(cells, _flags, options)
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)
        _draw(found)


def _flags(mixer: str, head_dim: int, seed: int) -> list[str]:
    return [
        *experiment_runs.flags("tasks", seed, task="mqar", mixer=mixer, head_dim=head_dim),
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=0",
        "--config.log.tensorboard=false",
    ]


def _figures(summary: dict) -> dict:
    names = {"accuracy": "accuracy"} | {f"{num}": f"{num}_pairs/accuracy" for num in PAIRS}
    return {name: summary[f"val/{key}"] for name, key in names.items()} | {
        "seconds": summary["seconds"],
        "params": summary["params_total"],
        "steps": summary["steps"],
    }


def _table(found: list[dict], name: str = "accuracy") -> dict[tuple[str, int], list[float]]:
    """(mixer, head_dim) -> the figure of every seed."""
    cells = collections.defaultdict(list)
    for run in found:
        cells[run["mixer"], run["head_dim"]].append(run[name])
    return cells


def state_size(mixer: str, head_dim: int) -> int:
    """Numbers that the mixer carries along: the recurrent state, or keys and values of 64 tokens."""
    return 2 * HEADS * head_dim * 64 if mixer == "attention" else HEADS * head_dim**2


def _write(found: list[dict]) -> None:
    cells = {name: _table(found, name) for name in ("accuracy", *map(str, PAIRS))}
    rows = []
    for mixer in ("attention", *RECURRENT):
        for head_dim in sorted(HEAD_DIMS):
            if values := cells["accuracy"].get((mixer, head_dim)):
                by_pairs = [
                    experiment_record.ranged(cells[str(num)][mixer, head_dim]) for num in PAIRS
                ]
                size = f"{state_size(mixer, head_dim):,}"
                rows.append([mixer, size, experiment_record.ranged(values), *by_pairs, len(values)])
    header = [
        "mixer",
        "numbers in the state",
        "accuracy",
        *(f"{num} pairs" for num in PAIRS),
        "seeds",
    ]
    experiment_record.write_table(HERE / "README.md", "accuracy", header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(cells["accuracy"], found))


def _verdict(cells: dict, found: list[dict]) -> str:
    mean = {cell: float(np.mean(values)) for cell, values in cells.items()}
    holds, fails = [], []
    for higher, lower in CLAIMS:
        for head_dim in sorted(HEAD_DIMS):
            if {(higher, head_dim), (lower, head_dim)} <= mean.keys():
                gap = mean[higher, head_dim] - mean[lower, head_dim]
                (holds if gap > -TIE else fails).append((higher, lower, head_dim, gap))
    if not holds and not fails:
        return f"{len(found)} runs. No verdict yet: no two mixers to compare at equal state size."
    grows = [
        (mixer, small, large)
        for mixer in RECURRENT
        for small, large in zip(sorted(HEAD_DIMS), sorted(HEAD_DIMS)[1:])
        if {(mixer, small), (mixer, large)} <= mean.keys()
    ]
    grown = [cell for cell in grows if mean[cell[0], cell[2]] > mean[cell[0], cell[1]] - TIE]
    attention = [value for (mixer, _), value in mean.items() if mixer == "attention"]
    best = max((value for (mixer, _), value in mean.items() if mixer != "attention"), default=None)
    parts = [
        f"{experiment_record.effort(found)} "
        f"**Verdict.** Of the {len(holds) + len(fails)} orders expected at equal state size "
        f"{len(holds)} are found, ties within {TIE} included."
    ]
    if fails:
        worst = "; ".join(
            f"{high} {-gap:.3f} below {low} at {state_size(high, head_dim):,} numbers"
            for high, low, head_dim, gap in fails
        )
        parts.append(f"Against expectation: {worst}.")
    if attention and best is not None:
        relation = "above every" if attention[0] > best + TIE else "not above every"
        parts.append(
            f"Attention reaches {attention[0]:.3f}, {relation} recurrent mixer ({best:.3f})."
        )
    if grows:
        parts.append(f"A larger state recalls more in {len(grown)} of {len(grows)} steps of size.")
    return " ".join(parts)


def _draw(found: list[dict]) -> None:
    path = HERE / "figures/accuracy.png"
    with experiment_record.panels(path, len(PAIRS), size=(11, 3.6), sharey=True) as axes:
        for panel, num in zip(axes, PAIRS):
            _draw_panel(panel, num, _table(found, str(num)))
        axes[0].set_ylabel("accuracy")
        axes[-1].legend(frameon=False, fontsize=8)


def _draw_panel(panel, num: int, cells: dict) -> None:
    for mixer in ("attention", *RECURRENT):
        points = sorted((state_size(m, k), np.mean(v)) for (m, k), v in cells.items() if m == mixer)
        if points:
            panel.plot(*zip(*points), marker="o", ms=4, label=mixer)
    panel.set(xscale="log", title=f"{num} pairs", xlabel="numbers in the state", ylim=(0, 1.02))
    panel.minorticks_off()
    sizes = [state_size("", head_dim) for head_dim in sorted(HEAD_DIMS)]
    panel.set_xticks(sizes, labels=map(str, sizes))


if __name__ == "__main__":
    main()
