"""CORE's rules one by one, and the whole of it on a bundle made by hand against a slow float64 scorer."""

import functools
import importlib
import math
import random

import jax
import numpy as np
import pytest
from bundle import BOS, encode, encode_all, tasks, write_bundle
from configs import quick_compiler, random_params, replace  # noqa: F401  (a fixture for every test)
from corpus import is_one_line
from reference import gpt_logits, widen
from reference_core import verdicts_reference

from onechip import core, verdicts
from onechip.bundle import read_bundle
from onechip.errors import UserError
from onechip.questions import EvalTask, Outcome, Score, Text

train = importlib.import_module("02_train")

CHOICE = EvalTask(
    "toy",
    "multiple_choice",
    [{"query": f"q{i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(7)],
    shots=2,
    delimiter="\nAnswer: ",
    baseline=0.5,
)


def letters(texts):
    """Ids of each text: its characters'."""
    return [[ord(letter) for letter in text] for text in texts]


def even(nats=1.0):
    """A scorer to which every token is alike."""
    return lambda questions: [[Score(nats * (t.end - t.start), t.end - t.start, False) for t in q] for q in questions]


def ask_item(item, losses, kind="multiple_choice"):
    """The verdict on one item whose texts have these mean losses."""
    task = EvalTask("toy", kind, [item])
    found = lambda questions: [[Score(loss, 1, loss == 0) for loss in losses[: len(questions[0])]]]
    return bool(core.ask(task, letters, 1, found).correct[0])


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def test_prompts_are_nanochats():
    """Solved examples with a blank line after each; a context is stripped, and what is before the answer as a whole."""
    item, other = CHOICE.items[3], CHOICE.items[4]
    assert core.render(CHOICE, item, [other]) == [
        "q4\nAnswer: a4\n\nq3\nAnswer: a3",
        "q4\nAnswer: a4\n\nq3\nAnswer: b3",
    ]
    schema = EvalTask("toy", "schema", [])
    one = {"context_options": ["The cup", "The jug "], "continuation": "is full", "gold": 1}
    assert core.render(schema, one, [one]) == [
        "The jug  is full\n\nThe cup is full",
        "The jug  is full\n\nThe jug  is full",
    ]
    words = EvalTask("toy", "language_modeling", [])
    text, answered = {"context": " \tOne two \n", "continuation": "three "}, {"context": " a ", "continuation": 4}
    assert core.render(words, text, []) == ["One two", "One two three "]
    assert core.render(words, text, [answered]) == ["a 4\n\nOne two", "a 4\n\nOne two three "]


def test_items_are_shuffled_and_cut_and_examples_are_others():
    """Seeds 1337 and 1234 + i, with i counted after the shuffle and the cut; an item is never its own example."""
    order = list(range(7))
    random.Random(1337).shuffle(order)
    items = core.choose_items(CHOICE, 5)
    assert items == [CHOICE.items[i] for i in order[:5]] and core.choose_items(CHOICE) == [
        CHOICE.items[i] for i in order
    ]
    for i in range(5):
        others = [j for j in range(5) if j != i]
        want = [items[j] for j in random.Random(1234 + i).sample(others, 2)]
        assert core.examples_for(items, i, 2) == want and items[i] not in want
        assert core.examples_for(items, i, 0) == []


@pytest.mark.parametrize(
    "task, limit, what",
    [
        (CHOICE, 2, "toy: number of examples=2: 2 solved ones and a question take 3"),
        (CHOICE._replace(items=[]), 0, "toy: number of examples=0"),
        (CHOICE._replace(kind="essay"), 0, "toy: kind='essay': use one of multiple_choice, schema"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(task, limit, what):
    with pytest.raises(UserError) as refused:
        core.ask(task, letters, 1, even(), limit)
    assert what in str(refused.value) and is_one_line(refused)


# ----------------------------------------------------------------------------------------------------------------------
# What counts


def test_what_counts_is_what_differs():
    """Multiple choice: all after the common beginning; schema: the common end; language modelling: the answer."""
    assert core.spans("multiple_choice", [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == [(2, 4), (2, 3), (2, 3)]
    assert core.spans("schema", [[1, 2, 8, 9], [1, 3, 4, 8, 9]]) == [(2, 4), (3, 5)]
    assert core.spans("language_modeling", [[1, 2], [1, 2, 7, 6]]) == [(2, 4)]


@pytest.mark.parametrize("context, answer", [("ab", ""), ("", "c")])
def test_an_answer_that_changes_the_tokens_before_it_is_named(context, answer):
    task = EvalTask("toy", "language_modeling", [{"context": context, "continuation": answer}], delimiter="")
    encode = lambda texts: [[len(text)] for text in texts]
    with pytest.raises(UserError, match="toy: example 0 of the shuffled ones: the tokens of its prompt are not") as e:
        core.ask(task, encode, 1, even())
    assert is_one_line(e)


def test_long_texts_keep_their_end():
    """With max_tokens 6 the last six tokens are kept and what counts moves along; an answer that is longer is named."""
    asked = []
    score = lambda questions: asked.extend(questions) or even()(questions)
    core.ask(CHOICE._replace(shots=0), letters, 1, score, 1, max_tokens=6)
    query = core.choose_items(CHOICE)[0]["query"]
    whole = [1, *map(ord, f"{query}\nAnswer: ")]
    start = len(whole)
    choices = core.choose_items(CHOICE)[0]["choices"]
    want = [Text([*whole, *map(ord, choice)][-6:], 6 - 2, 6) for choice in choices]
    assert asked == [want] and start > 6
    with pytest.raises(UserError, match="has an answer longer than the 1 tokens that the model takes"):
        core.ask(CHOICE._replace(shots=0), letters, 1, score, 1, max_tokens=1)


def test_chunks_change_nothing(monkeypatch):
    """Of a task of 7 items in chunks of 3 every question is asked once, in order."""
    asked, again = [], []
    core.ask(CHOICE, letters, 1, lambda questions: asked.extend(questions) or even()(questions))
    monkeypatch.setattr(core, "CHUNK", 3)
    sizes = []
    outcome = core.ask(CHOICE, letters, 1, lambda q: sizes.append(len(q)) or again.extend(q) or even()(q))
    assert again == asked and len(asked) == 7 and sizes == [3, 3, 1]
    assert (outcome.total, outcome.baseline, len(outcome.correct)) == (7, 0.5, 7)


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def test_the_least_loss_wins_and_the_first_of_equal_ones():
    item = {"query": "q", "choices": ["ab", "cd", "ef"], "gold": 1}
    assert ask_item(item, [2.0, 1.0, 1.5]) and not ask_item(item, [1.0, 2.0, 1.5])
    assert ask_item(item, [2.0, 1.0, 1.0]) and not ask_item(item, [1.0, 1.0, 2.0])
    assert not ask_item(item, [math.nan, 1.0, 2.0]) and ask_item(item, [2.0, 1.0, math.nan])


def test_losses_are_means_over_tokens():
    """A longer answer is not worse for its length: 3 nats over three tokens are better than 2 over one."""
    task = EvalTask("toy", "multiple_choice", [{"query": "q", "choices": ["abc", "d"], "gold": 0}])
    assert core.ask(task, letters, 1, lambda questions: [[Score(3.0, 3, False), Score(2.0, 1, False)]]).correct[0]


@pytest.mark.parametrize("first, right", [(True, True), (False, False)])
def test_an_answer_of_no_tokens_wins_if_it_is_the_first(capsys, first, right):
    """One choice begins all others: the mean over nothing is NaN, which nanochat's min takes only as the first."""
    choices = ["a", "ab", "ac"] if first else ["ab", "a", "ac"]
    task = EvalTask("toy", "multiple_choice", [{"query": "q", "choices": choices, "gold": choices.index("a")}])
    assert core.ask(task, letters, 1, even()).correct[0] == right
    assert capsys.readouterr().out == "toy: 1 of 1 examples have an answer with no token of its own to score\n"


def test_equal_choices_are_scored_once_and_the_first_wins():
    """Two choices of the same text cannot differ by rounding; of contexts that are all the same nothing can be said."""
    asked = []
    score = lambda questions: asked.extend(questions) or [[Score(1.0, 1, False), Score(0.5, 1, False)]]
    task = EvalTask("toy", "multiple_choice", [{"query": "q", "choices": ["a", "b", "b"], "gold": 1}])
    assert core.ask(task, letters, 1, score).correct[0] and list(map(len, asked)) == [2]
    same = EvalTask("toy", "schema", [{"context_options": ["c", "c"], "continuation": "d", "gold": 0}])
    assert core.ask(same, letters, 1, lambda questions: [[] for _ in questions]).correct[0]


def test_every_token_of_an_answer_must_be_the_likeliest():
    item = {"context": "a", "continuation": "bc"}
    assert ask_item(item, [0], "language_modeling") and not ask_item(item, [1], "language_modeling")


def test_core_is_the_mean_of_centered_accuracies():
    """0.5 right of a baseline of 0.25 is a third; 0 right is -1/3; their mean is CORE."""
    some, none = np.array([True, False]), np.zeros(4, bool)
    outcomes = [Outcome("a", some, 2, 0.25), Outcome("b", none, 4, 0.25), Outcome("c", ~none, 4, 0.0)]
    assert list(map(verdicts.accuracy, outcomes)) == [0.5, 0.0, 1.0]
    assert list(map(verdicts.centred, outcomes)) == pytest.approx([1 / 3, -1 / 3, 1.0])
    assert verdicts.core(outcomes) == pytest.approx(1 / 3)


# ----------------------------------------------------------------------------------------------------------------------
# The whole


MODEL = replace(device_batch_size=16, total_batch_size=16)  # batches of 288 tokens


@pytest.fixture(scope="module")
def logits():
    """The float64 model."""
    return functools.partial(gpt_logits, MODEL, widen(random_params(MODEL)))


@pytest.fixture(scope="module")
def made(logits):
    """What the bundle is made of."""
    return tasks(logits)


@pytest.fixture(scope="module")
def bundle(made, tmp_path_factory):
    return read_bundle(write_bundle(tmp_path_factory.mktemp("core"), made))


@pytest.fixture(scope="module")
def score():
    params = random_params(MODEL)
    return train.make_answerer(MODEL, train.GPT, train.make_mesh(jax.devices()[:1]))(params)


def verdicts_of(made, logits, limit=0):
    """{label: verdicts} by the slow scorer."""
    return {
        label: verdicts_reference(rows, kind, shots, delimiter, encode, BOS, logits, limit)[0]
        for label, kind, shots, delimiter, _, rows in made
    }


@pytest.mark.slow
def test_a_whole_core_is_the_slow_scorers(bundle, made, logits, score):
    """All tasks of a bundle made by hand: every example's verdict, and CORE, are those of the float64 scorer."""
    want = verdicts_of(made, logits)
    outcomes = [core.ask(task, encode_all, BOS, score) for task in bundle]
    assert {outcome.label: outcome.correct.tolist() for outcome in outcomes} == want
    mixed = [label for label, verdicts in want.items() if 0 < sum(verdicts) < len(verdicts)]
    assert len(mixed) >= 7 and "toy_words_near" in mixed
    baselines = {label: percent / 100 for label, _, _, _, percent, _ in made}
    shares = [(np.mean(found) - baselines[label]) / (1 - baselines[label]) for label, found in want.items()]
    assert verdicts.core(outcomes) == pytest.approx(np.mean(shares))


def test_a_part_of_core_is_the_slow_scorers(bundle, made, logits, score):
    """Of the first five of each task: examples come from these five."""
    outcomes = [core.ask(task, encode_all, BOS, score, limit=5) for task in bundle]
    assert {outcome.label: outcome.correct.tolist() for outcome in outcomes} == verdicts_of(made, logits, 5)
    assert outcomes[0].total == 14
