"""Copying and n-gram lookup: Repeat After Me, arXiv 2402.01032; generator of its `data_utils.py`.

    copy          $ x | x .
    prefix_ngram  $ q | x | a .               q: n letters of x, a: what follows them in x
    suffix_ngram  $ x | q a .

x has a drawn length and letters drawn with repeats; q stands in x once and does not end it. Several
examples follow each other in a row; the last that does not fit is cut off, without targets. Scored is a
with the full stop.

Differs: the examples of a row are segments, which do not see each other, as everywhere here. There q may
stand in x several times, and a follows its first place.
"""

import numpy as np

from effarch.data.tasks import rows

TASKS = ("copy", "prefix_ngram", "suffix_ngram")


class Copying:
    """Letters are words 0 ... letters-1; then `$`, `|`, `.` and padding."""

    groups = ()

    def __init__(
        self,
        seq_len: int,
        *,
        task: str = "copy",
        letters: int = 26,
        min_length: int = 5,
        max_length: int = 20,
        ngram: int = 3,
        answer_length: int = 0,
    ):
        """`answer_length` cuts a; 0 leaves it whole."""
        rows.require(task in TASKS, "copying.task", task, f"is not one of {', '.join(TASKS)}")
        rows.require(
            ngram + 1 <= min_length <= max_length and 2 * max_length + ngram + 4 <= seq_len,
            *("copying.min_length, max_length", (min_length, max_length)),
            f"must lie between ngram + 1 = {ngram + 1} and half of data.seq_len={seq_len}",
        )
        rows.require(letters >= 2, "copying.letters", letters, "must be at least 2")
        self.seq_len, self.vocab_size, self.task = seq_len, letters + 4, task
        self.letters, self.lengths = letters, (min_length, max_length)
        self.ngram, self.answer_length = ngram, answer_length
        self.begin, self.separator, self.end, self.padding = range(letters, letters + 4)

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples: rows filled with strings."""
        words = np.full((count, self.seq_len + 1), self.padding)
        is_answer = np.zeros(words.shape, bool)
        segment_ids = np.zeros(words.shape, int)
        for row in range(count):
            used, segment = 0, 0
            while used < self.seq_len + 1:
                example, first = self._example(rng)
                room = self.seq_len + 1 - used
                stop, segment = used + min(len(example), room), segment + 1
                words[row, used:stop] = example[:room]
                segment_ids[row, used:stop] = segment
                is_answer[row, used + first : stop] = len(example) <= room
                used = stop
        return rows.Rows(words[:, :-1], words[:, 1:], is_answer[:, 1:], None, segment_ids[:, :-1])

    def _example(self, rng: np.random.Generator) -> tuple[list[int], int]:
        """The words of one string with its answer, and where the answer begins."""
        low, high = self.lengths
        length = int(rng.integers(low, high + 1))
        if self.task == "copy":
            x = rng.integers(self.letters, size=length).tolist()
            head, answer = [self.begin, *x, self.separator], x
        else:
            x, place = self._with_ngram(rng, length)
            q, answer = x[place : place + self.ngram], x[place + self.ngram :]
            if self.task == "prefix_ngram":
                head = [self.begin, *q, self.separator, *x, self.separator]
            else:
                head = [self.begin, *x, self.separator, *q]
        answer = answer[: self.answer_length or None]
        return [*head, *answer, self.end], len(head)

    def _with_ngram(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        """A string, and the place of an n-gram that stands in it once and does not end it."""
        while True:
            x = rng.integers(self.letters, size=length).tolist()
            grams = [tuple(x[i : i + self.ngram]) for i in range(length - self.ngram + 1)]
            places = [i for i, gram in enumerate(grams[:-1]) if grams.count(gram) == 1]
            if places:
                return x, int(rng.choice(places))
