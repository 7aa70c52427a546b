"""What verdicts are worth: accuracies with their errors, CORE with an interval, two evaluations compared.

Two models are compared on the examples where their answers differ: which examples a task happens to have is no noise
then. How much a score moves when the same training is run with another seed, no file of verdicts knows.
"""

import math
import zlib
from hashlib import sha256
from json import dumps
from typing import NamedTuple

import numpy as np

from onechip.errors import require

RESAMPLES = 10_000
LEVEL = 0.05  # a difference with a smaller p is one; intervals hold the rest, 95 %


class Evaluation(NamedTuple):
    """All that one evaluation has found.

    suite: "CORE" or another name of a set of tasks, size: how many tasks that set has; bundle: the SHA-256 of its
    examples, hex; model: the name of what was evaluated, step: how long it was trained, source: where it was found;
    limits: what the evaluation was told to leave out, such as {"examples": of each task at most}, 0 for no limit (how
    much of a prompt a model can see is the model's own matter, and not in here); outcomes: one Outcome for each task
    that was run; scores: what else was measured, {name: number}, such as val_bpb.
    """

    suite: str
    size: int
    bundle: str
    model: str
    step: int
    source: str
    limits: dict
    outcomes: list
    scores: dict

    @property
    def complete(self):
        """Whether every example of every task of the suite was run."""
        return self.size == len(self.outcomes) and all(len(o.correct) == o.total for o in self.outcomes)


def hash_tasks(tasks):
    """SHA-256, hex, of everything that EvalTasks ask: the same tasks, whoever made them, have the same hash."""
    digest = sha256()
    for task in tasks:
        digest.update(dumps(task._asdict(), sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# One evaluation


def accuracy(outcome):
    """The share of examples that were answered right, 0 to 1; UserError for a task of which none was run."""
    require(len(outcome.correct), outcome.label, len(outcome.correct), "no example was run, so there is no accuracy")
    return float(np.mean(outcome.correct))


def standard_error(outcome):
    """Of the accuracy, binomial: sqrt(p (1 - p) / n)."""
    p = accuracy(outcome)
    return math.sqrt(p * (1 - p) / len(outcome.correct))


def centred(outcome):
    """The accuracy on a scale on which guessing is 0 and answering everything is 1: (accuracy - b) / (1 - b)."""
    return (accuracy(outcome) - outcome.baseline) / (1 - outcome.baseline)


def core(outcomes):
    """The plain mean of the tasks' centred accuracies, as DCLM defines CORE."""
    require(len(outcomes), "tasks", len(outcomes), "there is no mean of none")
    return math.fsum(map(centred, outcomes)) / len(outcomes)


def binomial_tail(successes, n, p):
    """The probability of at least that many successes in n independent trials of probability p, to about 1e-10."""
    if successes <= 0:
        return 1.0
    if successes > n or p == 0:
        return 0.0
    if p == 1:
        return 1.0
    log_choose = lambda k: math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    logs = (log_choose(k) + k * math.log(p) + (n - k) * math.log1p(-p) for k in range(successes, n + 1))
    return min(1.0, math.fsum(map(math.exp, logs)))


def chance_p(outcome):
    """The probability that guessing answers at least as many examples right: small where a model knows something."""
    return binomial_tail(int(np.sum(outcome.correct)), len(outcome.correct), outcome.baseline)


def core_interval(outcomes, seed=0, resamples=RESAMPLES):
    """(low, high): of `core`, 95 % of a bootstrap over examples. The same verdicts and seed give the same digits.

    Each task's verdicts are drawn again with replacement, as many as there are. How many of them are right is then
    binomial, so that is what is drawn. Tasks are kept: the interval is for these tasks, with other examples.
    """
    total = np.zeros(resamples)
    for outcome in sorted(outcomes, key=lambda outcome: outcome.label):  # sums in one order, to the last digit
        n, p = len(outcome.correct), accuracy(outcome)
        right = _stream(seed, outcome.label).binomial(n, p, resamples)
        total += (right / n - outcome.baseline) / (1 - outcome.baseline)
    return _middle(total / len(outcomes))


def _stream(seed, label):
    """Random numbers of one task, which do not depend on what other tasks there are."""
    return np.random.default_rng((seed, zlib.crc32(label.encode())))


def _middle(values):
    low, high = np.quantile(values, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------------------------------
# Two evaluations


class Difference(NamedTuple):
    """a's score less b's on the same examples.

    interval: 95 %, (low, high); p: how likely a difference at least as far from 0 is if each example's two verdicts
    might as well be swapped; won, lost: how many examples only a, and only b, has right.
    """

    value: float
    interval: tuple
    p: float
    won: int
    lost: int

    @property
    def clear(self):
        """Whether the two can be told apart: the p and the interval both say so."""
        return self.p < LEVEL and not self.interval[0] <= 0 <= self.interval[1]


SAME = "two evaluations are compared on the same examples only"


def check_same_questions(a, b):
    """The part of it that is known before anything was asked: suite, bundle and limits."""
    for field in ("suite", "bundle", "limits"):
        mine, other = getattr(a, field), getattr(b, field)
        require(mine == other, field, other, f"the other evaluation has {mine!r}; {SAME}")


def check_comparable(a, b):
    """UserError, one line with the field, unless two Evaluations have asked the same examples in the same way."""
    check_same_questions(a, b)
    mine, other = ({o.label: o for o in evaluation.outcomes} for evaluation in (a, b))
    apart = sorted(mine.keys() ^ other.keys())
    require(not apart, "tasks", ", ".join(apart), f"only one of the evaluations has run them; {SAME}")
    for label in mine:
        for field, of in EXAMPLES_OF.items():
            x, y = of(mine[label]), of(other[label])
            require(x == y, f"{label}, {field}", y, f"the other evaluation has {x}; {SAME}")


EXAMPLES_OF = {
    "examples run": lambda outcome: len(outcome.correct),
    "examples in all": lambda outcome: outcome.total,
    "baseline": lambda outcome: outcome.baseline,
}


def mcnemar(a, b):
    """The exact two-sided McNemar p of two Outcomes of the same examples, from those that only one has right.

    If the two are equally good, each of the n such examples is as likely one's as the other's: binomial(n, 1/2).
    """
    won, lost = _discordant(a, b)
    return min(1.0, 2 * binomial_tail(max(won, lost), won + lost, 0.5))


def _discordant(a, b):
    """Examples that only a has right, and that only b has."""
    x, y = np.asarray(a.correct, bool), np.asarray(b.correct, bool)
    require(len(x) == len(y) > 0, a.label, len(x), f"the other evaluation has {len(y)} verdicts; give two of a kind")
    return int(np.sum(x & ~y)), int(np.sum(~x & y))


def compare_task(a, b, seed=0, resamples=RESAMPLES):
    """The Difference of two Outcomes' accuracies: McNemar's p, and a paired bootstrap's interval."""
    won, lost = _discordant(a, b)
    drawn = _redrawn(won, lost, len(a.correct), _stream(seed, a.label), resamples)
    return Difference((won - lost) / len(a.correct), _middle(drawn), mcnemar(a, b), won, lost)


def compare_core(a, b, seed=0, resamples=RESAMPLES):
    """The Difference of two Evaluations' `core`; UserError unless they are comparable.

    Interval: each task's examples are drawn again, both models' verdicts on an example together. p: in each task the
    examples on which the models differ go to either by a fair coin, which is McNemar's test carried over to a mean of
    tasks; 1 / (resamples + 1) is the least it can be.
    """
    check_comparable(a, b)
    others = {outcome.label: outcome for outcome in b.outcomes}
    redrawn, swapped, counts = np.zeros(resamples), np.zeros(resamples), []
    for mine in sorted(a.outcomes, key=lambda outcome: outcome.label):
        won, lost = _discordant(mine, others[mine.label])
        n, rng = len(mine.correct), _stream(seed, mine.label)
        scale = 1 / (1 - mine.baseline) / len(a.outcomes)
        redrawn += scale * _redrawn(won, lost, n, rng, resamples)
        swapped += scale * (2 * rng.binomial(won + lost, 0.5, resamples) - won - lost) / n
        counts.append((won, lost))
    value = core(a.outcomes) - core(b.outcomes)
    beyond = int(np.sum(np.abs(swapped) >= abs(value) - 1e-12))  # less what adding in another order may change
    won, lost = (sum(column) for column in zip(*counts, strict=True))
    return Difference(value, _middle(redrawn), (1 + beyond) / (1 + resamples), won, lost)


def _redrawn(won, lost, n, rng, resamples):
    """Differences of accuracy (resamples,) when n pairs of verdicts are drawn again with replacement."""
    drawn = rng.multinomial(n, (won / n, lost / n, 1 - (won + lost) / n), resamples)
    return (drawn[:, 0] - drawn[:, 1]) / n
