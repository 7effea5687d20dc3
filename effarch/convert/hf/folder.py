"""Folders of safetensors files as transformers reads and writes them.

config.json, the tensors in model.safetensors or in several files listed by model.safetensors.index.json,
and maybe tokenizer.json.
"""

import json
import pathlib
import shutil
from collections.abc import Iterable

import ml_dtypes  # noqa: F401  safetensors needs it to give bfloat16 arrays
import numpy as np
import safetensors
import safetensors.numpy

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
KEPT = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
PUBLISHED = "published.json"
"""In the folder of a run: the config.json that it was made of."""
KEPT_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Fields of config.json that no layer needs and users of a model do."""
MAX_SHARD = 5 * 2**30
"""Bytes of one file."""


class Tensors:
    """The tensors of a folder: names and shapes at once, contents when they are asked for."""

    def __init__(self, path: pathlib.Path):
        self._handles = {}
        for file in _files(path):
            try:
                handle = safetensors.safe_open(file, framework="np")
            except Exception as error:  # the library's own type is not public in all versions
                raise ValueError(
                    f"{file} cannot be read as a safetensors file ({error}); fetch it again."
                ) from error
            self._handles |= dict.fromkeys(handle.keys(), handle)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(handle.get_slice(name).get_shape())
            for name, handle in self._handles.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)


def read_config(path: pathlib.Path) -> dict:
    """config.json. Raises ValueError if there is none, or if the weights are stored quantized."""
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"{path} holds no {CONFIG}; give a folder as transformers' save_pretrained writes it."
        )
    content = read_json(path / CONFIG)
    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{path / CONFIG}: quantization_config says that the weights are stored quantized "
            f"({method}); give a folder with bfloat16 or float32 weights."
        )
    return content


def refuse_held(target: pathlib.Path) -> None:
    """Raises ValueError if the folder to make holds a model or a run."""
    if (target / CONFIG).exists():
        raise ValueError(f"--to={target} holds a model or a run already; choose another folder.")


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises ValueError if it holds something else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is damaged ({error}); fetch it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no object; fetch it again.")
    return content


def write(
    path: pathlib.Path,
    config: dict,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard: int = MAX_SHARD,
) -> None:
    """Writes config.json and the tensors, into several files where one would pass `max_shard` bytes."""
    path.mkdir(parents=True, exist_ok=True)
    shards, names, shard, size = [], [], {}, 0

    def flush() -> None:
        file = path / f".shard-{len(shards)}.partial"
        safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        shards.append(file)
        names.append({name: array.nbytes for name, array in shard.items()})
        shard.clear()

    for name, array in tensors:
        if shard and size + array.nbytes > max_shard:
            flush()
            size = 0
        shard[name] = np.ascontiguousarray(array)
        size += array.nbytes
    flush()
    _name_shards(path, shards, names)
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> bool:
    """Copies the tokenizer's files; whether there is a tokenizer.json."""
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return (target / TOKENIZER).is_file()


def _name_shards(path: pathlib.Path, shards: list[pathlib.Path], names: list[dict]) -> None:
    if len(shards) == 1:
        shards[0].replace(path / SINGLE)
        return
    weight_map = {}
    for number, (file, held) in enumerate(zip(shards, names), start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.replace(path / final)
        weight_map |= dict.fromkeys(held, final)
    total = sum(sum(held.values()) for held in names)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the tensors. Raises ValueError if there are none or some are missing."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map", {})
        files = [path / name for name in sorted(set(weight_map.values()))]
        if not files:
            raise ValueError(f"{path / INDEX} has no weight_map; fetch it again.")
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{path / INDEX} lists files that are not there: {', '.join(missing)}; fetch them."
        )
    if not files:
        raise ValueError(
            f"{path} holds no *.safetensors file; save the model with transformers' "
            "save_pretrained, which writes them."
        )
    return files
