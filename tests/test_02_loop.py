"""02's training loop: what a run leaves, runs that are cut off and resumed, what goes wrong, and the command."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import hub as loopback
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT
from corpus import (
    PROMPTS,
    ROWS,
    TINY,
    VOCAB,
    assert_same_end,
    is_one_line,
    list_checkpoints,
    newest,
    pack,
    read_record,
    read_rows,
    tiny,
    train_tiny,
    without_times,
)
from fakes import pretend_notebook
from hub import Fault, Hub, connected_hub
from safetensors.numpy import load_file

from onechip import session
from onechip.checkpoints import write_checkpoint
from onechip.errors import UserError
from onechip.fit import peak_rate
from onechip.machine import read_secret
from onechip.mirror import open_mirror
from onechip.session import Session
from onechip.settings import Run, choose, fixed_fields
from onechip.weights import Weight, constant, draw_weights, normal, uniform

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Draws no pictures, which take longer than these runs; returns the rows that each would be drawn from."""
    pictures = []
    monkeypatch.setattr(session, "plot_losses", lambda rows, *args: pictures.append([dict(row) for row in rows]))
    return pictures


def threads():
    """Threads of ours that are still there."""
    return [thread.name for thread in threading.enumerate() if thread.name in ("loader", "checkpoint")]


def wait_until(condition, seconds=10.0):
    """Polls; a loaded machine gets its time, a quick one does not wait."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def raising(error):
    """A function of anything that raises the error."""

    def fail(*args):
        raise error

    return fail


# ----------------------------------------------------------------------------------------------------------------------
# What a run in one go leaves


@pytest.mark.slow
def test_metrics_are_one_row_per_step_and_one_per_evaluation(straight):
    """Every step in order, with finite loss, grad_norm and lr; evaluations where they are due; on_log got the same."""
    result, logged = straight
    rows = read_rows(result.run_dir)
    assert rows == logged
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 27))
    assert all(set(row) == {"step", "loss", "grad_norm", "lr"} for row in steps)
    assert all(math.isfinite(value) and value > 0 for row in steps for value in row.values() if value is not row["lr"])
    rates = [float(train.learning_rate_at(tiny(), i)) for i in range(26)]
    np.testing.assert_allclose([row["lr"] for row in steps], rates, rtol=1e-6)
    evals = [row for row in rows if "val_bpb" in row]
    assert [row["step"] for row in evals] == [8, 16, 24, 26]
    assert all(set(row) == {"step", "val_loss", "val_bpb"} for row in evals)
    order = [(row["step"], "val_bpb" in row) for row in rows]
    assert order == sorted(order), "an evaluation's row comes after its step's"


def test_the_loss_begins_at_log_v_and_falls(straight):
    """At the start every token is as likely as any other; after 26 steps on twenty words it must be far below."""
    rows = [row for row in straight[1] if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.8


def test_the_result_is_what_the_run_reached(straight, corpus, tokenizer):
    """Result holds the last evaluation, the step, gzip's figure, the folder, and parameters that give that score."""
    result, rows = straight
    assert result.step == 26 and {"step": 26, "val_loss": result.val_loss, "val_bpb": result.val_bpb} == rows[-1]
    task = train.pretraining(tiny(), corpus, tokenizer)
    assert (
        result.gzip_bpb
        == task.facts["gzip_bits_per_byte"]
        == tok.load_held_out(tokenizer, corpus, ROWS * 24, 24).gzip_bpb
    )
    score = task.score(tiny(), train.GPT, train.make_mesh())(result.params)
    assert score["val_loss"] == pytest.approx(result.val_loss, rel=1e-6)
    assert score["val_bpb"] == pytest.approx(result.val_bpb, rel=1e-6)


def test_the_last_checkpoint_holds_the_trained_parameters(straight):
    """params.safetensors, read by the library itself, is result.params name by name and bit for bit."""
    result, _ = straight
    names = list_checkpoints(result.run_dir)
    assert names == [f"step_{step:08d}" for step in (6, 8, 12, 16, 18, 24, 26)]
    last = result.run_dir / "checkpoints" / names[-1]
    arrays = load_file(last / "params.safetensors")
    expected = {name: result.params[name] for name in ("wte", "lm_head", "resid_lambdas", "x0_lambdas")}
    for i, layer in enumerate(result.params["layers"]):
        expected |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    assert set(arrays) == set(expected)
    for name, value in expected.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], np.asarray(value), err_msg=name)
    moments = load_file(last / "opt.safetensors")
    assert set(moments) == {f"{key}.{name}" for key in ("mu", "nu") for name in expected}
    assert read_record(result.run_dir)["step"] == 26


def test_config_json_says_what_produced_the_run(straight, corpus, tokenizer):
    """Config, model, optimizer, data and its revision, tokenizer, commit, jax, device; nothing of the user's disk."""
    result, _ = straight
    text = (result.run_dir / "config.json").read_text()
    about = json.loads(text)
    assert train.Config(**about["config"]) == tiny()
    assert (about["model"], about["optimizer"]) == ("02_train.GPT", "adamw")
    assert about["data"] == {"name": corpus.name, "revision": corpus.revision, "shards": 3}
    assert about["jax"] == jax.__version__ and about["commit"] == "a commit"
    assert about["device"] == f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    assert about["tokenizer_sha256"] == tok.tokenizer_hash(tokenizer)
    assert str(Path.home()) not in text and str(corpus.train[0].parent) not in text


def test_a_run_keeps_its_tokenizer(straight, tokenizer):
    """In its folder and in each checkpoint, so that a machine that has only those encodes as training did."""
    folder = straight[0].run_dir
    for path in (folder / "tokenizer.json", *folder.glob("checkpoints/*/tokenizer.json")):
        assert tok.tokenizer_hash(tok.load_tokenizer(path)) == tok.tokenizer_hash(tokenizer)
    assert len(list(folder.glob("checkpoints/*/tokenizer.json"))) == 7


def test_loss_png_is_a_picture(straight):
    """loss.png opens as an image of a useful size and is not one flat colour."""
    picture = matplotlib.image.imread(straight[0].run_dir / "loss.png")
    assert picture.shape == (600, 960, 4) and picture[..., :3].std() > 0.05


def test_mfu_is_shown_where_the_devices_peak_is_known():
    """The peak of all devices over the model's FLOPs per token; None on a device that is not in the table."""

    def peak_on(kind):
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * 4), size=4)
        return peak_rate(train.workload(mesh), tiny())

    assert peak_on("TPU v6 lite") == pytest.approx(4 * 918e12 / train.flops_per_token(tiny()))
    assert peak_on("cpu") is None


def trace_files(run_dir):
    return glob.glob(f"{run_dir}/profile/**/*.xplane.pb", recursive=True)


def test_the_profile_is_steps_15_to_20(straight):
    """26 steps are traced from 15 to 19, counted from 0, with one annotation each."""
    [path] = trace_files(straight[0].run_dir)
    events = [
        e for plane in jax.profiler.ProfileData.from_file(path).planes for line in plane.lines for e in line.events
    ]
    steps = {int(value) for e in events if e.name == "train" for name, value in e.stats if name == "step_num"}
    assert steps == {15, 16, 17, 18, 19}


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_continue_their_prompts(straight, tokenizer):
    """One (prompt, text) for each prompt, drawn at 0.8 among 50 with the prompt's own seed, up to a <|bos|>."""
    result, _ = straight
    assert [prompt for prompt, _ in result.samples] == list(PROMPTS)
    bos = tokenizer.token_to_id("<|bos|>")
    for seed, (prompt, text) in enumerate(result.samples):
        ids = [bos, *tokenizer.encode(prompt).ids]
        new = train.generate(tiny(), result.params, ids, 12, temperature=0.8, top_k=50, seed=seed)
        new = new[: new.index(bos)] if bos in new else new
        assert text == tokenizer.decode(new)


def test_a_sample_ends_at_the_next_document(tokenizer, monkeypatch):
    """What the model writes after a <|bos|> is another document and is not shown."""
    the, water = (tokenizer.encode(word).ids for word in ("the", " water"))
    written = [*the, *water, tokenizer.token_to_id("<|bos|>"), *the, tokenizer.token_to_id("<|bos|>")]
    monkeypatch.setattr(train, "generate", lambda *args, **kwargs: written)
    assert train.make_sample_writer(tiny(), tokenizer, ["x"])({}) == [("x", "the water")]


def test_a_prompt_too_long_for_the_context_does_not_cost_the_run(straight, tokenizer):
    """A prompt that leaves no room is shortened, never an error after the last step."""
    prompt = "water " * 30
    [(shown, text)] = train.make_sample_writer(tiny(), tokenizer, [prompt])(straight[0].params)
    assert shown == prompt and isinstance(text, str)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed


@contextlib.contextmanager
def watched(folder, stop_at=None, stop=None):
    """Notes the hash of each step's batch in folder/batches.txt; calls `stop` in step `stop_at`, counted from 1."""
    real = Session.advance

    def advance(run, train_step):
        def step(state, batch):
            raw = b"".join(np.asarray(batch[name]).tobytes() for name in ("x", "y"))
            with open(folder / "batches.txt", "a") as file:
                file.write(f"{run.step + 1} {hashlib.sha256(raw).hexdigest()}\n")
            result = train_step(state, batch)
            if run.step + 1 == stop_at:
                stop()
            return result

        real(run, step)

    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "advance", advance)
        yield


def read_batches(folder):
    """{step: hash of its batch}; a step that ran twice must have had the same."""
    lines = {tuple(line.split()) for line in (folder / "batches.txt").read_text().splitlines()}
    assert len(lines) == len(dict(lines))
    return {int(step): digest for step, digest in lines}


def expected_batches(corpus, tokenizer):
    """The same for a whole run, from the packed text."""
    packed, n, hashes = pack(tokenizer, corpus.train, epochs=2).astype(np.int32), 6 * 24, {}
    for i in range(26):
        parts = packed[i * n : (i + 1) * n], packed[i * n + 1 : (i + 1) * n + 1]
        hashes[i + 1] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return hashes


def interrupt():
    signal.raise_signal(signal.SIGTERM)


def position_of(run_dir):
    """The position in the data of a run's newest checkpoint."""
    tokens = load_file(newest(run_dir) / "stream.safetensors")["tokens"]
    return {**read_record(run_dir)["stream"], "tokens": tokens}


@pytest.mark.parametrize("k", [1, 5, 16, 23])
def test_interrupted_and_resumed_is_the_same_run(straight, corpus, tokenizer, tmp_path, k):
    """Cut off in step k, it keeps step k; the next call reaches the very same metrics, parameters and moments.

    k = 16 is a step whose evaluation is still to be made; 23 is in the second epoch. Steps accumulate 3 x 2.
    """
    with watched(tmp_path, k, interrupt):
        cut = train_tiny(corpus, tokenizer, tmp_path, prompts=PROMPTS)
    assert cut.step == k and newest(tmp_path).name == f"step_{k:08d}"
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, k + 1))
    assert position_of(tmp_path)["epoch"] == (1 if k == 23 else 0)
    saved = load_file(newest(tmp_path) / "params.safetensors")
    np.testing.assert_array_equal(saved["wte"], np.asarray(cut.params["wte"]))
    assert threads() == []

    logged = []
    with watched(tmp_path):
        result = train_tiny(corpus, tokenizer, tmp_path, prompts=PROMPTS, on_log=logged.append)
    assert logged[0]["step"] in (k, k + 1), "steps that are done are not done again"
    assert result.step == 26 and position_of(tmp_path)["epoch"] == 1
    assert_same_end(tmp_path, straight[0].run_dir)
    assert read_batches(tmp_path) == expected_batches(corpus, tokenizer)
    n = tiny().total_batch_size * tiny().seq_len
    ends = [tok.token_stream(tokenizer, corpus.train, n, position_of(d)) for d in (tmp_path, straight[0].run_dir)]
    for (tokens, _), (same, _) in itertools.islice(zip(*ends, strict=True), 30):
        np.testing.assert_array_equal(tokens, same, err_msg="the two would not continue with the same data")
    assert result[1:6] == straight[0][1:6], "step, scores and samples are those of the straight run"


@pytest.mark.slow
def test_a_run_on_packed_rows_is_resumed_as_exactly(corpus, tokenizer, tmp_path):
    """Cut off twice, the waiting documents in the checkpoint; each score comes with the share that was dropped.

    A run of packed rows does not go on with a stream.
    """
    config = tiny(packing="best-fit", num_iterations=17)
    runs = {name: tmp_path / name for name in ("straight", "cut")}
    train_tiny(corpus, tokenizer, runs["straight"], config=config)
    for k in (5, 8):
        with watched(runs["cut"], k, interrupt):
            assert train_tiny(corpus, tokenizer, runs["cut"], config=config).step == k
        waiting = load_file(newest(runs["cut"]) / "stream.safetensors")
        assert waiting["lengths"].sum() == len(waiting["tokens"]) > 0
    train_tiny(corpus, tokenizer, runs["cut"], config=config)
    assert_same_end(runs["cut"], runs["straight"])
    scored = [row for row in read_rows(runs["cut"]) if "val_bpb" in row]
    assert [row["step"] for row in scored] == [8, 16, 17] and all(0 < row["dropped_tokens"] < 1 for row in scored)
    with pytest.raises(UserError, match="^packing='stream': .* was trained with 'best-fit'"):
        train_tiny(corpus, tokenizer, runs["cut"], config=tiny(num_iterations=20))


@pytest.mark.slow
def test_a_run_in_stages_reads_one_stream_and_is_resumed_as_exactly(corpus, tokenizer, tmp_path, capsys):
    """Shorter, then fewer, then whole batches follow each other in the stream, and each is trained on as it would be
    alone; cut off within a stage, at its end and after it, the run is the same."""
    config = tiny(stages="3:4x8 7:3x24", num_iterations=11, eval_every=0)
    sizes = {step: (4, 8) if step <= 3 else (3, 24) if step <= 7 else (6, 24) for step in range(1, 12)}
    packed, start, expected = pack(tokenizer, corpus.train).astype(np.int32), 0, {}
    for step, (rows, length) in sizes.items():
        end = start + rows * length
        parts = packed[start:end], packed[start + 1 : end + 1]
        expected[step] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
        start = end
    runs = {name: tmp_path / name for name in ("straight", "cut")}
    with watched(runs["straight"]):
        train_tiny(corpus, tokenizer, runs["straight"], config=config)
    assert "stages: compiling steps of 4 x 8, 3 x 24, 6 x 24 tokens" in capsys.readouterr().out
    assert read_batches(runs["straight"]) == expected
    for k in (2, 3, 5, 9):
        with watched(runs["cut"], k, interrupt):
            assert train_tiny(corpus, tokenizer, runs["cut"], config=config).step == k
    with watched(runs["cut"]):
        train_tiny(corpus, tokenizer, runs["cut"], config=config)
    assert read_batches(runs["cut"]) == expected
    assert_same_end(runs["cut"], runs["straight"])

    mesh, rows = train.make_mesh(), [row for row in read_rows(runs["straight"]) if "loss" in row]
    state, start = train.init_state(config, mesh), 0
    for row, (size, length) in zip(rows, sizes.values(), strict=True):
        stage = tiny(num_iterations=11, total_batch_size=size, seq_len=length, device_batch_size=1)
        tokens = packed[start : start + size * length + 1]
        state, metrics = train.make_train_step(stage, mesh)(state, train.batch_of(tokens, length))
        assert row["loss"] == pytest.approx(float(metrics["loss"]), rel=2e-5)
        start += size * length


def write_as_before(run_dir):
    """Writes a run's newest checkpoint again as commit 77a4437 wrote it, and removes what that left nowhere."""
    path = newest(run_dir)
    record, opt = read_record(run_dir), load_file(path / "opt.safetensors")
    record |= {"best_val_bpb": record.pop("best_score"), "remember": record.pop("notes")}
    record["made_from"] = {k: v for k, v in record["made_from"].items() if k not in ("model", "optimizer")}
    moments = {key: {n[3:]: a for n, a in opt.items() if n.startswith(f"{key}.")} for key in ("mu", "nu")}
    files = {
        "params.safetensors": load_file(path / "params.safetensors"),
        "mu.safetensors": moments["mu"],
        "nu.safetensors": moments["nu"],
        "stream.safetensors": load_file(path / "stream.safetensors"),
        "state.json": json.dumps(record).encode(),
        "config.json": (path / "config.json").read_bytes(),
        "metrics.jsonl": (path / "metrics.jsonl").read_bytes(),
    }
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "tokenizer.json").unlink()
    write_checkpoint(path, files)


@pytest.mark.slow
def test_a_run_that_was_started_before_the_four_doors_resumes(straight, corpus, tokenizer, tmp_path, capsys):
    """Two files of moments, other names for score and notes, no name of a model: to the last bit, without a word."""
    with watched(tmp_path, 17, interrupt):
        train_tiny(corpus, tokenizer, tmp_path)
    write_as_before(tmp_path)
    assert set(read_record(tmp_path)) == {"step", "stream", "best_step", "best_val_bpb", "remember", "made_from"}
    assert read_record(tmp_path)["best_step"] == 16 and not (newest(tmp_path) / "opt.safetensors").exists()
    capsys.readouterr()
    train_tiny(corpus, tokenizer, tmp_path)
    said = capsys.readouterr().out
    assert "continues after step 17 of 26" in said and "changed" not in said
    assert_same_end(tmp_path, straight[0].run_dir)
    assert {"opt.safetensors", "tokenizer.json"} <= {path.name for path in newest(tmp_path).iterdir()}


def test_a_finished_run_does_no_step_and_is_scored_again(straight, corpus, tokenizer, tmp_path, drawn):
    """Running a finished run again trains nothing, gives the same scores and samples, and leaves its files alone."""
    first, run_dir = straight[0], tmp_path / "again"
    shutil.copytree(first.run_dir, run_dir)
    kept = lambda: {path: path.read_bytes() for path in [*run_dir.glob("*.jsonl"), *run_dir.glob("c*/*/*")]}
    before, logged = kept(), []
    with watched(tmp_path / "none", 27, interrupt):
        again = train_tiny(corpus, tokenizer, run_dir, prompts=PROMPTS, on_log=logged.append)
    assert not (tmp_path / "none" / "batches.txt").exists()
    assert [row["step"] for row in logged] == [26] and "val_bpb" in logged[0]
    assert again[1:6] == first[1:6]
    assert kept() == before and len(before) > 20
    assert without_times(drawn[-1]) == read_rows(run_dir), "the curve lost what was before"


def test_the_same_seed_gives_the_same_losses_bit_for_bit(straight, corpus, tokenizer, tmp_path):
    """Twice in one process: metrics, parameters and moments agree to the last bit."""
    train_tiny(corpus, tokenizer, tmp_path)
    assert_same_end(tmp_path, straight[0].run_dir)


def run_out_of_memory_at_evaluation(corpus, tokenizer, folder):
    """A run whose first evaluation fails."""
    task = train.pretraining(tiny(save_every=0), corpus, tokenizer)
    task = task._replace(score=lambda *args: raising(MemoryError("RESOURCE_EXHAUSTED")))
    with watched(folder), pytest.raises(MemoryError):
        train.train(tiny(save_every=0), task, folder)


def crash_after_a_save_by_the_clock(corpus, tokenizer, folder, monkeypatch):
    """A run that dies in step 15; the clock asks for a checkpoint once, after step 13."""
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now(folder)))

    def now(folder):
        made = folder / "batches.txt"
        return 100.0 if made.exists() and len(read_batches(folder)) >= 13 else 0.0

    with watched(folder, 15, raising(ConnectionError("the runtime is gone"))), pytest.raises(ConnectionError):
        train_tiny(corpus, tokenizer, folder, config=tiny(save_every=0, save_minutes=1.0))


def resume_all(folder, corpus_folder):
    """What another process does: takes every run under `folder` to its end."""
    corpus = tok.folder_corpus(corpus_folder)
    for path in sorted(Path(folder).iterdir()):
        tokenizer = tok.load_tokenizer(Path(folder).parent / "tokenizer.json")
        config = tiny(save_every=0, save_minutes=1.0 if path.name == "minutes" else 15.0)
        with watched(path):
            train_tiny(corpus, tokenizer, path, config=config)


@pytest.mark.slow
def test_a_new_process_resumes_exactly(corpus, tokenizer, straight, tmp_path, monkeypatch):
    """k steps, a new process, and the rest: parameters, moments, losses, rates, norms, scores, batches bit for bit.

    k is 0; early; where the next batch runs over the epoch's end; an evaluation that ran out of memory; and a crash two
    steps after a checkpoint that only the clock asked for. Every step accumulates.
    """
    runs, per_epoch = tmp_path / "runs", len(pack(tokenizer, corpus.train))
    epoch_end = per_epoch // (6 * 24)
    assert per_epoch % (6 * 24) and epoch_end not in (3, 8, 13) and epoch_end < 25
    stopped = {"whole": 0, "early": 3, "epoch": epoch_end, "evaluation": 8, "minutes": 13}
    (runs / "whole").mkdir(parents=True)
    for name in ("early", "epoch"):
        with watched(runs / name, stopped[name], interrupt):
            train_tiny(corpus, tokenizer, runs / name, config=tiny(save_every=0))
    run_out_of_memory_at_evaluation(corpus, tokenizer, runs / "evaluation")
    crash_after_a_save_by_the_clock(corpus, tokenizer, runs / "minutes", monkeypatch)
    for name in list(stopped)[1:]:
        assert newest(runs / name).name == f"step_{stopped[name]:08d}", name
    tok.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    code = f"import conftest, test_02_loop as t; t.resume_all({str(runs)!r}, {str(corpus.train[0].parent)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, k in stopped.items():
        assert k == 0 or f"{name} continues after step {k} of 26" in done.stdout
        assert_same_end(runs / name, straight[0].run_dir)
        assert read_batches(runs / name) == expected_batches(corpus, tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Quick runs: a model of one weight and a task of zeros, for what is around them

ONE_WEIGHT = train.Model("99_test.ONE", train.Config, lambda c: {"w": Weight("H", constant(2.0), "embed")}, *[None] * 3)


def zeros(position):
    for i in itertools.count(position["i"] if position else 0):
        yield {"x": np.zeros((6, 24), np.int32)}, {"i": i + 1}


def score_nothing(config, model, mesh):
    return lambda params: {"val_loss": 1.0, "val_bpb": 2.0}


ZEROS = train.Task(zeros, lambda config, model, params, batch: jnp.sum(params["w"] ** 2), score_nothing, "val_bpb")


def quick(folder, score=None, sample=None, task=ZEROS, mirror=None, notes=None, accept=(), **changes):
    """Trains the one weight; score(params) and sample(params) as train() takes them."""
    if score:
        task = task._replace(score=lambda *args: score)
    options = {"sample": sample, "mirror": mirror, "notes": notes, "accept": accept}
    return train.train(tiny(**changes), task, folder, model=ONE_WEIGHT, **options)


OUT_OF_MEMORY = raising(MemoryError("RESOURCE_EXHAUSTED"))


@pytest.mark.parametrize(
    "fails, changes, kept",
    [
        ({"score": OUT_OF_MEMORY}, {"save_every": 8}, 8),
        ({"score": OUT_OF_MEMORY}, {}, 8),
        ({"score": OUT_OF_MEMORY}, {"num_iterations": 5}, 5),
        ({"sample": OUT_OF_MEMORY}, {"sample_every": 7, "eval_every": 0}, 7),
        ({"sample": OUT_OF_MEMORY}, {"num_iterations": 5}, 5),
    ],
    ids=["evaluation where a save is due", "evaluation", "last evaluation", "sample", "last sample"],
)
def test_what_runs_out_of_memory_finds_its_step_saved(tmp_path, fails, changes, kept):
    """An evaluation or a sample that fails, in the middle or at the end, costs no step: nanochat#446 lost 29 hours."""
    with pytest.raises(MemoryError):
        quick(tmp_path, **fails, **{"save_every": 0, "num_iterations": 12, **changes})
    assert newest(tmp_path).name == f"step_{kept:08d}" and threads() == []


def test_a_step_is_saved_then_evaluated_then_sampled(tmp_path):
    """In that order where all are due, each where it is due alone, and no step is saved twice."""
    seen = []
    on_disk = lambda: len(list_checkpoints(tmp_path)) if (tmp_path / "checkpoints").exists() else 0
    score = lambda params: seen.append(("evaluated", on_disk())) or {"val_loss": 1.0, "val_bpb": 2.0}
    sample = lambda params: seen.append(("sampled", on_disk())) or []
    mirror = SimpleNamespace(
        restored=False, restore=lambda folder: None, offer=lambda path: seen.append(int(path.name[5:]))
    )
    mirror.finish, mirror.held = lambda: None, set
    quick(tmp_path, score, sample, mirror=mirror, num_iterations=20, save_every=6, eval_every=9, sample_every=7)
    assert [step for step in seen if isinstance(step, int)] == [6, 7, 9, 12, 14, 18, 20]
    assert [name for name in seen if isinstance(name, tuple)] and [s[0] for s in seen if isinstance(s, tuple)] == [
        "sampled", "evaluated", "sampled", "evaluated", "evaluated", "sampled",
    ]  # fmt: skip


def test_a_failed_evaluation_is_run_after_resuming(tmp_path):
    """A run that died between checkpoint and evaluation of step 8 has the evaluation of step 8 once it is resumed."""
    with pytest.raises(MemoryError):
        quick(tmp_path, OUT_OF_MEMORY, num_iterations=12, save_every=8)
    quick(tmp_path, num_iterations=12, save_every=8)
    assert [row["step"] for row in read_rows(tmp_path) if "val_bpb" in row] == [8, 12]


@pytest.mark.slow
def test_tasks_are_asked_where_they_are_due(corpus, tokenizer, tmp_path, capsys):
    """Every eval_core_every steps and at the end, after a checkpoint; their figures are a row of metrics of their own,
    leave the score that marks the best checkpoint alone, and a run that was cut off has the same."""
    runs = {name: tmp_path / name for name in ("straight", "cut")}

    def ask(config, model, mesh):
        return lambda params: {"tasks/made": float(jnp.sum(params["wte"])), "tasks/copy": 0.5}

    config = tiny(num_iterations=12, eval_every=8, eval_core_every=5, save_every=0)
    task = train.pretraining(config, corpus, tokenizer)._replace(ask=ask)
    result = train.train(config, task, runs["straight"])
    assert "step 5: tasks/made" in capsys.readouterr().out
    asked = [row for row in read_rows(runs["straight"]) if "tasks/made" in row]
    assert [(row["step"], set(row)) for row in asked] == [
        (n, {"step", "tasks/made", "tasks/copy"}) for n in (5, 10, 12)
    ]
    assert len({row["tasks/made"] for row in asked}) == 3 and result.val_bpb is not None
    assert read_record(runs["straight"])["best_step"] == 8

    with pytest.raises(MemoryError):
        train.train(config, task._replace(ask=lambda *parts: OUT_OF_MEMORY), runs["cut"])
    assert newest(runs["cut"]).name == "step_00000005", "a checkpoint comes first"
    train.train(config, task, runs["cut"])
    assert_same_end(runs["cut"], runs["straight"])


def test_a_run_without_tasks_is_asked_nothing(corpus, tokenizer, tmp_path):
    """With eval_core_every at 0 the function is never made."""
    task = train.pretraining(tiny(num_iterations=2), corpus, tokenizer)._replace(ask=raising(AssertionError))
    train.train(tiny(num_iterations=2), task, tmp_path)


def test_samples_are_shown_where_they_are_due(tmp_path, capsys):
    """Every sample_every steps each prompt's continuation is printed, and those at the end are returned."""
    sample = lambda params: [(prompt, "text") for prompt in PROMPTS]
    result = quick(tmp_path, sample=sample, num_iterations=9, sample_every=4, save_every=0, eval_every=0)
    assert result.samples == sample({})
    shown = capsys.readouterr().out
    assert [shown.count(f"step {step}: {prompt!r} -> 'text'") for step in (4, 8) for prompt in PROMPTS] == [1] * 6
    assert shown.count("-> 'text'") == 6


def test_a_second_interrupt_breaks_off_at_once(tmp_path):
    """Two Ctrl-C in an evaluation end it there, with the step's checkpoint kept and loader and profile closed."""
    seen = []

    def score(params):
        seen.append("began")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        seen.append("continued")

    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path, score, num_iterations=8, eval_every=4, save_every=4)
    assert seen == ["began"] and newest(tmp_path).name == "step_00000004"
    assert threads() == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    jax.profiler.start_trace(tmp_path / "trace")  # raises if the last one were still on
    jax.profiler.stop_trace()


def test_training_begins_at_the_weights_of_its_seed(tmp_path):
    """With an optimizer that changes nothing, the result is what the table draws by the key of param_seed."""
    table = {"a": Weight("DNH", normal(1.0), "embed"), "b": [{"c": Weight("D->F", uniform, "mlp")}] * 2}
    model = ONE_WEIGHT._replace(weights=lambda config: table)
    still = train.Optimizer("still", lambda *args: {}, lambda c, w, params, state, *rest: (params, state))
    task = ZEROS._replace(loss=lambda config, model, params, batch: jnp.sum(params["a"]))
    config = tiny(param_seed=43, num_iterations=1)
    result = train.train(config, task, tmp_path, model=model, optimizer=still)
    expected = jax.jit(functools.partial(draw_weights, config, table))(jax.random.key(43))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ----------------------------------------------------------------------------------------------------------------------
# Something changed

OTHER = {
    "n_head": 4, "n_kv_head": 2, "head_dim": 16, "aspect_ratio": 4, "vocab_size": 301, "seq_len": 12,
    "window_pattern": "L", "softcap": 20.0, "rope_base": 5000.0, "total_batch_size": 4, "param_seed": 1,
    "packing": "best-fit",
    "stages": "3:4x8", "steps_before": 7,
}  # fmt: skip
SAFE = {
    "num_iterations": 24, "learning_rate": 0.02, "eval_every": 5, "device_batch_size": 3, "weight_decay": 0.2,
    "save_every": 3, "dtype": "bfloat16", "attn_impl": "jax",
}  # fmt: skip


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_change_of_a_fixed_setting_is_refused(tmp_path):
    """The field, both values and the remedy in one line, for every such field, and nothing is touched."""
    quick(tmp_path, num_iterations=5)
    before = content(tmp_path)
    assert set(fixed_fields(train.Config)) == set(OTHER)
    for field, value in OTHER.items():
        with pytest.raises(UserError) as raised:
            quick(tmp_path, num_iterations=5, **{field: value})
        said = str(raised.value)
        assert said.startswith(f"{field}={value!r}: ") and f"was trained with {getattr(tiny(), field)!r}" in said
        assert "another name" in said and is_one_line(said)
    assert content(tmp_path) == before


def test_a_safe_change_is_accepted_and_said(tmp_path, capsys):
    """Number of steps, rates, evaluations, microbatches: both values in a line each, and the run continues."""
    quick(tmp_path, num_iterations=5)
    capsys.readouterr()
    result = quick(tmp_path, **SAFE)
    said = capsys.readouterr().out
    for field, value in SAFE.items():
        was = 5 if field == "num_iterations" else getattr(tiny(), field)
        assert f"changed: {field} is {value!r}, was {was!r} up to here" in said
    assert said.count("changed: ") == len(SAFE) and result.step == 24
    quick(tmp_path, **SAFE)
    assert "changed" not in capsys.readouterr().out, "what was said once is in the next checkpoint"


def test_another_model_or_optimizer_is_refused(tmp_path):
    """One line with both names, before any array is looked at, though the settings differ as well."""
    quick(tmp_path, num_iterations=2)
    before = content(tmp_path)
    maxtext = importlib.import_module("04_maxtext")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "mlp_dim": 48, "tile": 1}
    shared = {name: value for name, value in TINY.items() if name in train.TrainConfig.__dataclass_fields__}
    with pytest.raises(UserError, match=r"^model='04_maxtext.SWIGLU': .*was trained with '99_test.ONE'") as raised:
        train.train(maxtext.Config(**sizes, **shared), ZEROS, tmp_path, model=maxtext.SWIGLU)
    assert is_one_line(raised.value) and "another name" in str(raised.value)
    sgd = train.Optimizer("sgd", lambda *args: {}, lambda c, w, params, state, grads, step, spread: (params, state))
    with pytest.raises(UserError, match=r"^optimizer='sgd': .*was trained with 'adamw'") as raised:
        train.train(tiny(num_iterations=2), ZEROS, tmp_path, model=ONE_WEIGHT, optimizer=sgd)
    assert is_one_line(raised.value) and content(tmp_path) == before


def test_other_text_is_refused_and_another_jax_is_reported(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    """A run keeps the tokenizer that it began with, and its text unless another is accepted; more of it is no other."""
    doors = {"loss": ZEROS.loss, "score": score_nothing}
    task_of = lambda corpus, tokenizer: train.pretraining(tiny(), corpus, tokenizer)._replace(**doors)
    quick(tmp_path, task=task_of(corpus, tokenizer), notes={"wandb": "3f9a"}, num_iterations=2)
    made_from = read_record(tmp_path)["made_from"]
    assert made_from["tokenizer_sha256"] == tok.tokenizer_hash(tokenizer) and made_from["jax"] == jax.__version__
    assert made_from["data"] == {"name": corpus.name, "revision": corpus.revision, "shards": 3}
    other = tok.train_tokenizer((text for _, text in tok.read_documents(corpus.val)), VOCAB)
    edited = dataclasses.replace(corpus, revision="another")
    for field, task in (("tokenizer_sha256", task_of(corpus, other)), ("data", task_of(edited, tokenizer))):
        with pytest.raises(UserError, match=f"^{field}=") as raised:
            quick(tmp_path, task=task, num_iterations=3)
        assert is_one_line(raised.value, 600) and str(made_from[field]) in str(raised.value)
        assert "another name" in str(raised.value) and str(task.origin[field]) in str(raised.value)
    assert "--other_data true" in str(raised.value)
    monkeypatch.setattr(jax, "__version__", "0.99")
    capsys.readouterr()
    more = dataclasses.replace(corpus, train=corpus.train * 2)
    quick(tmp_path, task=task_of(more, tokenizer), num_iterations=3)
    said = capsys.readouterr().out
    assert f"changed: jax is 0.99, was {made_from['jax']}" in said and said.count("changed: data is ") == 1
    quick(tmp_path, task=task_of(edited, tokenizer), num_iterations=4, accept=("data",))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: data is ")]
    assert "'another'" in line.partition(", was ")[0] and corpus.revision in line.partition(", was ")[2]
    assert read_record(tmp_path)["notes"] == {"wandb": "3f9a"}


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("learning_rate, weight_decay, kept", [(1e30, 0.0, 1), (1e38, 1e3, 0)])
def test_a_learning_rate_far_too_high_is_reported(tmp_path, learning_rate, weight_decay, kept):
    """AdamW driven beyond float32 stops with the remedy, and what was saved before is finite.

    In the second case step 1 has a finite loss and gradient, and leaves infinite parameters: not to be kept.
    """
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_ratio": 0.0, "grad_clip": 0.0}
    model = ONE_WEIGHT._replace(weights=lambda config: {"w": Weight("H", constant(2.0), "mlp")})
    with pytest.raises(UserError, match="learning_rate"):
        train.train(tiny(**rates, save_every=1, eval_every=0), ZEROS, tmp_path, model=model)
    checkpoint = newest(tmp_path)
    assert (checkpoint and checkpoint.name) == (f"step_{kept:08d}" if kept else None)
    for name, array in (load_file(checkpoint / "params.safetensors") if kept else {}).items():
        assert np.isfinite(array).all(), f"{checkpoint.name}: {name}"


def test_bad_input_is_refused_before_anything_is_written(corpus, tokenizer, tmp_path):
    """Vocabulary, eval_tokens and batch sizes that do not fit leave no folder behind, and name the field."""
    three = SimpleNamespace(size=3)  # devices: they do not divide a batch of four
    for field, changes, mesh in (
        ("vocab_size", {"vocab_size": 301}, None),
        ("eval_tokens", {"eval_tokens": 10**6}, None),
        ("total_batch_size", {"total_batch_size": 4}, three),
    ):
        with pytest.raises(UserError, match=f"^{field}=") as caught:
            train_tiny(corpus, tokenizer, tmp_path / "run", config=tiny(**changes), mesh=mesh)
        assert is_one_line(caught.value) and not (tmp_path / "run").exists()


def test_too_few_tokens_for_a_batch_is_reported_by_the_loop(corpus, tokenizer, tmp_path):
    """The loader's UserError arrives in train() as it is: one line, no checkpoint, no thread left."""
    with pytest.raises(UserError, match="too few"):
        train_tiny(corpus, tokenizer, tmp_path, config=tiny(total_batch_size=600))
    assert newest(tmp_path) is None and threads() == []


# ----------------------------------------------------------------------------------------------------------------------
# Secrets

CANARY = "hf_canaryNeverToBeSeen"


@pytest.fixture
def payloads(monkeypatch):
    """Everything that a loopback Hub is sent, without the header that the token is meant for."""
    received, real = [], loopback._Handler.read_body

    def read_body(handler):
        body = real(handler)
        headers = [f"{name}: {value}" for name, value in handler.headers.items() if name.lower() != "authorization"]
        received.append("\n".join([handler.path, *headers]).encode() + body)
        return body

    monkeypatch.setattr(loopback._Handler, "read_body", read_body)
    return received


def assert_unseen(canary, folder, said, received):
    """The canary, or half of it, in no file, no line and no payload."""
    half = canary[len(canary) // 2 :]
    assert half not in said
    assert [path for path in folder.rglob("*") if path.is_file() and half.encode() in path.read_bytes()] == []
    assert received and not [raw for raw in received if half.encode() in raw]


def test_colabs_secret_is_as_well_kept(tmp_path, monkeypatch, payloads, capfd):
    """A token from Colab's userdata, uploads that work and uploads that fail with what the Hub says."""
    with monkeypatch.context() as patch:
        pretend_notebook(patch, lambda name: f" {CANARY}\n")
        token = read_secret("HF_TOKEN")
    with connected_hub(monkeypatch, users={CANARY: "someone"}) as hub:
        for i, faults in enumerate(([], [Fault("POST", "/commit/", status=403, times=99)])):
            hub.faults = faults
            mirror = open_mirror(Run(name=f"y{i}", out=str(tmp_path)), token)
            quick(tmp_path / f"y{i}", num_iterations=5, mirror=mirror)
        assert CANARY in hub.tokens and "checkpoints/step_00000005/state.json" in hub.files("someone/onechip-y0")
    said = capfd.readouterr()
    assert "upload: step_00000005: cannot be uploaded" in said.out
    assert_unseen(CANARY, tmp_path, said.out + said.err, payloads)


FLAGS = "--preset laptop --n_head 2 --head_dim 8 --aspect_ratio 16 --vocab_size 300 --seq_len 64 --device_batch_size 2"
FLAGS += " --total_batch_size 4 --eval_tokens 240 --save_every 5 --name x"


def start_training(hub, folder, corpus, words, **environment):
    """02_train.py in a process of its own that knows only this Hub."""
    environment = os.environ | hub.environment() | {"HOME": str(folder), "HF_HOME": str(folder / "hf")} | environment
    words = [*FLAGS.split(), *words.split(), "--data", str(corpus.train[0].parent)]
    return start(*words, cwd=folder, env=environment)


@pytest.mark.slow
def test_a_terminated_process_leaves_all_on_the_hub_and_no_token_anywhere(corpus, tmp_path, payloads):
    """SIGTERM to a real process: exit code 0, its last step here and on the Hub; its token in no file, line, payload.

    Then another process with a token that the Hub no longer takes, and pasted with its line's end, as tokens are.
    """
    run_dir = tmp_path / "runs" / "x"
    has_trained = lambda: (run_dir / "metrics.jsonl").exists() and count_rows(run_dir) > 20
    with Hub(users={CANARY: "someone"}) as hub:
        process = start_training(hub, tmp_path, corpus, "--num_iterations 100000 --eval_every 0", HF_TOKEN=CANARY)
        wait_until(lambda: has_trained() or process.poll() is not None, 120)
        process.send_signal(signal.SIGTERM)
        code, out, err = finish(process)
        assert code == 0, err
        step = read_rows(run_dir)[-1]["step"]
        assert f"interrupted after step {step:,}" in out and newest(run_dir).name == f"step_{step:08d}"
        assert f"checkpoints/step_{step:08d}/manifest.json" in hub.files("someone/onechip-x")
        assert not hub.unknown and set(hub.tokens) <= {CANARY, None} and CANARY in hub.tokens
        hub.users.clear()
        words = f"--num_iterations {step + 2} --eval_every 0"
        code, *more = finish(start_training(hub, tmp_path, corpus, words, HF_TOKEN=f"{CANARY}\n"))
        assert code == 0 and "upload: checkpoints stay here" in more[0], more
    assert_unseen(CANARY, tmp_path, out + err + "".join(more), payloads)


def count_rows(run_dir):
    """Rows of metrics.jsonl that are complete."""
    return (run_dir / "metrics.jsonl").read_text().count("\n")


@pytest.mark.slow
@pytest.mark.parametrize("notebook, count", [("02_train", 3), ("05_speedrun", 2)])
def test_killed_again_and_again_is_the_run_left_alone(corpus, notebook, count):
    """The command that README shows, on few steps: kill -9 at random moments, then the same rows and parameters."""
    flags = "--vocab_size 300 --num_iterations 60 --eval_every 10 --eval_tokens 256 --save_every 3"
    words = ["tools/kill_test.py", "--notebook", notebook, "--kills", str(count), "--seed", "0"]
    words += ["--data", str(corpus.train[0].parent)]
    words += [*flags.split(), "--sample_every", "0"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.findall(r"^kill (\d): after [\d.]+ s, (.*?),", done.stdout, re.M)
    assert [int(number) for number, _ in kills] == list(range(1, count + 1))
    assert any(how.startswith("continues after step") for _, how in kills), done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{count} kills of {notebook}: the metrics")


# ----------------------------------------------------------------------------------------------------------------------
# The command

SMALL = (
    "--n_head 2 --head_dim 16 --aspect_ratio 16 --seq_len 64 --vocab_size 512 --device_batch_size 2 "
    "--total_batch_size 4 --num_iterations 300 --eval_every 100 --eval_tokens 2048 --save_every 120"
).split()


def start(*words, cwd=ROOT, env=None):
    """Starts `python 02_train.py words`, offline, compiled as a user's."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {name: value for name, value in (env or os.environ).items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    return subprocess.Popen([sys.executable, str(ROOT / "02_train.py"), *words], cwd=cwd, env=env, **pipes)


def finish(process):
    """(exit status, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def without_bars(err):
    """stderr without tqdm's lines."""
    lines = re.split(r"[\r\n]", err)
    bar = re.compile(r"\d+%\|.*\|.*(step|it|B)")
    return [line for line in lines if line.strip() and not bar.search(line)]


@pytest.fixture(scope="module")
def command_line_run(tmp_path_factory):
    """(run folder, stdout, stderr) of a small offline run from an empty home, straight through."""
    folder = tmp_path_factory.mktemp("cli")
    code, out, err = finish(start(*SMALL, "--data", "offline", "--out", str(folder / "runs"), cwd=folder))
    assert code == 0, err
    [run_dir] = (folder / "runs").iterdir()
    return run_dir, out, err


@pytest.mark.slow
def test_the_command_says_what_it_decided_and_what_came_out(command_line_run):
    """Device, preset, data and why, the parameter table, held-out bits per byte next to gzip's, samples; no more."""
    run_dir, out, _ = command_line_run
    lines = out.splitlines()
    assert len(lines) <= 30 and len(set(lines)) == len(lines), "a screen, and no line twice"
    platform = jax.devices()[0].platform
    for said in (
        f"device: {len(jax.devices())} x",
        "preset: laptop",
        f"the device is a {platform}",
        "data: offline, as set",
    ):
        assert said in out
    for group in ("embed", "attention", "mlp", "lm_head", "scalar", "total", "FLOPs per token"):
        assert group in out
    assert run_dir.name in out and "standard library" in out and "tokenizer: 512" in out
    assert "bits per byte" in out and "gzip" in out
    last = [row for row in read_rows(run_dir) if "val_bpb" in row][-1]
    assert last["step"] == 300 and f"{last['val_bpb']:.3f} bits per byte" in out
    said = json.loads((run_dir / "config.json").read_text())
    assert f"{said['gzip_bits_per_byte']:.3f}" in out
    assert all(f"sample: {prompt!r}" in out for prompt in train.PROMPTS["stdlib"])


@pytest.mark.slow
def test_the_command_keeps_stderr_for_the_progress_bar(command_line_run):
    """No word of libtpu, no warning: only tqdm's bar, which ends at the last step and shows loss, lr and tok/s.

    A pipe or log file keeps every bar: there are two, the first and the last, in a run of less than a minute.
    """
    _, _, err = command_line_run
    assert err.count("step/s") == 2
    assert without_bars(err) == []
    assert "300/300" in err and all(name in err for name in ("loss=", "lr=", "tok/s="))


@pytest.mark.slow
def test_the_command_leaves_the_promised_files(command_line_run):
    """One folder per run with what README lists and model/, which is what goes to the Hub; nothing half-written."""
    run_dir, _, _ = command_line_run
    left = {re.sub(r"(tfevents)\.\d+$", r"\1", path.name) for path in run_dir.iterdir()}
    files = {"events.out.tfevents", "config.json", "metrics.jsonl", "loss.png", "tokenizer.json"}
    assert left == files | {"profile", "checkpoints", "model"}
    model = {path.name: path.read_bytes() for path in (run_dir / "model").iterdir()}
    described = {"README.md", "config.json", "loss.png", "tokenizer.json", "tokenizer_config.json"}
    assert set(model) == described | {"params.safetensors"}
    assert model["params.safetensors"] == (newest(run_dir) / "params.safetensors").read_bytes()
    assert not [path for path in run_dir.rglob("*") if path.name.endswith(".part") or path.name.startswith(".")]
    assert trace_files(run_dir) and len(read_rows(run_dir)) == 300 + 3


@pytest.mark.slow
def test_every_component_is_named_in_the_profile(command_line_run):
    """The plugin's own converter opens the trace, and every scope of the model is in the HLO it holds.

    Of a process of its own: on jax 0.7.2 a trace also holds programs that earlier tests left behind.
    """
    from xprof.convert import raw_to_tool_data

    [path] = trace_files(command_line_run[0])
    assert os.path.getsize(path) > 10_000
    for tool in ("overview_page", "trace_viewer"):
        content, kind = raw_to_tool_data.xspace_to_tool_data([path], tool, {})
        assert content and len(content) > 200, tool
        json.loads(content)
    raw = Path(path).read_bytes()
    scopes = ["embedding", "lm_head", "loss", "optimizer"]
    scopes += [f"layer_{i}/{part}" for i in range(2) for part in ("attention", "mlp")]
    names = set(re.findall(rb"jit\(train_step\)[\w/().>-]+", raw))
    for scope in scopes:
        pattern = rb"[/(]" + scope.encode() + rb"[/)]"
        assert any(re.search(pattern, name) for name in names), f"no operation in scope {scope}"
    assert not any(b"layer_2" in name for name in names)


@pytest.mark.slow
def test_the_command_interrupted_resumes_when_it_is_given_again(command_line_run, tmp_path):
    """Ctrl-C in a terminal ends it with status 0 and a line; the same command again ends as if nothing had been."""
    words = (*SMALL, "--data", "offline", "--out", str(tmp_path / "runs"))
    process = start(*words)
    has_begun = lambda: [path for path in tmp_path.glob("runs/*/metrics.jsonl") if count_rows(path.parent) > 15]
    wait_until(lambda: has_begun() or process.poll() is not None, 120)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0, err
    step = int(re.search(r"trained: (\d+) of 300 steps", out)[1])
    [run_dir] = (tmp_path / "runs").iterdir()
    assert 15 <= step < 300 and newest(run_dir).name == f"step_{step:08d}"
    code, out, err = finish(start(*words))
    assert code == 0 and "resuming" in out and f"after step {step} " in out, err
    assert_same_end(run_dir, command_line_run[0])


@pytest.mark.slow
def test_help_lists_every_setting():
    """--help names each field of Run and Config with what it means and its default, and runs nothing."""
    code, out, err = finish(start("--help"))
    assert code == 0 and err == ""
    shown = " ".join(out.split())
    for cls in (Run, train.Config):
        for field in dataclasses.fields(cls):
            default = str(field.default).lower() if field.type is bool else repr(field.default)
            assert f"--{field.name}" in shown
            meaning = " ".join(f"{field.metadata['help']} (default: {default}".split())
            assert field.metadata["help"] and meaning in shown, field.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [(["--n_heads", "4"], ["--n_heads", "did you mean --n_head?"]), (["--seq_len", "x"], ["--seq_len", "int", "'x'"])],
)
def test_a_wrong_command_is_refused_in_one_line(tmp_path, words, said):
    """A wrong name or type: a status that is not 0, one line on stderr, no traceback, nothing written."""
    code, out, err = finish(start(*words, cwd=tmp_path))
    assert code != 0 and err.count("\n") == 1 and "Traceback" not in err
    assert all(part in err for part in said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("platform, preset", [("tpu", "chip"), ("gpu", "gpu"), ("cpu", "laptop")])
def test_each_device_has_a_preset(monkeypatch, platform, preset):
    """A TPU trains Config() itself; every preset is a Config; a wrong value is refused with its field."""
    monkeypatch.setattr(sys, "argv", ["02_train.py"])
    device = SimpleNamespace(platform=platform, device_kind=f"some {platform}")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    run, config = choose(train.Config, train.PRESETS)
    assert run.preset == preset and config == train.Config(**train.PRESETS[preset])
    assert platform != "tpu" or config == train.Config()
    assert choose(train.Config, train.PRESETS, "--n_head 2")[1] == dataclasses.replace(config, n_head=2, n_kv_head=2)
    with pytest.raises(UserError, match="attn_impl='x'") as caught:
        choose(train.Config, train.PRESETS, "--attn_impl x")
    assert is_one_line(caught.value)
