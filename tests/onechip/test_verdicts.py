"""onechip/verdicts.py: statistics against enumeration and exact fractions, comparisons, files with each damage."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from onechip.errors import UserError
from onechip.evalfile import load_evaluation, save_evaluation
from onechip.questions import EvalTask, Outcome
from onechip.verdicts import (
    Evaluation,
    accuracy,
    binomial_tail,
    centred,
    chance_p,
    check_comparable,
    compare_core,
    compare_task,
    core,
    core_interval,
    hash_tasks,
    mcnemar,
    standard_error,
)


def outcome(verdicts, label="task", baseline=0.0, total=None):
    correct = np.array([int(v) for v in verdicts], bool)
    return Outcome(label, correct, total or len(correct), baseline, 1.0)


def evaluation(outcomes, **fields):
    known = {"suite": "CORE", "size": len(outcomes), "bundle": "ab", "model": "m", "step": 3, "source": "runs/m"}
    return Evaluation(
        **{**known, "limits": {"examples": 0}, "outcomes": outcomes, "scores": {"val_bpb": 2.5}, **fields}
    )


def exact_tail(successes, n, p):
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(successes, n + 1))


def test_the_binomial_tail_is_exact():
    """Against fractions, from one trial to the largest task of CORE, in the middle and far out."""
    for n, p in ((1, Fraction(1, 2)), (7, Fraction(1, 4)), (60, Fraction(62, 100))):
        for k in range(n + 2):
            assert binomial_tail(k, n, float(p)) == pytest.approx(float(exact_tail(k, n, p)), rel=1e-11)
    n, ways, exact = 20_321, 1, 0  # at a quarter, from the mean to 1e-43; ways: choose(n, k) 3**(n - k), of 4**n
    for k in range(n, 5_079, -1):
        exact += ways
        ways = ways * 3 * k // (n - k + 1)
        if k in (5_080, 5_300, 6_000):
            assert binomial_tail(k, n, 0.25) == pytest.approx(float(Fraction(exact, 4**n)), rel=1e-9)
    assert [binomial_tail(k, 3, p) for k, p in ((0, 0.0), (1, 0.0), (3, 1.0), (4, 1.0))] == [1, 0, 1, 0]


def test_accuracy_error_and_centring():
    """Written out by hand: 3 of 8 right where guessing has a quarter."""
    o = outcome("10100100", baseline=0.25)
    assert accuracy(o) == 3 / 8
    assert standard_error(o) == pytest.approx(math.sqrt(3 / 8 * 5 / 8 / 8))
    assert centred(o) == pytest.approx((3 / 8 - 1 / 4) / (3 / 4))
    assert chance_p(o) == pytest.approx(float(exact_tail(3, 8, Fraction(1, 4))))
    assert core([o, outcome("1111", "other")]) == pytest.approx((1 / 6 + 1) / 2)
    with pytest.raises(UserError, match="^empty=0: no example was run"):
        accuracy(outcome("", "empty"))


def test_the_interval_is_that_of_verdicts_drawn_again():
    """As a bootstrap written out over the verdicts themselves has it; order of tasks and repetition change no digit."""
    rng = np.random.default_rng(5)
    outcomes = [
        outcome(rng.random(n) < p, f"t{n}", b) for n, p, b in ((37, 0.6, 0.5), (90, 0.3, 0.25), (211, 0.1, 0.0))
    ]
    means = []
    for _ in range(4_000):
        again = [o._replace(correct=rng.choice(o.correct, len(o.correct))) for o in outcomes]
        means.append(core(again))
    low, high = core_interval(outcomes)
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.01)
    assert core_interval(outcomes[::-1]) == core_interval(outcomes) == (low, high)
    assert core_interval(outcomes, seed=1) != (low, high)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """400 suites of examples drawn at known accuracies: 95 % of the intervals hold the known CORE."""
    rng, truth = np.random.default_rng(0), {"a": (150, 0.55, 0.5), "b": (300, 0.3, 0.25), "c": (80, 0.2, 0.0)}
    known = np.mean([(p - b) / (1 - b) for _, p, b in truth.values()])
    inside = 0
    for _ in range(400):
        outcomes = [outcome(rng.random(n) < p, label, b) for label, (n, p, b) in truth.items()]
        low, high = core_interval(outcomes, resamples=1_000)
        inside += low <= known <= high
    assert 0.92 <= inside / 400 <= 0.98


def swaps(pairs):
    """All ways to swap the two verdicts of some of the pairs."""
    for flips in itertools.product((False, True), repeat=len(pairs)):
        yield [pair[::-1] if flip else pair for pair, flip in zip(pairs, flips, strict=True)]


def test_mcnemar_by_enumeration():
    """The share of all ways to swap verdicts that leaves the two at least as far apart."""
    for a, b in (("111110100", "000001100"), ("1111", "0000"), ("1010", "1010"), ("10", "01"), ("1101010", "0001011")):
        pairs = list(zip(map(int, a), map(int, b), strict=True))
        apart = abs(sum(x - y for x, y in pairs))
        shares = [abs(sum(x - y for x, y in swapped)) >= apart for swapped in swaps(pairs)]
        assert mcnemar(outcome(a), outcome(b)) == pytest.approx(np.mean(shares))


def test_the_p_of_a_difference_by_enumeration():
    """All ways to swap verdicts within two tasks of other sizes and baselines, next to what compare_core draws."""
    a = [outcome("1110110", "x", 0.25), outcome("10101", "y", 0.5)]
    b = [outcome("0010010", "x", 0.25), outcome("10000", "y", 0.5)]
    tasks = [[*zip(m.correct.tolist(), o.correct.tolist(), strict=True)] for m, o in zip(a, b, strict=True)]
    difference = lambda x, y: (sum(p - q for p, q in x) / 7 / 0.75 + sum(p - q for p, q in y) / 5 / 0.5) / 2
    apart = difference(*tasks)
    share = np.mean([abs(difference(x, y)) >= apart - 1e-12 for x in swaps(tasks[0]) for y in swaps(tasks[1])])
    found = compare_core(evaluation(a), evaluation(b[::-1]))
    assert found.value == pytest.approx(apart) and (found.won, found.lost) == (5, 0)
    assert found.p == pytest.approx(share, abs=0.015)


def test_a_paired_interval_is_that_of_pairs_drawn_again():
    """As a bootstrap over the pairs written out; the same digits again, and with a and b swapped the opposite."""
    rng = np.random.default_rng(3)
    a, b = ([outcome(rng.random(n) < p, f"t{n}", 0.2) for n, p in ((83, 0.6), (140, 0.4))] for _ in range(2))
    values = []
    for _ in range(4_000):
        drawn = [rng.integers(len(o.correct), size=len(o.correct)) for o in a]
        x, y = ([o._replace(correct=o.correct[i]) for o, i in zip(of, drawn, strict=True)] for of in (a, b))
        values.append(core(x) - core(y))
    found = compare_core(evaluation(a), evaluation(b))
    assert found.interval == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.012)
    assert found == compare_core(evaluation(a), evaluation(b))
    other = compare_core(evaluation(b), evaluation(a))
    assert other.value == pytest.approx(-found.value) and (other.won, other.lost) == (found.lost, found.won)


def models(rng, gain):
    """Two models' evaluations of three tasks: they agree on most examples, and one is right more often by `gain`."""
    a, b = [], []
    for label, n, baseline in (("x", 400, 0.25), ("y", 250, 0.0), ("z", 600, 0.5)):
        y = rng.random(n) < baseline + 0.2
        x = np.where(rng.random(n) < 0.04, rng.random(n) < baseline + 0.2 + gain / 0.04, y)
        a.append(outcome(x, label, baseline))
        b.append(outcome(y, label, baseline))
    return evaluation(a), evaluation(b)


def test_equal_models_are_rarely_told_apart_and_unequal_ones_are():
    """Of 300 pairs of equal models at most 7.5 % differ clearly; a gain inside both intervals is seen when paired."""
    rng = np.random.default_rng(7)
    assert np.mean([compare_core(*models(rng, 0.0), resamples=1_000).clear for _ in range(300)]) <= 0.075
    a, b = models(rng, 0.012)
    assert core_interval(a.outcomes)[0] < core(b.outcomes) < core(a.outcomes) < core_interval(b.outcomes)[1]
    found = compare_core(a, b)
    assert found.clear and found.value > 0 and found.interval[0] > 0


def test_a_task_is_compared_by_mcnemar_and_a_paired_interval():
    """Ten won and two lost of thirty: McNemar's p by hand, and an interval around the difference."""
    a, b = outcome("1" * 10 + "0" * 2 + "1" * 18), outcome("0" * 10 + "1" * 2 + "1" * 18)
    found = compare_task(a, b)
    assert found.value == pytest.approx(8 / 30) and (found.won, found.lost) == (10, 2)
    assert found.p == pytest.approx(2 * sum(math.comb(12, k) for k in (10, 11, 12)) / 2**12)
    assert found.interval[0] < 8 / 30 < found.interval[1] and found.clear
    assert not compare_task(b, b).clear
    with pytest.raises(UserError, match="^task=30: the other evaluation has 29 verdicts"):
        compare_task(a, outcome("1" * 29))


def test_only_the_same_examples_are_compared():
    """Each difference in what was asked is refused in one line that names it."""
    base = [outcome("1011", "x", 0.25), outcome("110", "y", total=9)]
    ours = evaluation(base)
    check_comparable(ours, evaluation(base[::-1], model="other", step=9, source="elsewhere", scores={}))
    refused = {
        "suite='offline'": {"suite": "offline"},
        "bundle='cd'": {"bundle": "cd"},
        "limits={'examples': 4}": {"limits": {"examples": 4}},
        "tasks='y'": {"outcomes": base[:1]},
        "tasks='x, z'": {"outcomes": [base[0]._replace(label="z"), base[1]]},
        "x, examples run=5": {"outcomes": [outcome("10110", "x", 0.25), base[1]]},
        "y, examples in all=10": {"outcomes": [base[0], base[1]._replace(total=10)]},
        "x, baseline=0.5": {"outcomes": [base[0]._replace(baseline=0.5), base[1]]},
    }
    for said, change in refused.items():
        with pytest.raises(UserError, match="same examples only$") as error:
            compare_core(ours, ours._replace(**change))
        assert str(error.value).startswith(f"{said}: ") and "\n" not in str(error.value)


def test_a_hash_is_of_what_is_asked():
    """Any field of any task changes it, and so does their order; an equal copy does not."""
    tasks = [
        EvalTask("a", "multiple_choice", [{"query": "q\udc80", "choices": ["x", "y"], "gold": 1}], 2, "\n", 0.5),
        EvalTask("b", "language_modeling", [{"context": "é", "continuation": "z"}]),
    ]
    others = [
        [tasks[0]._replace(**{field: value}), tasks[1]]
        for field, value in (("label", "c"), ("shots", 3), ("delimiter", " "), ("baseline", 0.25), ("ceiling", 0.9))
    ]
    others += [tasks[::-1], tasks[:1], [tasks[0], tasks[1]._replace(items=[{"context": "e", "continuation": "z"}])]]
    assert hash_tasks([task._replace(items=[dict(i) for i in task.items]) for task in tasks]) == hash_tasks(tasks)
    assert len({hash_tasks(t) for t in [tasks, *others]}) == 1 + len(others)


def test_an_evaluation_comes_back_from_its_file(tmp_path):
    """Every field and verdict, a subset as such; the file is plain JSON."""
    path = tmp_path / "eval.json"
    ours = evaluation([outcome("1011", "x", 0.25), outcome("110", "y", total=9)], size=2, step=12)
    save_evaluation(path, ours)
    back = load_evaluation(path)
    assert back._replace(outcomes=[]) == ours._replace(outcomes=[])
    for mine, other in zip(ours.outcomes, back.outcomes, strict=True):
        assert mine.correct.tolist() == other.correct.tolist() and other.correct.dtype == bool
        assert mine._replace(correct=0) == other._replace(correct=0)
    assert json.loads(path.read_text())["tasks"][0]["correct"] == "1011"
    assert not back.complete and back._replace(outcomes=back.outcomes[:1], size=1).complete
    assert not back._replace(outcomes=back.outcomes[:1]).complete


def damage(**fields):
    return lambda saved: saved.update(fields)


def damage_task(**fields):
    return lambda saved: saved["tasks"][1].update(fields)


DAMAGES = {
    "format=2: this version reads 1": damage(format=2),
    "format=None": lambda saved: saved.pop("format"),
    "has no field 'bundle'": lambda saved: saved.pop("bundle"),
    "tasks={}: must be a list": damage(tasks={}),
    "step='3': must be an integer": damage(step="3"),
    "step=True: must be an integer": damage(step=True),
    "limits.examples='all': must be a number": damage(limits={"examples": "all"}),
    "scores.val_bpb=nan: must be a number": damage(scores={"val_bpb": math.nan}),
    "has the field 'verdicts', which no": damage(verdicts=1),
    "size=1: there are 2 tasks": damage(size=1),
    "tasks='x': each must be there once": damage_task(label="x"),
    "task 2: has no field 'correct'": lambda saved: saved["tasks"][1].pop("correct"),
    "task 2: correct='112': must be one 0 or 1": damage_task(correct="112"),
    "task 2: correct='': must be one 0 or 1": damage_task(correct=""),
    "task 2: total=2: there are 3 verdicts": damage_task(total=2),
    "task 2: baseline=1.0: must be in": damage_task(baseline=1.0),
    "task 2: baseline=nan: must be a number": damage_task(baseline=math.nan),
    "task 2: ceiling=0: must be above": damage_task(ceiling=0),
    "task 1: task=5: must be an object": lambda saved: saved.update(tasks=[5, 6]),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, said):
    """One line, with the path first, for each kind of damage."""
    path = tmp_path / "eval.json"
    save_evaluation(path, evaluation([outcome("1011", "x", 0.25), outcome("110", "y", total=9)]))
    saved = json.loads(path.read_text())
    DAMAGES[said](saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError) as error:
        load_evaluation(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_cut_is_refused(tmp_path):
    path = tmp_path / "eval.json"
    save_evaluation(path, evaluation([outcome("1011", "x")]))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="is not JSON"):
        load_evaluation(path)
