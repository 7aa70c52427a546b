"""06: whom it asks, on what, what it says and leaves; GPT-2's own format; a run that asks while it trains."""

import importlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from bundle import tasks as toy_tasks
from bundle import write_bundle
from conftest import ROOT
from corpus import PROMPTS, read_rows, tiny, train_tiny
from execute import TINY
from tiny_gpt2 import reference_score, write_gpt2

from onechip import core, verdicts
from onechip.conversations import assistant_parts, chat_tokens
from onechip.errors import UserError
from onechip.evalfile import load_evaluation
from onechip.questions import Text
from onechip.runfolder import newest_run
from onechip.talker import text_of

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
ev = importlib.import_module("06_eval")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle of nine toy tasks."""
    return write_bundle(tmp_path_factory.mktemp("bundle"), toy_tasks())


@pytest.fixture(scope="module")
def runs(corpus, tokenizer, tmp_path_factory):
    """A folder with two runs: `first`, of 4 steps, and `second`, of 2, which is the newer one."""
    out = tmp_path_factory.mktemp("evaluated")
    for i, (name, steps) in enumerate((("first", 4), ("second", 2))):
        train_tiny(corpus, tokenizer, out / name, config=tiny(num_iterations=steps), prompts=PROMPTS)
        for path in (out / name / "checkpoints").iterdir():
            os.utime(path, (1e9 + i, 1e9 + i))
    (out / "empty").mkdir()
    return out


@pytest.mark.slow
def test_the_newest_run_is_asked(runs, tmp_path):
    """The one whose checkpoint is the newest; None where no folder has one."""
    assert newest_run(runs) == str(runs / "second") and newest_run(tmp_path) is None
    assert newest_run(runs, lambda about: about["config"]["num_iterations"] == 4) == str(runs / "first")


def test_a_run_is_opened_with_its_own_tokenizer_and_step(runs, tokenizer):
    """Name, step and facts are the run's; its texts are encoded without the token that opens a document."""
    subject = ev.open_subject(str(runs / "first"), "unused")
    assert (subject.name, subject.step, subject.folder, subject.cropped) == ("first", 4, runs / "first", False)
    assert subject.encode(["the water"]) == [tokenizer.encode("the water").ids]
    assert subject.bos == tokenizer.token_to_id("<|bos|>") and subject.context == 24
    tokens = 4 * tiny().total_batch_size * 24
    assert subject.facts["trained"] == f"4 of 4 steps, {tokens:,} tokens"
    assert subject.facts["training FLOPs"] == f"{tokens * train.flops_per_token(tiny()):.3g}"


def test_its_scores_are_those_of_the_model(runs):
    """What it says of a text is the cross-entropy of `forward`'s logits."""
    subject = ev.open_subject(str(runs / "first"), "unused")
    config, params, _, model = train.open_model(runs / "first")
    tokens = [subject.bos, *subject.encode(["the of and energy water"])[0]]
    [[score]] = subject.score([[Text(tokens, 2, len(tokens))]])
    logits = train.forward(config, params, np.array([tokens]), model)[0]
    losses = -jax.nn.log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
    assert score.nats == pytest.approx(float(losses[1:].sum()), rel=1e-4) and score.count == len(tokens) - 2


def test_others_models_are_told_from_ours(runs, tmp_path):
    """By a short name, a prefix, or a config.json of their kind; a run or an export never is one."""
    write_gpt2(tmp_path / "theirs")
    assert all(map(ev.is_others, ("gpt2", "gpt2-xl", "hf:owner/name", str(tmp_path / "theirs"))))
    assert not any(map(ev.is_others, (str(runs / "first"), "owner/name", str(tmp_path / "absent"))))


def test_gpt2_is_asked_by_its_own_rules(bundle, tmp_path):
    """A folder in GPT-2's format: scores by a float64 reference, prompts cropped to its context, its own report."""
    arrays = write_gpt2(tmp_path / "gpt2-tiny")
    subject = ev.open_subject(str(tmp_path / "gpt2-tiny"), str(tmp_path / "out"))
    assert subject.cropped and subject.context == 23 and subject.folder.parent == tmp_path / "out"
    ids = [subject.bos, *subject.encode(["the plant water 1024 number of energy"])[0]][:20]
    text = Text(ids, len(ids) - 3, len(ids))
    [[score]] = subject.score([[text]])
    assert score.nats == pytest.approx(reference_score(arrays, text)[0], rel=1e-4)


@pytest.mark.parametrize("words, message", [("copa", "tasks='copa': use core, made, chat, or labels: toy_choice, "),
                                            ("toy_choice,x", "tasks='x': ")])  # fmt: skip
def test_a_task_that_is_not_there_is_named(bundle, corpus, words, message):
    settings = ev.Settings(tasks=words, bundle=str(bundle))
    with pytest.raises(UserError, match=f"^{message}"):
        ev.choose_tasks(settings, corpus)


def test_tasks_are_chosen_by_label_or_by_the_data(bundle, corpus):
    """Labels choose from a suite, whose size stays known; without any, all; a folder's corpus gets made tasks."""
    suite, tasks, asked = ev.choose_tasks(ev.Settings(tasks="toy_schema,toy_choice", bundle=str(bundle)), corpus)
    assert (suite, len(tasks), [task.label for task in asked]) == ("CORE", 9, ["toy_choice", "toy_schema"])
    suite, tasks, asked = ev.choose_tasks(ev.Settings(), corpus)
    assert suite == "made" and asked == tasks and len(tasks) > 5


def test_chat_tasks_are_chosen_by_label_and_left_out_with_a_reason(corpus, monkeypatch):
    """SpellingBee alone is one of ChatCORE's; a task that cannot be graded here is not asked, and none is refused."""
    suite, tasks, asked = ev.choose_tasks(ev.Settings(tasks="SpellingBee", examples=2), corpus)
    assert (suite, [task.label for task in tasks], asked) == ("ChatCORE", ["SpellingBee"], tasks)
    other = tasks[0]._replace(label="HumanEval")
    monkeypatch.setattr(ev, "why_not", lambda task: "no sandbox" if task.label == "HumanEval" else "")
    assert ev.leave_out([*tasks, other]) == (tasks, {"HumanEval": "no sandbox"})
    assert ev.chat_facts([], {"HumanEval": "no sandbox"}) == {"HumanEval, left out": "no sandbox"}
    with pytest.raises(UserError, match="^tasks='HumanEval': none can be graded here: no sandbox$"):
        ev.leave_out([other])


@pytest.mark.slow
def test_a_run_writes_what_generate_writes(runs, tokenizer):
    """The answers of a subject are its model's own likeliest tokens, without what was asked."""
    subject, prompt = ev.open_subject(str(runs / "first"), "unused"), tokenizer.encode("the water").ids
    config, params, _, model = train.open_model(runs / "first")
    ids, tokens = train.generate(config, params, prompt, 6, model=model), chat_tokens(tokenizer)
    assert tokens.python_end not in ids
    assert subject.write([prompt], 6) == [text_of(assistant_parts(tokens, ids, tokenizer.decode))]


def evaluate(folder, *words):
    """What the command prints."""
    command = [sys.executable, str(ROOT / "06_eval.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_command_evaluates_reports_and_repeats(runs, bundle, corpus, tmp_path):
    """A line a task, bits per byte, a report, a comparison; the same digits again; an exported model's card has it."""
    words = "--out", str(runs), "--bundle", str(bundle), "--data", str(corpus.train[0].parent), "--text_bytes", "1000"
    model = runs / "second" / "model"
    model.mkdir()
    (model / "README.md").write_text("# second\n\n## Load it and sample\n\nlines\n")
    first = evaluate(tmp_path, *words)
    assert "model: second, after 2 steps" in first and "val_bpb: " in first and "train_bpb: " in first
    assert all(f"\n{task[0]} " in first for task in toy_tasks())
    kept = (runs / "second" / "eval.json").read_bytes()
    card = (model / "README.md").read_text()
    assert "## How good it is\n\n**CORE: " in card and "| licence |" in card and (model / "report.png").exists()

    again = evaluate(tmp_path, *words, "--compare", str(runs / "second"))
    assert (runs / "second" / "eval.json").read_bytes() == kept
    assert "These examples do not tell the two apart." in again
    assert (model / "README.md").read_text() == card

    other = evaluate(tmp_path, *words, "--model", str(runs / "first"), "--tasks", "toy_choice", "--examples", "5")
    assert "first 5 of 14" in other and "CORE, of a subset: " in other
    evaluation = load_evaluation(runs / "first" / "eval.json")
    assert [len(outcome.correct) for outcome in evaluation.outcomes] == [5]
    refused = subprocess.run(
        [sys.executable, str(ROOT / "06_eval.py"), *words, "--compare", str(runs / "first")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode and "error: limits=" in refused.stderr and "toy_choice" not in refused.stdout


@pytest.mark.slow
def test_where_there_is_no_run_one_is_trained_first(tmp_path, monkeypatch, capsys):
    """In an empty folder 02's model of the laptop preset is trained, and is the same run as `uv run 02_train.py`."""
    small = dict(zip(TINY["02_train"].split()[::2], TINY["02_train"].split()[1::2], strict=True))
    fields = {name[2:]: int(value) for name, value in small.items()}
    monkeypatch.setitem(train.PRESETS, "laptop", train.PRESETS["laptop"] | fields)
    folder = train.train_first(str(tmp_path))
    assert "no run in" in capsys.readouterr().out and newest_run(tmp_path) == folder
    subject = ev.open_subject(folder, str(tmp_path))
    assert subject.data["name"] == "stdlib" and ev.corpus_of(subject, "").name == "stdlib"


@pytest.mark.slow
def test_a_run_asks_while_it_trains(corpus, tokenizer, tmp_path):
    """With eval_core_every, metrics.jsonl has the score of the made tasks and each task's accuracy; a subset is called
    one, and the figures are those of an evaluation by itself."""
    config = tiny(num_iterations=4, eval_core_every=3, eval_core_examples=6)
    result = train_tiny(corpus, tokenizer, tmp_path / "run", config=config)
    rows = [row for row in read_rows(tmp_path / "run") if "tasks/made_subset" in row]
    assert [row["step"] for row in rows] == [3, 4]
    suite, tasks = train.suite_for(corpus)
    score = train.make_answerer(config, train.GPT, train.make_mesh())(result.params)
    encode = lambda texts: [tokenizer.encode(text).ids for text in texts]
    outcomes = [core.ask(task, encode, tok.opening_id(tokenizer), score, 6) for task in tasks]
    assert rows[1]["tasks/made_subset"] == pytest.approx(verdicts.core(outcomes))
    assert {f"tasks/{o.label}": verdicts.accuracy(o) for o in outcomes}.items() <= rows[1].items()


def test_settings_are_refused_by_name():
    with pytest.raises(UserError, match="^examples=-1"):
        ev.Settings(examples=-1)
