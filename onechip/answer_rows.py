"""Questions as rows of tokens: what is computed once, how far it is padded, and where what counts lies.

A row is a text, or the common prefix of a question's texts with a branch for each of them after it. Rows of about one
length make a batch, and few shapes of batches make few programs. What computes them is answers.py.
"""

import os.path
from typing import NamedTuple

import numpy as np

MOST_BRANCHED = 1024  # tokens in the branches of a row: their scores are written down, each with every key of the row


class TextRow(NamedTuple):
    """texts: (number, Text) of those that are computed in one row; shared: tokens of their common prefix that are
    computed once, 0 for a text in a row of its own."""

    texts: list
    shared: int

    @property
    def sizes(self):
        """(tokens of the prefix, tokens in the branches); what a text's last token predicts is nobody's question."""
        if not self.shared:
            return self.texts[0][1].end - 1, 0
        return self.shared, sum(text.end - 1 - self.shared for _, text in self.texts)


class Shape(NamedTuple):
    """Of a batch: rows, on all devices; tokens of a prefix and of the branches of each, padded."""

    rows: int
    prefix: int
    branches: int

    @property
    def width(self):
        """Tokens of a row."""
        return self.prefix + self.branches

    def holds(self, other):
        """Whether rows for another Shape can be computed in this one."""
        fits = self.prefix >= other.prefix and self.branches >= other.branches
        return fits and bool(self.branches) == bool(other.branches)


class BatchSizes(NamedTuple):
    """unit: what lengths are multiples of; tokens: of a batch, about, on each device; program: how many more tokens of
    padding are computed before another program is compiled instead."""

    unit: int
    tokens: int
    program: int


def padded(count, unit):
    """The least number that is not below count and a power of two, or three of them, times the unit; 0 for 0."""
    size = unit
    while 0 < size < count:
        size, half = 2 * size, 3 * size // 2
        size = half if count <= half and half % unit == 0 else size
    return size if count else 0


def text_rows(texts, size_of):
    """The Rows of one question's (number, Text): one for all where that takes fewer padded tokens than one for each.

    size_of(prefix, branches): padded tokens of a row of that size.
    """
    alone = [TextRow([text], 0) for text in texts]
    if len(texts) == 1:
        return alone
    common = len(os.path.commonprefix([text.tokens for _, text in texts]))
    together = TextRow(texts, min(common, *(text.start for _, text in texts)) - 1)  # the last one's prediction counts
    if together.shared < 1 or together.sizes[1] > MOST_BRANCHED:
        return alone
    return [together] if size_of(*together.sizes) < sum(size_of(*row.sizes) for row in alone) else alone


class Batch(NamedTuple):
    """prefix (R, P) and length (R,): the rows' prefixes; branches (4, R, Q): of each token in a branch its id, the id
    before it, its position in the text and the number of its branch, -1 for padding. All int32.

    The tokens that count, in lists of one array for each Text: place, of the hidden state that predicts it, row *
    (P + Q) + column; target, its id; number, its Text's.
    """

    prefix: np.ndarray
    length: np.ndarray
    branches: np.ndarray
    place: list
    target: list
    number: list


def lay_out(rows, shape):
    """The Batch of some Rows, padded to a Shape."""
    R, P, Q = shape
    prefix, length, branches = np.zeros((R, P), np.int32), np.zeros(R, np.int32), np.zeros((4, R, Q), np.int32)
    branches[3] = -1
    batch = Batch(prefix, length, branches, [], [], [])
    for r, row in enumerate(rows):
        length[r], at = row.sizes[0], 0
        prefix[r, : length[r]] = row.texts[0][1].tokens[: length[r]]
        for b, (number, text) in enumerate(row.texts):
            first = text.start - 1
            if row.shared:
                ids = np.asarray(text.tokens[row.shared - 1 : text.end - 1], np.int32)
                end = at + len(ids) - 1
                branches[:2, r, at:end] = ids[1:], ids[:-1]
                branches[2, r, at:end] = np.arange(row.shared, text.end - 1)
                branches[3, r, at:end] = b
                first, at = P + at + first - row.shared, end
            batch.place.append(r * (P + Q) + np.arange(first, first + text.end - text.start))
            batch.target.append(np.asarray(text.tokens[text.start : text.end]))
            batch.number.append(np.full(text.end - text.start, number))
    return batch
