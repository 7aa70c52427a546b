"""03 with --task chat: trials that fine-tune one base, the best of them, what is refused, a trial that is resumed."""

import importlib
import json
import shlex
import shutil
import time

import pytest
from corpus import newest, tiny, train_tiny

from onechip.errors import UserError

train = importlib.import_module("02_train")
worker = importlib.import_module("03_worker")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

SMALL = (
    "--task chat --preset laptop --num_iterations 8 --evaluations 2 --eval_tokens 192 --any_version true --run_cap 2"
)


@pytest.fixture(scope="module")
def base(corpus, tokenizer, tmp_path_factory):
    """A pretrained run of 3 steps with 48 tokens of context."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    train_tiny(corpus, tokenizer, folder, config=tiny(seq_len=48, num_iterations=3, eval_every=0, save_every=0))
    return folder


def open_small(base, out, more=""):
    """(backend, material) of the smallest sweep over a base."""
    words = f"{SMALL} --mixture calculator:40 --base {shlex.quote(str(base))} --out {shlex.quote(str(out))} --name s"
    backend, _, material = worker.open_sweep(f"{words} {more}")
    return backend, material


def job_of(backend, folder, **more):
    """A Job with values in the middle of the space."""
    values = {"learning_rate": 1e-3, "final_lr_frac": 0.1, "warmdown_ratio": 0.5}
    parameters = worker.constants(backend.sweep) | values
    return worker.Job(folder.name, parameters, folder, worker.Request(), metric="val_loss", **more)


@pytest.fixture
def as_cell(monkeypatch):
    """Settings come from the text alone, not from pytest's command line."""
    monkeypatch.setattr("sys.argv", ["03_worker.py"])


@pytest.mark.slow
def test_two_trials_fine_tune_the_base_and_the_better_is_named(base, tmp_path, as_cell, capsys):
    """Both finish with a loss of a supervised token at their evaluations, and the command is 07's with the base."""
    backend, material = open_small(base, tmp_path)
    backend.work(material)
    trials = backend.trials()
    assert [trial["state"] for trial in trials] == ["finished"] * 2
    assert all([row["step"] for row in trial["rows"]] == [4, 8] for trial in trials)
    about = json.loads((backend.folder / "trial-0001" / "config.json").read_text())
    assert about["data"] == {"name": "conversations", "revision": material.revision}
    worker.show_results(backend)
    best = min(trials, key=lambda trial: min(row["val_loss"] for row in trial["rows"]))["parameters"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("best: "))
    assert line.startswith(f"best: uv run 07_chat.py --model {base} --mixture 'calculator:40'")
    assert f"--learning_rate {best['learning_rate']}" in line


@pytest.mark.slow
def test_a_stopped_trial_resumes_to_the_same_bits(base, tmp_path, as_cell):
    """Stopped after its first evaluation, it ends with the scores and the weights of one that was not stopped."""
    backend, material = open_small(base, tmp_path)

    class Interrupt:
        requested = False

    def interrupt(rows):
        Interrupt.requested = True
        time.sleep(0.5)

    kept = {}

    def keep(rows):
        if len(rows) == 2:
            kept["params"] = (newest(folder) / "params.safetensors").read_bytes()

    cut = job_of(backend, tmp_path / "cut", on_evaluation=interrupt)
    assert worker.run_trial(cut, material, Interrupt).state == "interrupted"
    ends = []
    for name in ("cut", "straight"):
        folder = tmp_path / name
        job = job_of(backend, folder, on_evaluation=keep)
        assert worker.run_trial(job, material) == ("finished", "")
        ends.append((worker.read_evaluations(folder, "val_loss"), kept.pop("params")))
    assert ends[0] == ends[1] and len(ends[0][0]) == 2


@pytest.mark.slow
def test_another_base_or_task_cannot_join_a_sweep(base, corpus, tokenizer, tmp_path, as_cell):
    """The hash of weights and moments is the sweep's: the same ones elsewhere go on, others are refused."""
    backend, _ = open_small(base, tmp_path / "out")
    assert worker.constants(backend.sweep)["base"] == str(base)
    shutil.copytree(base, tmp_path / "same")
    open_small(tmp_path / "same", tmp_path / "out")
    other = tiny(seq_len=48, num_iterations=3, eval_every=0, save_every=0, param_seed=7)
    train_tiny(corpus, tokenizer, tmp_path / "other", config=other)
    with pytest.raises(
        UserError, match=r"^base='.*other'.*: the sweep began with other weights or moments, of .*: use those$"
    ):
        open_small(tmp_path / "other", tmp_path / "out")
    with pytest.raises(UserError, match="^task='pretraining': the sweep is of chat"):
        worker.check_facts(backend.sweep, {})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--task chta", "^task='chta': use pretraining or chat"),
        ("--base nowhere", "^model='nowhere': no such folder"),
        ("--n_head 3", "^field='n_head': stays as the base has it"),
        ("--model nanochat", "^model='nanochat': the base is gpt"),
        ("--task pretraining", "^base='.*': belongs to --task chat"),
        ("--mixture calculater:3", "calculater"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(base, tmp_path, as_cell, more, said):
    """Before anything is written."""
    with pytest.raises(UserError, match=said) as error:
        open_small(base, tmp_path / "out", more)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "s").exists()


def test_a_sweep_without_a_task_is_one_of_pretraining():
    """Those that were created before there was a choice go on."""
    assert worker.task_of({"model": "gpt"}) is worker.PRETRAINING
    worker.check_facts({"parameters": {"model": {"value": "gpt"}}}, {})
