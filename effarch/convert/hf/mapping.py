"""Rules between the tensor names of a published model and effarch's public paths, read both ways.

A rule joins some of their tensors with some of ours by two functions that undo each other. Rules are
made for single layers (`layers/3/ffn/up/kernel`), whatever the stacking of the model. Several rules may
give the same of our arrays, for file layouts that differ: reading takes the first whose tensors are all
there, writing takes the first.

Legend: E experts, I inputs, O outputs of a matrix; theirs are [O, I], ours [I, O].
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

_NUM_LISTED = 5

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Their tensors by name, our arrays by public path, and the way between."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[..., Arrays]
    to_theirs: Callable[..., Arrays]


def same(theirs: str, ours: str) -> Rule:
    """An array that both keep alike."""
    return Rule((theirs,), (ours,), lambda x: (x,), lambda x: (x,))


def linear(theirs: str, ours: str) -> Rule:
    """A matrix, transposed."""
    return Rule((theirs,), (ours,), lambda x: (x.T,), lambda x: (x.T,))


def conv(theirs: str, ours: str) -> Rule:
    """Taps of a depthwise convolution: [C, 1, taps] there, [taps, C] here."""
    return Rule((theirs,), (ours,), lambda x: (x[:, 0].T,), lambda x: (x.T[:, None],))


def centered(theirs: str, ours: str) -> Rule:
    """A norm's scale that is kept as its difference from 1 there."""

    def to_ours(x):
        return (np.float32(1) + x.astype(np.float32),)

    return Rule((theirs,), (ours,), to_ours, lambda x: (x.astype(np.float32) - np.float32(1),))


def experts(theirs: str, ours: str, num_experts: int) -> Rule:
    """A matrix of every expert: E tensors whose names have `{expert}` there, [E, I, O] here."""
    names = tuple(theirs.format(expert=expert) for expert in range(num_experts))

    def to_ours(*parts):
        return (np.stack([part.T for part in parts]),)

    return Rule(names, (ours,), to_ours, lambda x: tuple(part.T for part in x))


def merged_experts(prefix: str, ours: str) -> list[Rule]:
    """Experts in one tensor, as transformers 5 holds them in memory: [E, 2 O, I], the gate first."""

    def split(x):
        gate, up = np.split(x, 2, axis=1)
        return gate.swapaxes(1, 2), up.swapaxes(1, 2)

    def join(gate, up):
        return (np.concatenate([gate.swapaxes(1, 2), up.swapaxes(1, 2)], axis=1),)

    def swap(x):
        return (x.swapaxes(1, 2),)

    return [
        Rule((f"{prefix}.gate_up_proj",), (f"{ours}/gate", f"{ours}/up"), split, join),
        Rule((f"{prefix}.down_proj",), (f"{ours}/down",), swap, swap),
    ]


def read(
    rules: Sequence[Rule],
    wanted: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[str], np.ndarray],
    *,
    ignored: Sequence[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Our arrays one by one, from theirs.

    wanted: shape by public path. shapes: of their tensors by name; `get` reads one. `ignored` are
    regular expressions of names that belong to no part of our model. Raises ValueError, before anything
    is read, with the tensors that are missing, unexpected or of another shape.
    """
    chosen, missing = _choose(rules, wanted, shapes)
    used = {name for rule in chosen for name in rule.theirs} | set(missing)
    extra = [
        name for name in shapes if name not in used and not any(re.search(p, name) for p in ignored)
    ]
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for rule in chosen
        for name, shape in _their_shapes(rule, wanted).items()
        if tuple(shapes[name]) != shape
    ]
    problems = [
        f"{word} {_listed(found)}"
        for word, found in (("missing:", missing), ("unexpected:", extra), ("other shapes:", wrong))
        if found
    ]
    if problems:
        raise ValueError(
            f"the tensors do not fit the config ({'; '.join(problems)}); check that config.json and "
            "the weights belong together."
        )
    return (
        pair
        for rule in chosen
        for pair in zip(rule.ours, rule.to_ours(*(get(name) for name in rule.theirs)))
    )


def write(
    rules: Sequence[Rule], ours: Mapping[str, tuple[int, ...]], get: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one by one, from ours: shapes by public path, and `get` for the arrays."""
    covered: set[str] = set()
    for rule in rules:
        if not covered & set(rule.ours):
            covered |= set(rule.ours)
            yield from zip(rule.theirs, rule.to_theirs(*(get(path) for path in rule.ours)))
    left = [path for path in ours if path not in covered]
    if left:
        raise ValueError(f"the family has no tensors for {_listed(left)}; export another family.")


def _choose(rules, wanted, shapes) -> tuple[list[Rule], list[str]]:
    """The rule that gives each wanted array, and the names that are missing for the others."""
    chosen, missing, covered = [], [], set()
    for rule in rules:
        if not covered & set(rule.ours) and all(name in shapes for name in rule.theirs):
            chosen.append(rule)
            covered |= set(rule.ours)
    for rule in rules:
        if not covered & set(rule.ours):
            covered |= set(rule.ours)
            missing += [name for name in rule.theirs if name not in shapes]
    assert covered == set(wanted), sorted(covered ^ set(wanted))
    return chosen, missing


def _their_shapes(rule: Rule, wanted) -> dict[str, tuple[int, ...]]:
    zeros = (np.broadcast_to(np.zeros((), np.int8), wanted[path]) for path in rule.ours)
    return {name: array.shape for name, array in zip(rule.theirs, rule.to_theirs(*zeros))}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(names[:_NUM_LISTED]) + more
