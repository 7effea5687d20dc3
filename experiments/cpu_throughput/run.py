"""Train-step speed on this CPU: effarch against Hugging Face transformers in PyTorch, interleaved.

    pip install -e '.[peers]'
    python experiments/cpu_throughput/run.py                       # every case: about 25 minutes
    python experiments/cpu_throughput/run.py --cases llama:float32:256 hybrid:float32:1024

Both sides of a case live in processes of their own and take turns, round by round; the ratio is that
of the medians. Results of other cases that are in the file already stay.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys

import shapes

from effarch import experiment_record

HERE = pathlib.Path(__file__).resolve().parent
SIDES = ("torch", "effarch")
CASES = [
    *(f"llama:{dtype}:{T}" for dtype in ("float32", "bfloat16") for T in (256, 1024, 4096)),
    *(f"hybrid:{dtype}:{T}" for dtype in ("float32", "bfloat16") for T in (256, 1024, 4096)),
]
BARS = {
    "llama:float32": {256: 0.85, 1024: 0.75, 4096: 0.7},
    "llama:bfloat16": {256: 0.75, 1024: 0.55, 4096: 0.5},
    "hybrid:float32": dict.fromkeys((256, 1024, 4096), 1.3),
    "hybrid:bfloat16": dict.fromkeys((256, 1024, 4096), 1.3),
}
ROUND_SECONDS = 8.0


class Side:
    """A worker that is ready to make steps."""

    def __init__(self, side: str, case: str):
        command = [sys.executable, str(HERE / "worker.py"), side, case]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.parameters = int(self._answer().split()[1])
        self.steps = 1
        self.steps = max(1, round(ROUND_SECONDS / self.seconds()))

    def seconds(self) -> float:
        """Seconds of a step, the mean of a round."""
        self._process.stdin.write(f"{self.steps}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._process.args[1:])} ended; its error stands above.")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="+", default=CASES, type=lambda text: str(shapes.parse(text))
    )
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    path = HERE / "results/runs.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for case in arguments.cases:
        results[case] = measure(case, arguments.rounds)
        print(case, json.dumps(results[case]), flush=True)
        experiment_record.write_json(path, results)
    write_readme(results)


def measure(case: str, rounds: int) -> dict:
    """Median tokens/s of both sides over interleaved rounds."""
    sides = {name: Side(name, case) for name in SIDES}
    seconds = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.seconds())
    for side in sides.values():
        side.close()
    found = {name: shapes.TOKENS / statistics.median(times) for name, times in seconds.items()}
    per_round = [theirs / ours for theirs, ours in zip(seconds["torch"], seconds["effarch"])]
    return {
        **{f"{name}_tokens_per_second": rate for name, rate in found.items()},
        **{f"{name}_parameters": side.parameters for name, side in sides.items()},
        "ratio": found["effarch"] / found["torch"],
        "ratio_per_round": per_round,
    }


def write_readme(results: dict) -> None:
    """The table, and which bars are met."""
    rows, missed = [], []
    for case in filter(results.__contains__, CASES):
        found, parsed = results[case], shapes.parse(case)
        bar = BARS[f"{parsed.model}:{parsed.dtype}"][parsed.seq_len]
        if found["ratio"] < bar:
            missed.append(f"{case} ({found['ratio']:.2f} < {bar})")
        spread = f"{min(found['ratio_per_round']):.2f}-{max(found['ratio_per_round']):.2f}"
        rates = [f"{found[f'{side}_tokens_per_second']:.0f}" for side in SIDES]
        rows.append([*case.split(":"), *rates, f"**{found['ratio']:.2f}**", spread, bar])
    header = ["model", "numbers", "T", "PyTorch tokens/s", "effarch tokens/s"]
    header += ["ratio", "over the rounds", "bar"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)
    verdict = f"Missed: {'; '.join(missed)}." if missed else "Every bar is met."
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    experiment_record.write_text(
        HERE / "README.md", "verdict", f"**Verdict** ({machine}). {verdict}"
    )


if __name__ == "__main__":
    main()
