"""What an evaluation asks and what it finds: tasks of three kinds, texts that are scored, verdicts."""

from typing import NamedTuple

import numpy as np

TASK_KINDS = ("multiple_choice", "schema", "language_modeling")


class EvalTask(NamedTuple):
    """A list of examples and how they are asked, in the terms of a CORE bundle.

    label: its name; kind: of TASK_KINDS; items: its examples as dicts, multiple_choice {"query", "choices", "gold"},
    schema {"context_options", "continuation", "gold"}, language_modeling {"context", "continuation"}; shots: solved
    examples ahead of each; delimiter: what stands between a question and its answer; baseline: the accuracy of
    guessing, 0 to 1; ceiling: the best accuracy that anything can reach.
    """

    label: str
    kind: str
    items: list
    shots: int = 0
    delimiter: str = " "
    baseline: float = 0.0
    ceiling: float = 1.0


class Text(NamedTuple):
    """Token ids of which those in [start, end) are scored, each given all before it. start is at least 1."""

    tokens: list
    start: int
    end: int


class Score(NamedTuple):
    """Of a Text's scored tokens: the sum of their cross-entropy in nats, how many they are, and whether each of them
    is the likeliest token at its place."""

    nats: float
    count: int
    exact: bool


class Outcome(NamedTuple):
    """A task's verdicts: correct (n,) bool, one for each example that was run, in the order of the seeded shuffle;
    total: examples that the task has; baseline and ceiling: as EvalTask has them."""

    label: str
    correct: np.ndarray
    total: int
    baseline: float = 0.0
    ceiling: float = 1.0
