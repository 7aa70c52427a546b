"""What a chat model is asked: ARC, MMLU, GSM8K, HumanEval, as nanochat asks them, and ChatCORE, their mean.

A categorical task is answered by the likeliest of its letters, which is scored; a generative one by a text, which is
graded. Data are the Hub's own, in the order that nanochat has them in.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from onechip.conversations import render_prompt
from onechip.errors import UserError, require
from onechip.graders import calculator_parts, checked_program, same_number
from onechip.hubdata import Table, load_rows
from onechip.questions import Outcome, Text

ANSWER_TOKENS = 512  # that a generated answer may have
ASKED_AT_ONCE = 1024  # questions whose tokens are held at one time


class ChatTask(NamedTuple):
    """A list of examples to ask a chat model.

    items: dicts with "messages", a conversation whose last message is the reference answer; "letters", the answers to
    choose from, in a categorical task; what its grader needs in others. grade(item, answer, run) -> bool; None for a
    categorical one. total: how many examples the data have; baseline: the accuracy of guessing.
    """

    label: str
    items: list
    grade: Callable | None
    total: int
    baseline: float = 0.0
    revision: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# From rows to examples


def conversation(question, answer, **more):
    """An example of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def choice_prompt(question, letters, choices):
    """A question with its choices; a letter follows each, without a blank, so that it is the answer's very token."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def arc_item(row):
    """An example of ARC (Clark et al., 2018): three to five choices, named A to E or 1 to 5."""
    letters, choices, answer = row["choices"]["label"], row["choices"]["text"], row["answerKey"]
    require(answer in letters, "answerKey", answer, f"must be one of {', '.join(letters)}")
    return conversation(choice_prompt(row["question"], letters, choices), answer, letters=letters)


def mmlu_item(row):
    """An example of MMLU (Hendrycks et al., 2021): four choices; "answer" is the number of the right one."""
    letters, choices, answer = list("ABCD"), row["choices"], row["answer"]
    require(len(choices) == 4 and answer in range(4), "answer", answer, "must be 0 to 3, of four choices")
    prompt = choice_prompt(row["question"], letters, choices)
    return conversation(prompt, letters[answer], letters=letters, subject=row["subject"])


def gsm8k_item(row):
    """An example of GSM8K (Cobbe et al., 2021), whose solution calls the calculator and ends in "#### number"."""
    return conversation(row["question"], calculator_parts(row["answer"]))


def humaneval_item(row):
    """An example of HumanEval (Chen et al., 2021): the head of a function, to be written out."""
    solution = f"{row['prompt']}\n{row['canonical_solution']}"
    return conversation(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])


def grade_number(item, answer, run=None):
    """Whether the answer has the number that the reference's last part has."""
    return same_number(item["messages"][-1]["content"][-1]["text"], answer)


def grade_program(item, answer, run):
    """Whether the answer's function passes the example's tests. run(program) -> whether it ended without an error."""
    prompt = item["messages"][0]["content"]
    return bool(run(checked_program(prompt, answer, item["test"], item["entry_point"])))


class Source(NamedTuple):
    """Where a task comes from: a Table, make(row) -> item, and what ChatTask has of it."""

    table: Table
    make: Callable
    grade: Callable | None
    baseline: float


ARC_COLUMNS = ("question", "choices", "answerKey")
CHAT_CORE = {
    "ARC-Easy": Source(Table("allenai/ai2_arc", "ARC-Easy", "test", ARC_COLUMNS), arc_item, None, 0.25),
    "ARC-Challenge": Source(Table("allenai/ai2_arc", "ARC-Challenge", "test", ARC_COLUMNS), arc_item, None, 0.25),
    "MMLU": Source(
        Table("cais/mmlu", "all", "test", ("question", "choices", "answer", "subject")), mmlu_item, None, 0.25
    ),
    "GSM8K": Source(Table("openai/gsm8k", "main", "test", ("question", "answer")), gsm8k_item, grade_number, 0.0),
    "HumanEval": Source(
        Table(
            "openai/openai_humaneval", "openai_humaneval", "test",
            ("prompt", "canonical_solution", "entry_point", "test"),
        ),
        humaneval_item, grade_program, 0.0,
    ),
}  # fmt: skip


def load_task(label, limit=0):
    """The ChatTask of a key of CHAT_CORE with its first `limit` examples, all if it is 0; UserError names a bad row."""
    require(label in CHAT_CORE, "task", label, f"use one of {', '.join(CHAT_CORE)}")
    source, items = CHAT_CORE[label], []
    rows, total, revision = load_rows(source.table, limit)
    for i, row in enumerate(rows):
        try:
            items.append(source.make(row))
        except (UserError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{label}: example {i} of the shuffled ones is malformed ({error})") from None
    return ChatTask(label, items, source.grade, total, source.baseline, revision)


# ----------------------------------------------------------------------------------------------------------------------
# Asking


def letter_ids(tokens, letters):
    """The token of each letter, as an answer has it; UserError for one that is several tokens."""
    ids = [tokens.encode(letter) for letter in letters]
    for letter, found in zip(letters, ids, strict=True):
        require(len(found) == 1, "letter", letter, f"must be one token to be compared, here it is {len(found)}")
    return [found[0] for found in ids]


def letter_question(tokens, item):
    """An example's Texts, one for each letter, of which the letter alone is scored, right after <|assistant_start|>."""
    prompt = render_prompt(tokens, item["messages"][:-1])
    return [Text([*prompt, letter], len(prompt), len(prompt) + 1) for letter in letter_ids(tokens, item["letters"])]


def ask_letters(task, tokens, score, limit=0):
    """The Outcome of a categorical task: right is whose likeliest letter, the first of equal ones, is the reference's.

    tokens: ChatTokens; score: a scorer; limit: how many examples, 0 for all that the task holds.
    """
    items, correct = task.items[:limit] if limit else task.items, []
    for at in range(0, len(items), ASKED_AT_ONCE):
        chunk = items[at : at + ASKED_AT_ONCE]
        for item, scores in zip(chunk, score([letter_question(tokens, item) for item in chunk]), strict=True):
            likeliest = min(range(len(scores)), key=lambda k: scores[k].nats)
            correct.append(item["letters"][likeliest] == item["messages"][-1]["content"])
    return Outcome(task.label, np.array(correct, bool), task.total, task.baseline)


def ask_generations(task, tokens, generate, run=None, limit=0):
    """The Outcome of a generative task.

    generate(prompts: [ids], max_tokens) -> [text], greedy, with tools at hand; run: the sandbox, see grade_program.
    """
    items = task.items[:limit] if limit else task.items
    require(task.grade is not grade_program or run, "run", run, "programs need a sandbox to run in")
    prompts = [render_prompt(tokens, item["messages"][:-1]) for item in items]
    answers = generate(prompts, ANSWER_TOKENS)
    correct = [task.grade(item, answer, run) for item, answer in zip(items, answers, strict=True)]
    return Outcome(task.label, np.array(correct, bool), task.total, task.baseline)


def chat_core(outcomes):
    """ChatCORE: the mean over its five tasks of (accuracy - baseline) / (1 - baseline); others are left out.

    Until July 2026 nanochat's had SpellingBee as a sixth: its older figures are means of six. UserError if a task is
    absent or stands there twice.
    """
    labels = [outcome.label for outcome in outcomes]
    for label in CHAT_CORE:
        require(labels.count(label) == 1, "tasks", labels, f"ChatCORE needs {label} once")
    own = [outcome for outcome in outcomes if outcome.label in CHAT_CORE]
    return float(np.mean([(np.mean(o.correct) - o.baseline) / (1 - o.baseline) for o in own]))
