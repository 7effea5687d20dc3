"""Compiles the shipped configs for machines that are not here: python experiments/compile_table/run.py

Writes results/table.json and the table of README.md, a row as soon as it is done, smallest first. One
to five minutes a row on two cores. `--only=TEXT` compiles the rows whose command holds TEXT and keeps
the others as they are. Needs the extra `aot`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from effarch import experiment_record
from effarch.aot import report
from effarch.configs import hybrids
from effarch.training import formatting

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results/table.json"
LARGE = (  # the shape of Llama 3 70B, arXiv 2407.21783, table 3
    "transformer:size=1.3b --config.name=transformer-70b --config.model.width=8192 "
    "--config.model.depth=80 --config.model.blocks.attention.num_heads=64 "
    "--config.model.blocks.attention.num_kv_heads=8 --config.model.blocks.glu.hidden=28672 "
    "--config.model.vocab_size=128256 --config.data.batch_size=4096"
)
FP8 = (
    "--config.name=transformer-1.3b-fp8 --config.quantization.recipe=fp8_current "
    "--config.quantization.native=true"
)
PLAIN = " --kernels=xla"
HYBRIDS = tuple(
    (f"hybrids:model={model},size={size}", target)
    for size, target in (("340m --config.train.accumulate=4", "v6e:4x4"), ("1.3b", "v5p:4x4x4"))
    for model in hybrids.MODELS
)
ROWS = (  # config with overrides, target
    ("quickstart", "v5e"),
    ("quickstart", "h100"),
    ("transformer:size=50m --config.train.accumulate=8", "v5e:2x2"),
    ("gated_deltanet:size=50m --config.train.accumulate=8", "v5e:2x2"),
    ("transformer:size=340m --config.train.accumulate=16", "a100:1x1x8"),
    ("transformer:size=340m --config.train.accumulate=16", "h100"),
    ("transformer:size=340m --config.train.accumulate=8", "b200"),
    ("gated_deltanet:size=340m --config.train.accumulate=32", "h100"),
    ("gated_deltanet:size=340m --config.train.accumulate=4", "v6e:4x4"),
    ("gated_deltanet:size=1.3b", "h100:1x1x8"),
    ("gated_deltanet:size=1.3b", "h100:1x8x8"),
    ("gated_deltanet:size=1.3b,layers=hybrid", "h100:1x8x8"),
    ("transformer:size=1.3b", "h100:1x8x8"),
    ("transformer:size=1.3b", "v5p:4x4x4"),
    ("gated_deltanet:size=1.3b", "v5p:4x4x4"),
    ("gated_deltanet:size=1.3b", "v6e:8x8"),
    *(
        (f"{config}{kernels}", "v6e:8x8")
        for config in ("transformer:size=1.3b", "gated_deltanet:size=1.3b,layers=hybrid")
        for kernels in ("", PLAIN)
    ),
    ("gated_deltanet:size=1.3b", "tpu7x:2x2x4"),
    (f"transformer:size=1.3b {FP8}", "h100:1x1x8"),
    (f"transformer:size=1.3b {FP8}", "tpu7x:2x2x4"),
    *HYBRIDS,
    ("moe:size=mixtral --config.mesh.expert=8 --config.train.accumulate=2", "v5p:4x4x4"),
    (LARGE, "v5p:16x16x16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for config, target in ROWS:
        command = f"--config={config} --target={target}"
        if only in command:
            found[command] = _compile(command)
            experiment_record.write_json(RESULTS, found)
            _write_table(found)


def _compile(command: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "effarch.compile", "--json", *command.split()],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env=os.environ,
        check=False,
    )
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{command}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def _write_table(found: dict[str, dict]) -> None:
    ordered = [f"--config={config} --target={target}" for config, target in ROWS]
    lines = [
        _row(found[command], "plain" if PLAIN in command else "")
        for command in ordered
        if command in found
    ]
    names = [
        *("config", "target", "kernels", "parameters", "tokens a step", "HBM a device", "bound by"),
        *("compute / HBM / network", "estimate", "MFU", "FP8 products", "compile"),
    ]
    experiment_record.write_table(HERE / "README.md", "compile", names, lines)


def _row(one: dict, kernels: str) -> list[str]:
    held = one["memory"]
    share = f"{report.gib(held['total'])} of {report.gib(held['capacity'])}"
    cells = [
        one["name"],
        one["target"],
        kernels,
        formatting.count(one["params"]),
        f"{one['tokens']:,}",
        share if held["fits"] else f"does not fit: {share}",
    ]
    if one["seconds"] is None:
        return [*cells, *[""] * 5, formatting.duration(one["compile_seconds"])]
    floors = " / ".join(report.milliseconds(seconds) for seconds in one["floors"].values())
    return [
        *cells,
        one["bound"],
        floors,
        report.milliseconds(one["seconds"]),
        f"{one['mfu']:.1%}",
        _fp8_share(one.get("products")),
        formatting.duration(one["compile_seconds"]),
    ]


def _fp8_share(products: dict | None) -> str:
    """Of the products outside of kernels; empty where none is FP8."""
    found = products or {}
    small = sum(number for types, number in found.items() if types.count("f8") == 2)
    return f"{small} of {sum(found.values())}" if small else ""


if __name__ == "__main__":
    main()
