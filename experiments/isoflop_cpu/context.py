"""What a trained run makes of its context: loss in short windows, and copying.

Losses at equal FLOPs lie on no parabola where some runs have learned to copy from their context and
others have not (induction, Olsson et al., arXiv 2209.11895). In windows of 32 bytes there is little to
copy.
"""

import math
import pathlib
import string

import numpy as np

from effarch.evaluation import scoring
from effarch.training import evaluation, restore

WINDOW = 32
PIECES, LETTERS = 48, 64
"""Random texts, and the letters of each."""


def measures(folder: pathlib.Path) -> dict[str, float]:
    """`loss_32`: bits per byte of the held-out text in windows of 32 bytes; `copying`, bits a letter."""
    plan, state = restore.open_run(folder)
    return {
        "loss_32": _loss(plan.with_seq_len(WINDOW), state),
        "copying": _copying(scoring.Scorer(plan, state, batch_size=PIECES)),
    }


def _loss(plan, state) -> float:
    windows = evaluation.batches(plan)
    found = evaluation.evaluate(plan, plan.eval_step(), state.params, state.model_state, windows)
    return found["bits_per_byte"]


def _copying(scorer: scoring.Scorer) -> float:
    """Bits a letter that are saved where random letters follow themselves, not others; at most 4.7
    (log2 26) are there to save for a model that knows that they are random."""
    letters = np.array(list(string.ascii_lowercase))
    drawn = np.random.default_rng(0).choice(letters, (2, PIECES, LETTERS))
    texts, others = (["".join(row) for row in half] for half in drawn)
    again, fresh = (
        sum(score for score, _ in scorer.loglikelihood(list(zip(texts, rest))))
        for rest in (texts, others)
    )
    return (again - fresh) / (math.log(2) * PIECES * LETTERS)
