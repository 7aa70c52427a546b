"""onechip/chat_tasks.py: what is asked, who is right, and ChatCORE."""

import chat_data
import numpy as np
import pytest
from hub import connected_hub

from onechip import chat_tasks
from onechip.chat_tasks import CHAT_CORE, ChatTask, ask_generations, ask_letters, chat_core, load_task
from onechip.conversations import ChatTokens, chat_tokens, render_prompt
from onechip.errors import UserError
from onechip.questions import Outcome, Score


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """{label: ChatTask} of all five, through a loopback Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECHIP_HOME", str(tmp_path_factory.mktemp("home")))
        with connected_hub(patch) as hub:
            commits = chat_data.add_exports(hub)
            tasks = {label: load_task(label) for label in CHAT_CORE}
            assert {task.revision for task in tasks.values()} == set(commits.values())
    return tasks


def test_questions_of_each_task(tasks):
    """The prompt's text, the reference answer and what else an example has, of the first row in the seeded order."""
    first = {
        label: chat_data.EXPORTS[source.table.repo][f"{source.table.subset}/test"]
        for label, source in CHAT_CORE.items()
    }
    first = {label: rows[np.random.default_rng(42).permutation(len(rows))[0]] for label, rows in first.items()}
    row, item = first["ARC-Easy"], tasks["ARC-Easy"].items[0]
    lines = [f"- {c}={k}" for c, k in zip(row["choices"]["text"], row["choices"]["label"], strict=True)]
    prompt = "\n".join(
        [
            f"Multiple Choice question: {row['question']}",
            *lines,
            "",
            "Respond only with the letter of the correct answer.",
        ]
    )
    assert item["messages"] == [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["answerKey"]}]
    assert item["letters"] == row["choices"]["label"]
    row, item = first["MMLU"], tasks["MMLU"].items[0]
    assert f"- {row['choices'][2]}=C\n" in item["messages"][0]["content"] and item["subject"] == "astronomy"
    assert item["messages"][1]["content"] == "ABCD"[row["answer"]]
    row, item = first["GSM8K"], tasks["GSM8K"].items[0]
    kinds = [part["type"] for part in item["messages"][1]["content"]]
    assert item["messages"][0]["content"] == row["question"] and kinds == ["text", "python", "python_output", "text"]
    row, item = first["HumanEval"], tasks["HumanEval"].items[0]
    assert item["messages"][0]["content"] == row["prompt"] and item["entry_point"] == row["entry_point"]
    assert {label: (task.total, task.baseline) for label, task in tasks.items()} == {
        "ARC-Easy": (11, 0.25), "ARC-Challenge": (7, 0.25), "MMLU": (13, 0.25), "GSM8K": (7, 0), "HumanEval": (5, 0)
    }  # fmt: skip


def test_letters_by_their_logits(tasks, tokenizer):
    """Right is whose likeliest letter, of those that the question has, is the answer's: against an argmax over random
    logits, of which some are equal."""
    tokens, draw, asked = chat_tokens(tokenizer), np.random.default_rng(1), {}

    def score(questions):
        scores = []
        for texts in questions:
            prompt = tuple(texts[0].tokens[:-1])
            logits = asked.setdefault(prompt, draw.integers(0, 4, tokenizer.get_vocab_size()).astype(float))
            assert all(
                tuple(t.tokens[:-1]) == prompt and (t.start, t.end) == (len(prompt), len(prompt) + 1) for t in texts
            )
            scores.append([Score(9.0 - logits[text.tokens[-1]], 1, False) for text in texts])
        return scores

    for label in ("ARC-Easy", "ARC-Challenge", "MMLU"):
        outcome = ask_letters(tasks[label], tokens, score)
        for item, correct in zip(tasks[label].items, outcome.correct, strict=True):
            prompt = render_prompt(tokens, item["messages"][:1])
            assert prompt[-1] == tokens.assistant_start
            logits = asked[tuple(prompt)][[tokenizer.token_to_id(letter) for letter in item["letters"]]]
            assert correct == (item["letters"][int(np.argmax(logits))] == item["messages"][1]["content"])
        assert (outcome.label, outcome.total, outcome.baseline) == (label, tasks[label].total, 0.25)
        assert len(outcome.correct) == tasks[label].total and 0 < outcome.correct.sum() < outcome.total
    assert len(ask_letters(tasks["MMLU"], tokens, score, limit=5).correct) == 5


def test_letters_must_be_one_token(tasks, tokenizer):
    """A tokenizer that spells a letter in two cannot be asked."""
    tokens = chat_tokens(tokenizer)._replace(encode=lambda text: [1, 2] if len(text) == 1 else [3])
    with pytest.raises(UserError, match="letter='A': must be one token"):
        ask_letters(tasks["MMLU"], tokens, None)


def test_generated_answers(tasks, tokenizer):
    """The prompts go in as ids; each answer is graded against its own example; programs need a sandbox."""
    tokens, seen = chat_tokens(tokenizer), []

    def generate(prompts, max_tokens):
        seen.extend(prompts)
        assert max_tokens == 512
        return answers

    items = tasks["GSM8K"].items
    numbers = [item["messages"][1]["content"][-1]["text"].split()[-1] for item in items]
    answers = [f"... #### {int(n):,}" if i % 3 else f"#### {int(n) + 1}" for i, n in enumerate(numbers)]
    outcome = ask_generations(tasks["GSM8K"], tokens, generate)
    assert outcome.correct.tolist() == [bool(i % 3) for i in range(7)] and outcome.baseline == 0
    assert seen == [render_prompt(tokens, item["messages"][:1]) for item in items]

    answers, ran = [f"```python\nanswer {i}\n```" for i in range(3)], []

    def run(program):
        ran.append(program)
        return "answer 1" in program

    assert ask_generations(tasks["HumanEval"], tokens, generate, run, limit=3).correct.tolist() == [False, True, False]
    assert all(program.startswith("from typing import List\n\nanswer") for program in ran)
    assert [program.splitlines()[-1] for program in ran] == [
        f"check({i['entry_point']})" for i in tasks["HumanEval"].items[:3]
    ]
    with pytest.raises(UserError, match="run=None: programs need a sandbox"):
        ask_generations(tasks["HumanEval"], tokens, generate)


def outcomes(**accuracies):
    """Outcomes of ten examples each, of all five tasks and whatever else is named."""
    found = {"ARC-Easy": 6, "ARC-Challenge": 4, "MMLU": 3, "GSM8K": 1, "HumanEval": 2} | accuracies
    baseline = lambda label: CHAT_CORE[label].baseline if label in CHAT_CORE else 0.0
    return [Outcome(label, np.arange(10) < right, 10, baseline(label)) for label, right in found.items()]


def test_chat_core_by_hand():
    """(0.35 + 0.15 + 0.05) / 0.75 and 0.1 + 0.2, over five; SpellingBee counts nothing; all five are needed once."""
    assert chat_core(outcomes()) == pytest.approx(((0.35 + 0.15 + 0.05) / 0.75 + 0.3) / 5)
    assert chat_core(outcomes(SpellingBee=9)) == chat_core(outcomes())
    with pytest.raises(UserError, match="ChatCORE needs MMLU once"):
        chat_core([outcome for outcome in outcomes() if outcome.label != "MMLU"])
    with pytest.raises(UserError, match="ChatCORE needs GSM8K once"):
        chat_core([*outcomes(), outcomes()[3]])


def test_a_malformed_row_is_named(monkeypatch):
    """The task, which example, and what is wrong with it."""
    rows = [*chat_data.arc_rows(2, 0), chat_data.arc_rows(1, 9)[0] | {"answerKey": "Z"}]
    monkeypatch.setattr(chat_tasks, "load_rows", lambda table, limit: (rows, 3, "0" * 40))
    with pytest.raises(
        UserError, match="ARC-Easy: example 2 of the shuffled ones is malformed .answerKey='Z': must be"
    ):
        load_task("ARC-Easy")
    rows[2] = {"question": "x", "choices": None, "answerKey": "A"}
    with pytest.raises(UserError, match="ARC-Easy: example 2"):
        load_task("ARC-Easy")
    with pytest.raises(UserError, match="task='Nope': use one of ARC-Easy"):
        load_task("Nope")


def test_items_are_asked_in_parts_of_bounded_size(monkeypatch, tokenizer):
    """More questions than are held at once give the verdicts of all, in order."""
    monkeypatch.setattr(chat_tasks, "ASKED_AT_ONCE", 4)
    items = [chat_tasks.mmlu_item(row) for row in chat_data.MMLU_ROWS]
    tokens, sizes = chat_tokens(tokenizer), []

    def score(questions):
        sizes.append(len(questions))
        return [[Score(float(k != 2), 1, False) for k in range(4)] for _ in questions]

    outcome = ask_letters(ChatTask("MMLU", items, None, 13, 0.25), tokens, score)
    assert sizes == [4, 4, 4, 1] and outcome.correct.tolist() == [row["answer"] == 2 for row in chat_data.MMLU_ROWS]
    assert isinstance(tokens, ChatTokens)
