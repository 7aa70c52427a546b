"""CORE's algorithm, as nanochat and DCLM have it: prompts, the tokens that count, verdicts.

Shuffle, few-shot examples, prompts, spans and ties are those of nanochat's core_eval.py, so that the same model gets
the same verdict on every example. The metric is DCLM's (Li et al., 2024, arXiv 2406.11794). What scores the texts is
handed in, and may be any model.
"""

import itertools
import math
import os.path
import random
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from onechip.errors import UserError, require, say
from onechip.questions import TASK_KINDS, Outcome, Text

SHUFFLE_SEED, EXAMPLES_SEED = 1337, 1234
CHUNK = 1024  # questions whose tokens are held at one time: ten-shot prompts of four choices are 150 MB of them


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def choose_items(task, limit=0):
    """A task's items in the order of its seeded shuffle, the first `limit` of them if that is not 0.

    UserError if they are fewer than an item and its solved examples: those are drawn from what is left.
    """
    require(task.kind in TASK_KINDS, f"{task.label}: kind", task.kind, f"use one of {', '.join(TASK_KINDS)}")
    items = list(task.items)
    random.Random(SHUFFLE_SEED).shuffle(items)
    items = items[:limit] if limit else items
    needed = f"{task.shots} solved ones and a question take {task.shots + 1}"
    require(len(items) > task.shots, f"{task.label}: number of examples", len(items), needed)
    return items


def examples_for(items, i, shots):
    """The solved examples ahead of item i: `shots` others, drawn by a seed that is the item's own."""
    drawn = random.Random(EXAMPLES_SEED + i).sample(range(len(items) - 1), shots)  # places among all items but i
    return [items[j + (j >= i)] for j in drawn]


def solved(task, item):
    """(question, answer) of an item, as strings."""
    if task.kind == "multiple_choice":
        return str(item["query"]), str(item["choices"][item["gold"]])
    if task.kind == "schema":
        return str(item["context_options"][item["gold"]]), str(item["continuation"])
    return str(item["context"]).strip(), str(item["continuation"])


def render(task, item, examples):
    """The texts of an item: one for each choice or context; for language modelling, without and with its answer.

    Solved examples come first, a blank line after each. Equal to nanochat's templates character by character.
    """
    head = "".join(f"{q}{task.delimiter}{a}\n\n" for q, a in (solved(task, example) for example in examples))
    if task.kind == "multiple_choice":
        return [f"{head}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{head}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    question, answer = solved(task, item)
    without = f"{head}{question}{task.delimiter}"
    return [without.strip(), without + answer]


# ----------------------------------------------------------------------------------------------------------------------
# Questions


class Question(NamedTuple):
    """texts: of its choices, those of one content once; picks: which of the texts each choice is. Of no text is
    anything scored whose span is empty."""

    texts: list
    picks: list


def common_prefix(sequences):
    """How many tokens all lists begin with."""
    return len(os.path.commonprefix(sequences))  # of the least and the greatest list, compared in C


def spans(kind, sequences):
    """[(start, end)] of the tokens that count in each list of ids; of a language-modelling pair, in the second only."""
    if kind == "language_modeling":
        without, whole = sequences
        if len(without) >= len(whole) or without != whole[: len(without)]:
            raise UserError("the tokens of its prompt are not the first ones of prompt and answer")
        return [(len(without), len(whole))]
    if kind == "multiple_choice":
        start = common_prefix(sequences)
        return [(start, len(ids)) for ids in sequences]
    common = common_prefix([ids[::-1] for ids in sequences])
    return [(len(ids) - common, len(ids)) for ids in sequences]


def cut(text, max_tokens):
    """A Text's last max_tokens tokens, for a model that takes no more."""
    extra = len(text.tokens) - max_tokens
    if extra <= 0:
        return text
    if text.start < extra:
        raise UserError(f"has an answer longer than the {max_tokens} tokens that the model takes")
    return Text(text.tokens[extra:], text.start - extra, text.end - extra)


def make_question(task, picks, sequences, max_tokens=None):
    """The Question of an item from the ids of its texts, each begun by BOS."""
    found = spans(task.kind, sequences)
    texts = [Text(ids, *span) for ids, span in zip(sequences[-len(found) :], found, strict=True)]
    return Question([cut(text, max_tokens) for text in texts] if max_tokens else texts, picks)


def make_questions(task, items, numbers, encode, bos, max_tokens=None):
    """The Questions of the items of these numbers, all their texts encoded in one call."""
    prompts = [render(task, items[i], examples_for(items, i, task.shots)) for i in numbers]
    different = [list(dict.fromkeys(texts)) for texts in prompts]  # choices that are the same must score the same
    encoded = iter(encode(list(itertools.chain.from_iterable(different))))
    questions = []
    for i, texts, unique in zip(numbers, prompts, different, strict=True):
        sequences = [[bos, *next(encoded)] for _ in unique]
        picks = [unique.index(text) for text in texts]
        try:
            if task.kind == "language_modeling":
                sequences, picks = [sequences[pick] for pick in picks], [0]
            questions.append(make_question(task, picks, sequences, max_tokens))
        except UserError as error:
            raise UserError(f"{task.label}: example {i} of the shuffled ones: {error}") from None
    return questions


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def is_scored(text):
    """Whether anything of a Text can be scored: nothing is ahead of the first token, so it counts for nothing."""
    return 1 <= text.start < text.end


def mean_loss(score):
    """Nats a token of a Score; NaN if nothing was scored, as the mean over nothing is."""
    return math.nan if score is None else score.nats / score.count


def verdict(task, item, question, scores):
    """Whether an item is answered right; scores: of its texts, None where nothing can be scored.

    The least mean loss wins, the first of equal ones. A NaN wins if it is the first choice's and loses else, as
    Python's `min` has it: nanochat's rule, kept as it is.
    """
    if task.kind == "language_modeling":
        return scores[0] is not None and bool(scores[0].exact)
    losses = [mean_loss(scores[pick]) for pick in question.picks]
    return losses.index(min(losses)) == item["gold"]


def score_all(score, questions):
    """The Scores of the texts of each Question, None for those of which nothing can be scored."""
    asked = [[text for text in question.texts if is_scored(text)] for question in questions]
    found = (iter(scores) for scores in score(asked))
    return [
        [next(scores) if is_scored(text) else None for text in question.texts]
        for question, scores in zip(questions, found, strict=True)
    ]


def ask(task, encode, bos, score, limit=0, max_tokens=None):
    """The Outcome of a task, of all its examples or the first `limit` of the seeded shuffle.

    encode(texts) -> [ids], without BOS; bos: its id. score(questions: [[Text]]) -> [[Score]], the texts of one
    question together. max_tokens: of a model that takes no more, such as GPT-2's 1,024; the last ones are kept. While
    one chunk is scored, the next one is encoded.
    """
    items = choose_items(task, limit)
    correct, empty = np.zeros(len(items), bool), 0
    chunks = [range(start, min(start + CHUNK, len(items))) for start in range(0, len(items), CHUNK)]
    with ThreadPoolExecutor(1) as pool:
        prepare = lambda numbers: pool.submit(make_questions, task, items, numbers, encode, bos, max_tokens)
        coming = prepare(chunks[0])
        for numbers, following in itertools.zip_longest(chunks, chunks[1:]):
            questions = coming.result()
            coming = prepare(following) if following else None
            for i, question, scores in zip(numbers, questions, score_all(score, questions), strict=True):
                correct[i] = verdict(task, items[i], question, scores)
                empty += None in scores
    if empty:
        say(f"{task.label}: {empty} of {len(items)} examples have an answer with no token of its own to score")
    return Outcome(task.label, correct, len(task.items), task.baseline, task.ceiling)
