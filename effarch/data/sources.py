"""Where text comes from: `embedded:NAME`, `files:GLOB` and `hf:REPO[:CONFIG]`.

A corpus that ships with the machine is added by one function that returns a `Corpus` (see
embedded.py) and one line in EMBEDDED below.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from effarch import names as names_lib
from effarch.data import embedded, files, hub
from effarch.data.corpus import Corpus

EMBEDDED: Mapping[str, Callable[[], Corpus]] = {
    "stdlib": embedded.stdlib,
    "kjv": embedded.kjv,
    "sitepkgs": embedded.sitepkgs,
}

_KINDS = ("embedded:NAME", "files:GLOB", "hf:REPO[:CONFIG]")


@dataclasses.dataclass(frozen=True)
class Source:
    """A named corpus of a prepared folder."""

    name: str  # the folder's name below the prepared folder
    spec: str  # as the user wrote it
    corpus: Corpus
    max_documents: int = 0  # 0: all

    def documents(self) -> Iterator[str]:
        """The documents, always in the same order; those that hold no text are left out."""
        # A JSON text may hold half a surrogate pair, which UTF-8 cannot: it becomes "?".
        valid = (text.encode("utf-8", "replace").decode() for text in self.corpus.documents())
        texts = (text for text in valid if text.strip())
        return itertools.islice(texts, self.max_documents or None)

    def manifest(self) -> dict[str, Any]:
        """What decides the content: files with sha256, or versions."""
        limit = {"max_documents": self.max_documents} if self.max_documents else {}
        return {**self.corpus.manifest(), **limit}


def resolve(
    specs: Sequence[str], *, names: Sequence[str] = (), max_documents: int = 0
) -> list[Source]:
    """Sources for `specs`, named after them unless `names` gives one name for each."""
    if isinstance(specs, str):
        specs = [specs]
    if not specs:
        raise ValueError(f"sources is empty: give at least one of {', '.join(_KINDS)}.")
    if names and len(names) != len(specs):
        raise ValueError(
            f"names has {len(names)} entries and sources {len(specs)}: give one name a source, "
            "or none."
        )
    if max_documents < 0:
        raise ValueError(f"max_documents is {max_documents}: give 0 (all) or a positive number.")
    chosen: list[str] = []
    for index, spec in enumerate(specs):
        default = _default_name(spec, is_alone=len(specs) == 1)
        name = names[index] if names else _free_name(default, chosen)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"names: {name!r} cannot name a folder; use letters, digits, '.', '_' and '-'."
            )
        if name in chosen:
            raise ValueError(f"names: {name!r} is given twice; every source needs its own name.")
        chosen.append(name)
    return [Source(name, spec, corpus_of(spec), max_documents) for name, spec in zip(chosen, specs)]


def corpus_of(spec: str) -> Corpus:
    """The corpus that a spec such as `embedded:stdlib` names."""
    kind, _, rest = spec.partition(":")
    if kind == "embedded":
        if rest not in EMBEDDED:
            known = [f"embedded:{name}" for name in EMBEDDED]
            raise ValueError(
                f"sources: {spec!r} is not an embedded corpus. {names_lib.did_you_mean(spec, known)}"
            )
        return EMBEDDED[rest]()
    if kind == "files" and rest:
        return files.corpus(rest)
    if kind == "hf" and rest:
        return hub.corpus(rest)
    raise ValueError(f"sources: {spec!r} is not a source. Write one of {', '.join(_KINDS)}.")


def is_validation(text: str, val_permille: int) -> bool:
    """blake2b-64(UTF-8 text) mod 1000 < val_permille: the split follows the text, not its place."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 1000 < val_permille


def _default_name(spec: str, *, is_alone: bool) -> str:
    """Files are named after their folder or file, so that figures by source tell them apart."""
    kind, _, rest = spec.partition(":")
    if kind == "files":
        literal = itertools.takewhile(lambda part: not set(part) & set("*?["), Path(rest).parts)
        rest = "" if is_alone else Path(*literal).stem
    if kind == "hf":
        rest = rest.rpartition("/")[2].replace(":", "-")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", rest).strip("._-") or kind or "source"


def _free_name(name: str, taken: Sequence[str]) -> str:
    numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    return next(candidate for candidate in numbered if candidate not in taken)
