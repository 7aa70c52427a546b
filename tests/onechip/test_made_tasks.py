"""Tasks made by rule: what they hold, that nothing but the question gives an answer away, and who can do them."""

import importlib
import re

import numpy as np
import pytest

from onechip import core, verdicts
from onechip.made_tasks import COUNT, make_tasks, open_brackets, with_lengths

tok = importlib.import_module("01_tokenizer")


@pytest.fixture(scope="module")
def documents():
    return [text for _, text in tok.read_documents(tok.offline_corpus().val)]


@pytest.fixture(scope="module")
def tasks(documents):
    return make_tasks(documents)


def options(task, item):
    """(the answers to choose from, the place of the right one)."""
    return item["choices" if task.kind == "multiple_choice" else "context_options"], item["gold"]


def chosen(tasks):
    """Tasks with answers to choose from."""
    return [task for task in tasks if task.kind != "language_modeling"]


def test_there_are_tasks_of_all_three_kinds(tasks):
    """Nine or more, with items enough to see something, and none twice."""
    assert len(tasks) >= 9 and {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    for task in tasks:
        assert 90 <= len(task.items) <= COUNT and len({str(item) for item in task.items}) > 0.8 * len(task.items)
        assert 0 < task.baseline < task.ceiling <= 1
        for item in task.items:
            if task.kind != "language_modeling":
                answers, gold = options(task, item)
                assert len(set(answers)) == len(answers) == round(1 / task.baseline) and 0 <= gold < len(answers)


def test_the_same_documents_give_the_same_tasks(documents, tasks):
    """From an iterator as well; other documents give others."""
    assert make_tasks(iter(documents)) == tasks
    assert make_tasks(documents[1:]) != tasks


@pytest.mark.parametrize("rule", ["first", "last", "longest", "shortest", "least", "commonest"])
def test_a_rule_that_reads_no_question_is_at_chance(tasks, rule):
    """Neither a place, a length, the alphabet nor an answer that is often right is worth anything."""
    for task in chosen(tasks):
        right = [options(task, item) for item in task.items]
        often = [answers[gold] for answers, gold in right]
        pick = {
            "first": lambda answers: answers[0],
            "last": lambda answers: answers[-1],
            "longest": lambda answers: max(answers, key=len),
            "shortest": lambda answers: min(answers, key=len),
            "least": min,
            "commonest": lambda answers, often=often: max(answers, key=often.count),
        }[rule]
        if rule == "commonest" and len(set(often)) > 10:
            continue  # then the right answer itself is the one that has been seen
        hits = sum(pick(answers) == answers[gold] for answers, gold in right)
        assert verdicts.binomial_tail(hits, len(right), task.baseline) > 1e-3, (task.label, hits / len(right))


def test_where_an_answer_is_written_no_answer_is_right_more_often_than_guessing(tasks):
    """The baseline is the share of the commonest answer, or more."""
    for task in (task for task in tasks if task.kind == "language_modeling"):
        answers = [item["continuation"] for item in task.items]
        share = max(map(answers.count, answers)) / len(answers)
        assert share <= max(task.baseline, 0.1) + 1e-9, task.label
        assert task.label != "assigned_name" or share <= min(task.baseline, 0.1)  # whose baseline is made from it


def test_answers_are_right_by_the_rule(tasks, documents):
    """Of each task, against its rule written again."""
    by_label, joined = {task.label: task for task in tasks}, "\n".join(documents)
    for item in by_label["next_line"].items[:40]:
        asked = f"{item['query']}\n{item['choices'][item['gold']]}"
        assert "\n".join(row.rstrip() for row in joined.splitlines()).count(asked) >= 1
    for item in by_label["closing_bracket"].items:
        last = item["query"].splitlines()[-1]
        stack = [kind for _, kind in open_brackets(last)]
        assert stack[-1] == item["choices"][item["gold"]]
    for item in by_label["attribute"].items:
        name = item["choices"][item["gold"]]
        assert item["query"].endswith("self.") and f"self.{name}" in item["query"]
        assert not any(f"self.{other}" in item["query"] for other in item["choices"] if other != name)
    for item in by_label["counted"].items:
        numbers = [int(n) for n in re.findall(r"\d+", item["query"])]
        assert int(item["choices"][item["gold"]]) == numbers[-1] + 1 == numbers[0] + 3
    for item in by_label["repeated"].items:
        assert item["context"].split()[2].strip(",") == item["continuation"]
    for item in by_label["spelled"].items:
        word, letters = item["query"].split(": ")
        assert letters.replace(" ", "") + item["choices"][item["gold"]] == word


def test_brackets_are_followed_by_python_itself():
    """Inside nested ones the innermost counts; a closed one no more; text in strings is none."""
    assert open_brackets("f(a[1], {'(': 2")[-1][1] == "}"
    assert open_brackets("x = g(a)") == [(7, ")")]
    assert open_brackets("a = 1") == []


def test_a_length_says_nothing():
    """Of 2,000 draws the right answer is each of the four ranks of length about equally often."""
    import random

    rng, gold = random.Random(0), "x" * 50
    candidates = ["y" * n for n in range(1, 100)]
    ranks = [sum(len(c) < 50 for c in with_lengths(rng, gold, candidates, 3)) for _ in range(2000)]
    assert np.bincount(ranks).min() > 430 and with_lengths(rng, "x", candidates, 3) in (None, ["yy", "yyy", "yyyy"])


def test_a_model_of_random_weights_is_at_chance(tasks):
    """Scores that know nothing of the text are significantly above guessing on no task, at 1 % for all of them."""
    from onechip.questions import Score

    for seed in range(3):
        rng = np.random.default_rng(seed)

        def wild(questions, rng=rng):
            draw = lambda text: Score(rng.normal(3, 1) * (text.end - text.start), text.end - text.start, False)
            return [list(map(draw, texts)) for texts in questions]

        encode = lambda texts: [list(text.encode()) for text in texts]
        for task in tasks:
            outcome = core.ask(task, encode, 256, wild)
            assert verdicts.chance_p(outcome) > 0.01 / len(tasks), task.label
