"""Synthetic tasks by name. To add one: a file here and a line below.

A task is `Task(seq_len, *, options...)` with `vocab_size`, `groups` (names of kinds of rows that are
reported apart, or ()) and `draw(rng, count) -> rows.Rows`, which follows from `rng` alone; it may have
`draw_scored` as well, for rows that are scored. Its options with their defaults are its section of
`config.data.task`.
"""

from effarch.data.tasks.compression import Compression
from effarch.data.tasks.copying import Copying
from effarch.data.tasks.fuzzy_recall import FuzzyRecall
from effarch.data.tasks.linear_regression import LinearRegression
from effarch.data.tasks.memorization import Memorization
from effarch.data.tasks.mqar import Mqar
from effarch.data.tasks.needles import Needles
from effarch.data.tasks.recall import InContextRecall, NoisyRecall
from effarch.data.tasks.selective_copying import SelectiveCopying
from effarch.data.tasks.state_tracking import StateTracking

KINDS = {
    "compression": Compression,
    "copying": Copying,
    "fuzzy_recall": FuzzyRecall,
    "in_context_recall": InContextRecall,
    "linear_regression": LinearRegression,
    "memorization": Memorization,
    "mqar": Mqar,
    "needles": Needles,
    "noisy_recall": NoisyRecall,
    "selective_copying": SelectiveCopying,
    "state_tracking": StateTracking,
}
