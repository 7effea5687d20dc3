"""State tracking: The Illusion of State in State-Space Models, arXiv 2404.08819; its `word-problem`.

    inputs g1 g2 ... gT, targets g1, g1 g2, ..., g1 g2 ... gT       elements of a finite group

Elements are drawn uniformly; a product of permutations applies its left factor first. Group Z2 is parity
(arXiv 2411.12537): the target is the exclusive or of the bits so far. Word i is element i of the group,
0 the identity. Every place has a target, so that a row of S words holds all lengths up to S; longer ones
than trained are scored by `python -m effarch.evaluate --seq_len`.

Z2, Z60, ... are cyclic; A4 and S3 solvable; A5 and S5 are not, and their word problem is NC1-complete.
"""

import itertools
import re

import numpy as np

from effarch.data.tasks import rows


class StateTracking:
    """Groups Zn (cyclic), Sn (all permutations) and An (even ones), and products such as A4xZ5."""

    groups = ()

    def __init__(self, seq_len: int, *, group: str = "S5"):
        self.seq_len, self.products = seq_len, products(group)
        self.vocab_size = len(self.products)

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        inputs = rng.integers(self.vocab_size, size=(count, self.seq_len))
        targets = np.empty_like(inputs)
        state_N = np.zeros(count, np.int64)
        for place in range(self.seq_len):
            state_N = self.products[state_N, inputs[:, place]]
            targets[:, place] = state_N
        return rows.Rows(inputs, targets, np.ones(inputs.shape, bool))


def products(group: str) -> np.ndarray:
    """[order, order] the multiplication table: number of a b at [a, b], element 0 the identity."""
    elements = [()]
    for factor in group.split("x"):
        elements = [(*one, other) for one in elements for other in _permutations(factor, group)]
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[_product(a, b)] for b in elements] for a in elements], np.int32)


def _permutations(factor: str, group: str) -> list[tuple[int, ...]]:
    """The permutations of one factor, the identity first, the others in lexical order."""
    found = re.fullmatch(r"([ZSA])(\d+)", factor)
    kind, size = (found[1], int(found[2])) if found else ("", 0)
    if not found or not 2 <= size <= (200 if kind == "Z" else 5):
        raise ValueError(
            f"data.task.state_tracking.group={group!r} is not known: write Z2 to Z200, S2 to S5, A3 to "
            "A5, or a product such as A4xZ5."
        )
    if kind == "Z":
        return [tuple((i + turn) % size for i in range(size)) for turn in range(size)]
    every = list(itertools.permutations(range(size)))
    return [p for p in every if kind == "S" or _is_even(p)]


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def _product(a, b):
    """First a, then b, factor by factor."""
    return tuple(tuple(q[i] for i in p) for p, q in zip(a, b))
