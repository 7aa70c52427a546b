"""Rows of questions, number by number: padded sizes, what is shared, places and positions."""

import numpy as np

from onechip.answer_rows import Shape, TextRow, lay_out, padded, text_rows
from onechip.questions import Text


def branching(prefix, endings):
    """A question whose texts have this many tokens in common, then so many of their own."""
    return [Text([0] * prefix + [i + 1] * size, prefix, prefix + size) for i, size in enumerate(endings)]


def test_padded_sizes_are_few_and_no_half_too_large():
    """Powers of two of the unit, and three quarters of them where those are multiples of the unit."""
    assert [padded(n, 32) for n in (0, 1, 32, 33, 64, 65, 97, 129, 193, 1537)] == [
        0, 32, 32, 64, 64, 96, 128, 192, 256, 2048
    ]  # fmt: skip
    assert [padded(n, 128) for n in (1, 129, 257, 385, 513, 769)] == [128, 256, 384, 512, 768, 1024]
    assert all(n <= padded(n, 32) <= max(32, 1.5 * n + 16) for n in range(1, 5000))


def test_a_question_shares_its_beginning_where_that_is_less_work():
    """Ten texts after 90 tokens are one row; two that share nothing but the first token are two; one is one."""
    size_of = lambda prefix, branches: padded(prefix, 32) + padded(branches, 32)
    numbered = lambda texts: list(enumerate(texts))
    (row,) = text_rows(numbered(branching(90, [3] * 10)), size_of)
    assert row.shared == 89 and row.sizes == (89, 30)  # the last token predicts nothing, one more begins each branch
    assert len(text_rows(numbered(branching(1, [50, 60])), size_of)) == 2
    (row,) = text_rows(numbered(branching(9, [4])), size_of)
    assert row.shared == 0 and row.sizes == (12, 0)


def test_what_a_batch_is_made_of():
    """Places, targets and positions of one shared row and one plain row, number by number."""
    together = TextRow([(5, Text([9, 8, 7, 1, 2], 3, 5)), (6, Text([9, 8, 7, 3], 3, 4))], 2)
    batch = lay_out([together, TextRow([(7, Text([9, 4, 4], 1, 3))], 0)], Shape(2, 4, 8))
    assert batch.prefix.tolist() == [[9, 8, 0, 0], [9, 4, 0, 0]] and batch.length.tolist() == [2, 2]
    ids, before, position, branch = batch.branches[:, 0].tolist()
    assert ids == [7, 1, 7, 0, 0, 0, 0, 0] and before == [8, 7, 8, 0, 0, 0, 0, 0]
    assert position == [2, 3, 2, 0, 0, 0, 0, 0] and branch == [0, 0, 1, -1, -1, -1, -1, -1]
    assert np.concatenate(batch.place).tolist() == [4, 5, 6, 12, 13]
    assert np.concatenate(batch.target).tolist() == [1, 2, 3, 4, 4]
    assert np.concatenate(batch.number).tolist() == [5, 5, 6, 7, 7]
