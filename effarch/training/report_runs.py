"""What a run folder says about its run: the records, the summary, the config and the text samples.

Only `metrics.jsonl` must exist. A run that goes on, or that crashed, has no summary; what it would
say is then taken from the records. A file that cannot be read is left out and named in `notes`.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from effarch.training import writers

LOAD = "expert_load.json"
BACKEND = "backend/"
"""What the summary calls the backend of an operation begins so."""
MAX_SAMPLES = 12
MAX_SAMPLE_CHARACTERS = 6000
_SHARES = ("accuracy", "exact_match")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, as read from its folder."""

    name: str
    train: list[dict]
    evals: list[dict]
    rounding: list[dict]
    """What rounding did to each layer: `rounding_metrics`."""
    summary: dict
    config: dict
    fingerprint: str
    expert_load: dict[int, list[float]]
    """The share of the choices that each expert of a layer had lately, by layer."""
    samples: list[tuple[str, str]]
    """(file name, text), in the order of the names, numbers as numbers."""
    notes: list[str]
    """Sentences about files that could not be read or were cut."""
    analyses: dict[str, dict] = dataclasses.field(default_factory=dict)
    """What `effarch.analysis` found, by name."""

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.train + self.evals), default=0)

    @property
    def total_steps(self) -> int | None:
        train = self.config.get("train")
        steps = train.get("num_steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def sources(self) -> list[str]:
        """The validation sources whose bits per byte are known, in the order of first mention."""
        names = [name for record in self.evals for name in record]
        names += [name.removeprefix("val/") for name in self.summary if name.startswith("val/")]
        ending = "/bits_per_byte"
        return list(dict.fromkeys(name.removesuffix(ending) for name in names if ending in name))

    @property
    def shares(self) -> list[str]:
        """The validation figures that are shares of what was scored, 0 to 1, by first mention."""
        names = [name for record in self.evals for name in record]
        names += [name.removeprefix("val/") for name in self.summary if name.startswith("val/")]
        return [x for x in dict.fromkeys(names) if x.rpartition("/")[2] in _SHARES]

    def final(self, name: str) -> float | None:
        """A validation figure at the end: from the summary, else from the last record with it."""
        if is_number(self.summary.get(f"val/{name}")):
            return self.summary[f"val/{name}"]
        _, values = series(self.evals, name)
        return float(values[-1]) if len(values) else None

    def best(self, name: str) -> tuple[float, int] | None:
        """The lowest finite validation figure and its step."""
        steps, values = series(self.evals, name)
        finite = np.isfinite(values)
        if not finite.any():
            return None
        index = int(np.argmin(np.where(finite, values, np.inf)))
        return float(values[index]), int(steps[index])

    def figure(self, name: str) -> float | None:
        """A figure of the summary; without a summary the last training record's."""
        if is_number(self.summary.get(name)):
            return self.summary[name]
        _, values = series(self.train, name)
        return float(values[-1]) if len(values) else None

    def typical(self, name: str) -> float | None:
        """A speed: of the summary, else the median over the training records."""
        if is_number(self.summary.get(name)):
            return self.summary[name]
        _, values = series(self.train, f"time/{name}")
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None


def read_runs(
    folders: Sequence[str | os.PathLike], names: Sequence[str] | None = None
) -> list[Run]:
    """Reads run folders; `names` are by default theirs, with their parents where these are the same."""
    if not folders:
        raise ValueError("no run folder was given; name at least one.")
    paths = [pathlib.Path(folder) for folder in folders]
    for path in paths:
        _check(path)
    return [_read_run(path, name) for path, name in zip(paths, names or _names(paths))]


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return names


def series(records: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that hold the number `name`, values as float64."""
    pairs = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def flatten(config: Mapping, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differing(runs: Sequence[Run]) -> dict[str, list[object]]:
    """The config fields in which the runs differ, each with its value in every run."""
    flats = [flatten(run.config) for run in runs]
    absent = "(absent)"
    fields = dict.fromkeys(name for flat in flats for name in flat)
    values = {name: [flat.get(name, absent) for flat in flats] for name in fields}
    return {
        name: row
        for name, row in values.items()
        if len({json.dumps(v, default=str) for v in row}) > 1
    }


def is_number(value: object) -> bool:
    """Whether a JSON value is a number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(path: pathlib.Path) -> None:
    if not path.is_dir():
        raise ValueError(f"run folder {str(path)!r} does not exist; name the folder of a run.")
    if not (path / writers.FILE_NAME).is_file():
        raise ValueError(
            f"{str(path)!r} is not a run folder, because it holds no {writers.FILE_NAME}; "
            "name the folder that the run wrote to."
        )


def _read_run(path: pathlib.Path, name: str) -> Run:
    notes: list[str] = []
    config = _read_json(path / "config.json", notes)
    inner = config.get("config")
    records = writers.read_metrics(path)
    return Run(
        name=name,
        train=[record for record in records if record["kind"] == "train"],
        evals=[record for record in records if record["kind"] == "eval"],
        rounding=[record for record in records if record["kind"] == "rounding"],
        summary=_read_json(path / "summary.json", notes),
        config=inner if isinstance(inner, dict) else config,
        fingerprint=str(config.get("fingerprint", "")),
        expert_load=_read_load(path / LOAD, notes),
        samples=_read_samples(path / "samples", notes),
        notes=notes,
        analyses={
            file.stem: _read_json(file, notes)
            for file in sorted((path / "analysis").glob("*.json"))
        },
    )


def _read_json(path: pathlib.Path, notes: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} does not hold a JSON object and was left out.")
    return {}


def _read_load(path: pathlib.Path, notes: list[str]) -> dict[int, list[float]]:
    content = _read_json(path, notes)
    try:
        return {int(layer): [float(share) for share in content[layer]] for layer in content}
    except (TypeError, ValueError):
        notes.append(f"{path.name} does not hold the load of experts and was left out.")
        return {}


def _read_samples(folder: pathlib.Path, notes: list[str]) -> list[tuple[str, str]]:
    paths = sorted(folder.glob("*.txt"), key=lambda path: _natural(path.name))
    if len(paths) > MAX_SAMPLES:
        notes.append(f"{len(paths) - MAX_SAMPLES} further text samples were left out.")
    return [(path.name, _read_sample(path)) for path in paths[:MAX_SAMPLES]]


def _read_sample(path: pathlib.Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    cut = "" if len(text) <= MAX_SAMPLE_CHARACTERS else " [cut here]"
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text[:MAX_SAMPLE_CHARACTERS]) + cut


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts step_9 before step_10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
