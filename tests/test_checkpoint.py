"""Nothing is lost: checkpoints that are whole, runs that go on exactly, a Hub that may fail, secrets that stay put."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib
import itertools
import json
import os
import pickle
import random
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
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from conftest import ROOT
from hub import Fault, Hub
from safetensors.numpy import load_file

from onechip.checkpoints import (
    CheckpointWriter,
    clear_leftovers,
    find_damage,
    fixed_fields,
    flatten,
    newest_checkpoint,
    write_checkpoint,
)
from onechip.errors import UserError
from onechip.files import hash_file
from onechip.hub import HubMirror, _make_client, load_hub, open_mirror
from onechip.machine import read_secret
from onechip.settings import Run

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = {
    "n_head": 2,
    "n_kv_head": 1,
    "head_dim": 8,
    "aspect_ratio": 16,
    "vocab_size": 300,
    "seq_len": 24,
    "attn_impl": "einsum",
    "dtype": "float32",
    "device_batch_size": 2,
    "total_batch_size": 6,  # three microbatches a step
    "num_iterations": 20,
    "learning_rate": 1e-2,
    "eval_every": 8,
    "eval_tokens": 7 * 24,
    "sample_every": 0,
    "save_every": 0,
    "save_minutes": 0.0,
}
TIMES = ("time", "tokens_per_second", "mfu")


def tiny(**changes):
    return train.Config(**{**TINY, **changes})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two training shards of 23 and 17 documents in row groups of 7, some 12 batches in all, and 40 held out."""
    words = "the of and energy light measure water plant number import return self value naïve 数据 1024".split()
    folder = tmp_path_factory.mktemp("corpus")
    for i, count in enumerate((23, 17, 40)):
        draw = random.Random(i)
        texts = [" ".join(draw.choices(words, k=draw.randint(1, 30))) + ".\n" for _ in range(count)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet", row_group_size=7)
    return tok.folder_corpus(folder)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return tok.get_tokenizer(corpus, TINY["vocab_size"])


def read_rows(run_dir):
    """metrics.jsonl without what tells the time."""
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def names(run_dir):
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def newest(run_dir):
    return newest_checkpoint(Path(run_dir) / "checkpoints")


def arrays_of(path):
    """Every array of a checkpoint's state by name, as bytes with its type and shape."""
    files = {key: load_file(Path(path) / f"{key}.safetensors") for key in ("params", "mu", "nu")}
    return {(k, name): (a.dtype, a.shape, a.tobytes()) for k, file in files.items() for name, a in file.items()}


def is_one_line(said):
    return "\n" not in str(said) and 0 < len(str(said)) < 400


# ---------------------------------------------------------------------------------------------------------------
# 1. A checkpoint is the whole state

MANY = np.array([0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7FC1, 0x3F80, 0x3EAA], np.uint16)  # -0, NaN, subnormal...


def strange_state(step=7):
    """A train state whose leaves hold float32 and bfloat16 bit patterns that a careless copy would change."""
    state, _ = train.init_state(tiny(), train.make_mesh())
    draw = np.random.default_rng(0)
    noise = lambda leaf: jnp.asarray(draw.integers(0, 2**32, leaf.shape, np.uint32).view(np.float32))
    half = lambda leaf: jnp.asarray(np.resize(MANY, leaf.shape).view(jnp.bfloat16))
    return {
        "params": jax.tree.map(noise, state["params"]),
        "mu": jax.tree.map(half, state["mu"]),
        "nu": jax.tree.map(noise, state["nu"]),
        "step": jnp.int32(step),
    }


def test_every_bit_comes_back(tmp_path, monkeypatch):
    """float32 and bfloat16 arrays, step, position, left-over tokens, notes, metrics and config; no pickle is made."""

    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    state = strange_state()
    stream = {"epoch": 3, "shard": 1, "row_group": 2, "document": 5, "tokens": np.arange(200, 300, dtype=np.int32)}
    notes = {"best_step": 4, "best_val_bpb": 0.1 + 0.2, "remember": {"wandb": "3f9a"}, "made_from": {"jax": "0"}}
    expected = {name: np.array(array) for name, array in flatten(state).items()}
    path = train.save_checkpoint(tmp_path, tiny(), state, stream, notes, '{"step": 7}\n')
    assert path == newest(tmp_path) and path.name == "step_00000007"
    back, back_stream, back_notes = train.load_checkpoint(path, tiny(), train.make_mesh())
    found = flatten(back)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
    assert back_notes == notes and {k: v for k, v in back_stream.items() if k != "tokens"} == {
        k: v for k, v in stream.items() if k != "tokens"
    }
    assert back_stream["tokens"].dtype == np.int32 and back_stream["tokens"].tolist() == stream["tokens"].tolist()
    assert (path / "metrics.jsonl").read_text() == '{"step": 7}\n'
    assert json.loads((path / "config.json").read_text()) == dataclasses.asdict(tiny())
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".jsonl"}


def test_arrays_in_another_memory_order_are_not_scrambled(monkeypatch):
    """safetensors writes memory as it lies: an array that a device hands over in Fortran's order came back shuffled."""
    state = strange_state()
    expected = flatten(state)
    monkeypatch.setattr(common, "flatten", lambda tree: {k: a.copy(order="F") for k, a in expected.items()})
    files = train.checkpoint_files(tiny(), state, {"tokens": []}, {})
    back = safetensors.numpy.load(safetensors.numpy.save(files["params.safetensors"]))
    assert all(back[name].tobytes() == expected[f"params.{name}"].tobytes() for name in back)


# ---------------------------------------------------------------------------------------------------------------
# 2. Exact: a run that was stopped and taken up by another process is the run that was not


@contextlib.contextmanager
def watched(folder, stop_at=None, stop=None):
    """Notes the hash of each step's batch in folder/batches.txt; calls `stop` behind step `stop_at`."""
    real = train.make_train_step

    def make(*args):
        train_step = real(*args)

        def step(state, constants, x, y):
            number = int(state["step"]) + 1
            digest = hashlib.sha256(np.asarray(x).tobytes() + np.asarray(y).tobytes()).hexdigest()
            with open(folder / "batches.txt", "a") as file:
                file.write(f"{number} {digest}\n")
            result = train_step(state, constants, x, y)
            if number == stop_at:
                stop()
            return result

        return step

    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_train_step", make)
        yield patch


def batches(folder):
    """{step: hash of its batch}; a step that was made twice must have had the same."""
    lines = {tuple(line.split()) for line in (folder / "batches.txt").read_text().splitlines()}
    assert len(lines) == len(dict(lines))
    return dict(lines)


def run(corpus, tokenizer, folder, **changes):
    return train.train(tiny(**changes), corpus, tokenizer, folder)


def run_watched(corpus, tokenizer, folder, **changes):
    with watched(folder):
        return run(corpus, tokenizer, folder, **changes)


@pytest.fixture(scope="module")
def straight(corpus, tokenizer, tmp_path_factory):
    """A run in one go."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_watched(corpus, tokenizer, folder)
    return folder


def assert_same_end(folder, straight):
    """Rows but for times, in order, and every array of the last checkpoint, are those of the straight run."""
    assert read_rows(folder) == read_rows(straight)
    assert newest(folder).name == newest(straight).name and arrays_of(newest(folder)) == arrays_of(newest(straight))
    if (folder / "batches.txt").exists():
        assert batches(folder) == batches(straight)


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise ConnectionError("the runtime is gone")


def run_out_of_memory(*args):
    raise MemoryError("RESOURCE_EXHAUSTED")


def stop_runs_at(corpus, tokenizer, folder, epoch_end):
    """Makes a run for each way to stop; returns {folder: the step that its checkpoint must be of}."""
    stopped = {folder / "early": 3, folder / "epoch": epoch_end}
    for path, k in stopped.items():
        with watched(path, k, interrupt):
            assert run(corpus, tokenizer, path).step == k
    with watched(folder / "evaluation") as patch, pytest.raises(MemoryError):
        patch.setattr(train, "make_evaluator", lambda *args: run_out_of_memory)
        run(corpus, tokenizer, folder / "evaluation")
    with watched(folder / "minutes", 15, crash) as patch, pytest.raises(ConnectionError):
        made = folder / "minutes" / "batches.txt"
        now = lambda: 100.0 if made.exists() and len(batches(made.parent)) >= 13 else 0.0
        patch.setattr(train, "time", SimpleNamespace(monotonic=now))
        run(corpus, tokenizer, folder / "minutes", save_minutes=1.0)
    return {**stopped, folder / "evaluation": 8, folder / "minutes": 13}


def resume_in_this_process(folder, corpus_folder):
    """What the other process does: takes every stopped run under `folder` to its end."""
    corpus = tok.folder_corpus(corpus_folder)
    tokenizer = tok.get_tokenizer(corpus, TINY["vocab_size"])
    for path in sorted(Path(folder).iterdir()):
        run_watched(corpus, tokenizer, path, save_minutes=1.0 if path.name == "minutes" else 0.0)


def test_a_new_process_goes_on_exactly(corpus, tokenizer, straight, tmp_path, monkeypatch):
    """k steps, a new process, and the rest: parameters, moments, losses, rates, norms, scores, batches bit for bit.

    k is early; where the next batch runs over the epoch's end; an evaluation that ran out of memory; and a crash two
    steps behind a checkpoint that only the clock asked for. Every step accumulates.
    """
    batch = TINY["total_batch_size"] * TINY["seq_len"]
    per_epoch = sum(len(tok.encode_batch(tokenizer, [t])[0]) for _, t in tok.read_documents(corpus.train))
    epoch_end = per_epoch // batch
    assert per_epoch % batch and epoch_end not in (3, 8, 13) and epoch_end < 19
    runs = stop_runs_at(corpus, tokenizer, tmp_path, epoch_end)
    for path, k in runs.items():
        assert newest(path).name == f"step_{k:08d}", path.name
    code = f"import test_checkpoint as t; t.resume_in_this_process({str(tmp_path)!r}, {str(corpus.train[0].parent)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for path, k in runs.items():
        assert f"{path.name} goes on behind step {k} of 20" in done.stdout
        assert_same_end(path, straight)
    assert len(batches(straight)) == 20 and len(set(batches(straight).values())) == 20


def test_a_listener_that_interrupts_loses_no_row(corpus, tokenizer, straight, tmp_path):
    """Rows are written ten at a time: those behind the one whose listener raised were dropped, for good."""

    def listen(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    cut = train.train(tiny(), corpus, tokenizer, tmp_path, on_log=listen)
    assert 4 <= cut.step < 20
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, cut.step + 1))
    run(corpus, tokenizer, tmp_path)
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_within_a_step_never_saves_half_of_it(corpus, tokenizer, straight, tmp_path, signals):
    """A second one strikes where the old state is donated and the new not yet kept: nothing of that is saved."""

    def strike():
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)

    with watched(tmp_path, 7, strike), contextlib.suppress(KeyboardInterrupt):
        run(corpus, tokenizer, tmp_path, save_every=5)
    assert newest(tmp_path).name == ("step_00000007" if signals == 1 else "step_00000005")
    run_watched(corpus, tokenizer, tmp_path, save_every=5)
    assert_same_end(tmp_path, straight)


# ---------------------------------------------------------------------------------------------------------------
# 3. kill -9


@pytest.mark.slow
def test_killed_three_times_is_the_run_left_alone(corpus):
    """The command that README shows, on few steps: kill -9 at random moments, then the same rows and parameters."""
    flags = "--vocab_size 300 --num_iterations 60 --eval_every 10 --eval_tokens 256 --save_every 3"
    words = ["tools/kill_test.py", "--kills", "3", "--seed", "4", "--data", str(corpus.train[0].parent)]
    words += [*flags.split(), "--sample_every", "0"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^kill (\d): after [\d.]+ s, ", done.stdout, re.M) == ["1", "2", "3"]
    assert done.stdout.splitlines()[-1].startswith("3 kills: the metrics")


# ---------------------------------------------------------------------------------------------------------------
# 4. Atomic


class Stopped(BaseException):
    """The machine stops here."""


class Points:
    """Counts the moments at which a write can be cut off, and stops at the n-th."""

    def __init__(self, patch, stop_at=0):
        self.stop_at, self.passed = stop_at, []
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (Path, "write_bytes"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
            (safetensors.numpy, "save_file"),
            (common, "fsync_path"),
        ):
            patch.setattr(owner, name, self.around(name, getattr(owner, name)))

    def passing(self, when, name, args):
        self.passed.append((when, name, args))
        if len(self.passed) == self.stop_at:
            raise Stopped

    def around(self, name, real):
        def call(*args, **kwargs):
            self.passing("before", name, args)
            if name.startswith("write") and self.stop_at == len(self.passed) + 1:
                real(args[0], args[1][: len(args[1]) // 2])  # a file cut in the middle
            else:
                real(*args, **kwargs)
            self.passing("behind", name, args)

        return call


def some_files(value):
    return {
        "params.safetensors": {"w": np.full(4, value, np.float32)},
        "metrics.jsonl": b"{}\n",
        "state.json": b'{"step": %d}' % value,
    }


def value_of(path):
    return int(load_file(path / "params.safetensors")["w"][0])


def write_stopped(folder, n):
    """Writes step 6 over 4 and 5, keeping one, stopped at the n-th point; returns the points and whether it ended."""
    with pytest.MonkeyPatch.context() as patch:
        points = Points(patch, n)
        writer = CheckpointWriter(folder, keep=1)
        try:
            writer.save(6, some_files(6), best=4)
            writer.wait()
        except Stopped:
            return points.passed, False
    return points.passed, True


def test_stopped_at_any_point_the_newest_whole_checkpoint_is_found(tmp_path, capsys):
    """The old one up to the rename, the new one from it on, and a later save of the same step works all the same."""
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        for step in (4, 5):
            write_checkpoint(folder / f"step_{step:08d}", some_files(step))
        passed, ended = write_stopped(folder, n)
        renamed = any(name == "replace" and when == "behind" for when, name, _ in passed)
        assert value_of(newest_checkpoint(folder)) == (6 if renamed else 5), f"point {n}: {passed[-1]}"
        if not renamed:
            write_checkpoint(folder / "step_00000006", some_files(6))
            assert value_of(newest_checkpoint(folder)) == 6
        clear_leftovers(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        if ended:
            break
    assert n > 40 and "damaged" not in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004", "step_00000006"]


def test_everything_is_on_disk_before_what_says_so(tmp_path, monkeypatch):
    """Each file is synced before the manifest is written, that and the folder before the rename, the parent after."""
    points = Points(monkeypatch)
    write_checkpoint(tmp_path / "step_00000001", some_files(1))
    path_in = lambda args: next(Path(arg).name for arg in args if isinstance(arg, str | Path))
    done = [(name, path_in(args)) for when, name, args in points.passed if when == "behind" and name != "fsync"]
    order = {event: i for i, event in enumerate(done)}
    manifest, renamed = order["write_text", "manifest.json"], order["replace", ".step_00000001.part"]
    assert all(order["fsync_path", name] < manifest for name in some_files(1))
    assert manifest < order["fsync_path", "manifest.json"] < renamed
    assert order["fsync_path", ".step_00000001.part"] < renamed < order["fsync_path", tmp_path.name]
    synced = sum(name == "fsync" for _, name, _ in points.passed)
    assert synced == sum(name == "fsync_path" for _, name, _ in points.passed), "fsync_path does not sync"


# ---------------------------------------------------------------------------------------------------------------
# 5. Damage

DAMAGES = {
    "truncated": lambda path: os.truncate(path / "params.safetensors", 20),
    "longer": lambda path: (path / "metrics.jsonl").write_bytes(b"{}\n{}\n"),
    "flipped": lambda path: flip(path / "params.safetensors"),
    "file missing": lambda path: (path / "state.json").unlink(),
    "file a folder": lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "cut manifest": lambda path: os.truncate(path / "manifest.json", 30),
    "empty manifest": lambda path: (path / "manifest.json").write_text("{}"),
    "list manifest": lambda path: (path / "manifest.json").write_text('["params.safetensors"]'),
    "bare manifest": lambda path: (path / "manifest.json").write_text('{"params.safetensors": {"bytes": 84}}'),
    "binary manifest": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "more in manifest": lambda path: add_to_manifest(path, "optimizer.safetensors"),
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
}


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def add_to_manifest(path, name):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, name: {"bytes": 3, "sha256": "0"}}))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_set_aside_and_skipped(tmp_path, capsys, kind):
    """The next older one is used; one line says which is damaged and how; nothing of it is deleted or changed."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"step_{step:08d}", some_files(step))
    for step in (2, 3):
        DAMAGES[kind](tmp_path / f"step_{step:08d}")
    damaged = {step: content(tmp_path / f"step_{step:08d}") for step in (2, 3)}
    assert value_of(newest_checkpoint(tmp_path)) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("is damaged: " in line and is_one_line(line) for line in said)
    assert "step_00000003" in said[0] and "damaged_step_00000003_0" in said[0]
    for step, before in damaged.items():
        assert content(tmp_path / f"damaged_step_{step:08d}_0") == before
    assert value_of(newest_checkpoint(tmp_path)) == 1 and capsys.readouterr().out == ""
    write_checkpoint(tmp_path / "step_00000003", some_files(3))  # made again, and damaged again
    DAMAGES[kind](tmp_path / "step_00000003")
    newest_checkpoint(tmp_path)
    assert (
        content(tmp_path / "damaged_step_00000003_0") == damaged[3] and (tmp_path / "damaged_step_00000003_1").exists()
    )


def test_a_disk_that_cannot_be_read_is_damage(tmp_path, monkeypatch, capsys):
    """An I/O error in one checkpoint does not keep a run from the one before."""
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step_{step:08d}", some_files(step))
    real = hash_file

    def fail(path):
        if "step_00000002" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(common, "hash_file", fail)
    assert newest_checkpoint(tmp_path).name == "step_00000001"
    assert "Input/output error" in capsys.readouterr().out


def test_the_last_ones_and_the_best_stay(tmp_path):
    """`keep` newest and the best; what was set aside or written apart is neither counted nor removed nor resumed."""
    for name in ("nonfinite_00000099", "damaged_step_00000098_0"):
        write_checkpoint(tmp_path / name, some_files(9))
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in range(1, 7):
        writer.save(step, some_files(step), best=2 if step > 2 else None)
        writer.wait()
    left = ["damaged_step_00000098_0", "nonfinite_00000099", *(f"step_{i:08d}" for i in (2, 5, 6))]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert value_of(newest_checkpoint(tmp_path)) == 6
    for step in (2, 5, 6):
        shutil.rmtree(tmp_path / f"step_{step:08d}")
    assert newest_checkpoint(tmp_path) is None


def test_the_best_checkpoint_is_that_of_the_best_score(corpus, tokenizer, tmp_path, quick):
    """A run whose third evaluation is its best keeps that step's checkpoint to the end, and says so in the notes."""
    scores = itertools.chain([3.0, 2.0, 1.0], itertools.repeat(4.0))
    quick.setattr(train, "make_evaluator", lambda *args: lambda *args: (0.5, next(scores)))
    run(corpus, tokenizer, tmp_path, eval_every=2, keep=1)
    assert names(tmp_path) == ["step_00000006", "step_00000020"]
    notes = json.loads((newest(tmp_path) / "state.json").read_text())
    assert (notes["best_step"], notes["best_val_bpb"]) == (6, 1.0)


# ---------------------------------------------------------------------------------------------------------------
# 6. The thread


@pytest.fixture
def quick(monkeypatch):
    """Steps that only count, scores out of thin air, no picture, no trace: for what is around them."""

    def step(state, constants, x, y):
        number = state["step"] + 1
        return {**state, "step": number}, {"loss": 1.0 / number, "grad_norm": 1.0, "lr": 0.1}

    none = SimpleNamespace(before=lambda _: contextlib.nullcontext(), after=lambda *_: None, close=lambda: None)
    monkeypatch.setattr(train, "make_train_step", lambda *args: step)
    monkeypatch.setattr(train, "make_evaluator", lambda *args: lambda *args: (1.0, 2.0))
    monkeypatch.setattr(common, "plot_losses", lambda *args: None)
    monkeypatch.setattr(common, "ProfileWindow", lambda *args: none)
    return monkeypatch


def test_what_is_written_are_the_numbers_of_the_save(tmp_path, monkeypatch):
    """The state is donated to the next steps while the thread still writes: on a CPU NumPy would see that."""
    config, mesh, go_on, real = tiny(), train.make_mesh(), threading.Event(), write_checkpoint
    monkeypatch.setattr(common, "write_checkpoint", lambda *args: go_on.wait(60) and real(*args))
    step, (state, constants) = train.make_train_step(config, mesh), train.init_state(config, mesh)
    x = jax.device_put(np.ones((6, 24), np.int32), jax.sharding.NamedSharding(mesh, jax.P("data")))
    writer = CheckpointWriter(tmp_path / "checkpoints")
    state, _ = step(state, constants, x, x)
    expected = {name: np.array(array, copy=True).tobytes() for name, array in flatten(state).items()}
    writer.save(1, train.checkpoint_files(config, state, {"tokens": []}, {}))
    leaf = state["params"]["wte"]
    for _ in range(3):
        state, _ = step(state, constants, x, x)
    jax.block_until_ready(state)
    go_on.set()
    writer.wait()
    assert leaf.is_deleted(), "the state should have been donated"
    written = arrays_of(tmp_path / "checkpoints" / "step_00000001")
    assert {f"{key}.{name}": a[2] for (key, name), a in written.items()}.items() <= expected.items() and written


def test_training_does_not_wait_for_the_disk(corpus, tokenizer, tmp_path, quick):
    """A disk that takes its time: steps go on behind the save, and train() returns when the last one is written."""
    real_write, real_advance, reached, waited = write_checkpoint, train.Trainer.advance, threading.Event(), []

    def write(path, files):
        waited.append(reached.wait(30))
        time.sleep(0.1)
        real_write(path, files)

    def advance(trainer, done):
        if done == 12:
            reached.set()
        return real_advance(trainer, done)

    quick.setattr(common, "write_checkpoint", write)
    quick.setattr(train.Trainer, "advance", advance)
    run(corpus, tokenizer, tmp_path, eval_every=0, save_every=10)
    assert waited == [True, True] and names(tmp_path) == ["step_00000010", "step_00000020"]


def test_the_host_never_holds_two_copies(corpus, tokenizer, tmp_path, quick):
    """A save that comes while the one before is being written waits before it copies: 3.2 GB once, not twice."""
    real_write, real_files, writing, copied = write_checkpoint, train.checkpoint_files, threading.Event(), []

    def write(*args):
        writing.set()
        time.sleep(0.1)
        real_write(*args)
        writing.clear()

    def files(*args):
        copied.append(writing.is_set())
        return real_files(*args)

    quick.setattr(common, "write_checkpoint", write)
    quick.setattr(train, "checkpoint_files", files)
    run(corpus, tokenizer, tmp_path, eval_every=0, save_every=1, num_iterations=4)
    assert copied == [False] * 4


def test_a_full_disk_stops_training_with_one_line_and_loses_nothing(corpus, tokenizer, straight, tmp_path):
    """The thread's error is raised by the loop; the checkpoint before is whole, and the run goes on from it exactly."""
    real = safetensors.numpy.save_file

    def save(arrays, path):
        if "step_00000012" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(arrays, path)

    with watched(tmp_path) as patch, pytest.raises(UserError, match="the disk is full") as raised:
        patch.setattr(safetensors.numpy, "save_file", save)
        run(corpus, tokenizer, tmp_path, save_every=6)
    assert is_one_line(raised.value) and "step_00000012" in str(raised.value)
    assert names(tmp_path) == ["step_00000006", "step_00000008"]
    run_watched(corpus, tokenizer, tmp_path, save_every=6)
    assert_same_end(tmp_path, straight)
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("checkpoint", "loader")]


# ---------------------------------------------------------------------------------------------------------------
# 7. When


def saves(quick):
    """The steps that the writer was given, in order, with those that were evaluated or sampled between them."""
    steps, real = [], CheckpointWriter.save
    quick.setattr(CheckpointWriter, "save", lambda self, step, *args: (steps.append(step), real(self, step, *args)))
    return steps


def test_saves_by_steps_by_minutes_and_before_what_may_fail(corpus, tokenizer, tmp_path, quick):
    """save_every and save_minutes, whichever comes first, each evaluation, each sample and the end; no step twice."""
    steps, clock = saves(quick), iter(range(0, 10000, 20))  # 20 s pass with each look at the clock
    quick.setattr(train, "make_sample_writer", lambda *args: lambda params: [])
    run(corpus, tokenizer, tmp_path / "a", save_every=6, eval_every=9, sample_every=7)
    assert steps == [6, 7, 9, 12, 14, 18, 20]
    steps.clear()
    quick.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run(corpus, tokenizer, tmp_path / "b", eval_every=0, save_minutes=1.5, save_every=7)
    assert steps[:2] == [5, 7] and max(np.diff(steps)) <= 5 and steps[-1] == 20
    steps.clear()
    quick.setattr(train, "time", time)
    run(corpus, tokenizer, tmp_path / "c", eval_every=0)
    assert steps == [20]


@pytest.mark.parametrize("what, kept", [("evaluate", 8), ("sample", 7), ("last evaluation", 5), ("last sample", 5)])
def test_what_runs_out_of_memory_finds_its_step_saved(corpus, tokenizer, tmp_path, quick, what, kept):
    """An evaluation or a sample that fails, in the middle or at the end, costs no step: nanochat#446 lost 29 hours."""
    factory = "make_sample_writer" if "sample" in what else "make_evaluator"
    quick.setattr(train, factory, lambda *args: run_out_of_memory)
    changes = {"num_iterations": 5} if "last" in what else {"sample_every": 7 if what == "sample" else 0}
    with pytest.raises(MemoryError):
        run(corpus, tokenizer, tmp_path, **changes)
    assert newest(tmp_path).name == f"step_{kept:08d}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_was_reached(corpus, tokenizer, tmp_path, quick, number, capsys):
    """Colab's stop button and the machine's own end alike: the step in hand is finished, saved and returned."""
    with watched(tmp_path, 5, lambda: signal.raise_signal(number)):
        assert run(corpus, tokenizer, tmp_path).step == 5
    assert newest(tmp_path).name == "step_00000005" and "interrupted behind step 5" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_the_last_checkpoint_is_written_does_not_end_the_process(corpus, tokenizer, tmp_path, quick):
    """Handlers were put back before the writer was waited for: a SIGTERM then killed the write."""
    real_write, real_close, closing, got_through = write_checkpoint, train.Trainer.close, threading.Event(), []

    def write(*args):
        closing.wait(30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(0.1)
        real_write(*args)

    quick.setattr(common, "write_checkpoint", write)
    quick.setattr(train.Trainer, "close", lambda trainer: (closing.set(), real_close(trainer)))
    before = signal.signal(signal.SIGTERM, lambda *args: got_through.append(args))
    try:
        run(corpus, tokenizer, tmp_path, eval_every=0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert newest(tmp_path).name == "step_00000020" and got_through == []


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_is_kept_apart(corpus, tokenizer, tmp_path, quick, name):
    """One line; the bad state beside as nonfinite_*, the last good checkpoint stays newest and is what is resumed."""
    real = train.make_train_step()

    def step(state, *args):
        state, metrics = real(state, *args)
        return state, metrics | ({name: jnp.nan} if int(state["step"]) == 11 and not healed else {})

    healed = []
    quick.setattr(train, "make_train_step", lambda *args: step)
    for _ in range(2):  # the second start meets the same, and must not stumble over what the first left
        with pytest.raises(UserError, match=f"the {name} of step 11 is nan") as raised:
            run(corpus, tokenizer, tmp_path, save_every=4)
        assert is_one_line(raised.value) and newest(tmp_path).name == "step_00000008"
        (apart,) = (tmp_path / "checkpoints").glob("nonfinite_*")
        assert find_damage(apart) is None
        assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, 11))
    healed.append(True)
    assert run(corpus, tokenizer, tmp_path, save_every=4).step == 20 and apart.exists()
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, 21))


# ---------------------------------------------------------------------------------------------------------------
# 8. Something changed

OTHER = {
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 16,
    "aspect_ratio": 8,
    "vocab_size": 301,
    "seq_len": 12,
    "window_pattern": "L",
    "softcap": 20.0,
    "rope_base": 5000.0,
    "total_batch_size": 4,
    "param_seed": 1,
}
SAFE = {
    "num_iterations": 24,
    "learning_rate": 0.02,
    "eval_every": 5,
    "device_batch_size": 3,
    "weight_decay": 0.2,
    "save_every": 3,
    "dtype": "bfloat16",
    "attn_impl": "jax",
}


@pytest.fixture
def five_steps(corpus, tokenizer, tmp_path, quick):
    """The folder of a run that ended after five steps, and what stood in its checkpoints."""
    train.train(tiny(num_iterations=5), corpus, tokenizer, tmp_path, remember={"wandb": "3f9a"})
    return tmp_path


def test_a_change_of_model_or_data_is_refused(corpus, tokenizer, five_steps, quick):
    """The field, both values and the remedy in one line, for every such field, and nothing is touched."""
    before = content(five_steps / "checkpoints")
    quick.setattr(train, "check_tokenizer", lambda *args: None)
    drawn = train.init_state(tiny(), train.make_mesh())
    quick.setattr(train, "init_state", lambda *args: drawn)  # nothing to compile for each
    assert set(fixed_fields(train.Config)) == set(OTHER)
    for field, value in OTHER.items():
        with pytest.raises(UserError) as raised:
            run(corpus, tokenizer, five_steps, num_iterations=5, **{field: value})
        said = str(raised.value)
        assert said.startswith(f"{field}={value!r}: ") and f"was made with {TINY.get(field)!r}" in said.replace(
            repr(train.Config().__getattribute__(field)), repr(TINY.get(field))
        )
        assert "another name" in said and is_one_line(said)
    assert content(five_steps / "checkpoints") == before


def test_a_safe_change_is_accepted_and_said(corpus, tokenizer, five_steps, capsys):
    """Number of steps, rates, evaluations, microbatches: both values in a line each, and the run goes on."""
    result = run(corpus, tokenizer, five_steps, **SAFE)
    said = capsys.readouterr().out
    for field, value in SAFE.items():
        was = 5 if field == "num_iterations" else getattr(tiny(), field)
        assert f"changed: {field} is {value!r}, was {was!r} up to here" in said
    assert said.count("changed: ") == len(SAFE) and result.step == 24
    run(corpus, tokenizer, five_steps, **SAFE)
    assert "changed" not in capsys.readouterr().out, "what was said once is in the next checkpoint"


def test_another_tokenizer_dataset_or_jax_is_told(corpus, tokenizer, five_steps, quick, capsys):
    """What a run is made from travels in its checkpoints, a wandb id with it; another is a line with both."""
    notes = json.loads((newest(five_steps) / "state.json").read_text())
    made_from = notes["made_from"]
    assert notes["remember"] == {"wandb": "3f9a"}
    assert made_from["tokenizer_sha256"] == tok.tokenizer_hash(tokenizer) and made_from["jax"] == jax.__version__
    assert made_from["data"] == {"name": corpus.name, "revision": corpus.revision, "shards": 2}
    other = tok.train_tokenizer((text for _, text in tok.read_documents(corpus.val)), 300)
    quick.setattr(jax, "__version__", "0.99")
    run(dataclasses.replace(corpus, revision="another"), other, five_steps, num_iterations=6)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("changed: data is ")]
    assert "'another'" in line.partition(", was ")[0] and corpus.revision in line.partition(", was ")[2]
    assert f"changed: jax is 0.99, was {made_from['jax']}" in said
    assert f"changed: tokenizer_sha256 is {tok.tokenizer_hash(other)}, was {made_from['tokenizer_sha256']}" in said
    assert json.loads((newest(five_steps) / "state.json").read_text())["remember"] == {"wandb": "3f9a"}


# ---------------------------------------------------------------------------------------------------------------
# 9. The Hub

REPO = "someone/onechip-x"
TOKEN = "hf_loopback"


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback that this process's client talks to, one that waits for nothing long."""
    library, real_sleep = load_hub(), time.sleep
    with Hub() as hub:
        hub.slept = []
        monkeypatch.setattr(library, "HfApi", functools.partial(library.HfApi, endpoint=hub.url))
        monkeypatch.setattr(time, "sleep", lambda s: (hub.slept.append(s), real_sleep(min(s, 0.01)))[1])
        monkeypatch.setattr(common, "STALL", 0.4)
        library.set_client_factory(_make_client)  # closes connections that have the usual time-out
        yield hub
    assert not hub.unknown
    library.set_client_factory(_make_client)


def mirror_of(hub, **minutes):
    return HubMirror(TOKEN, REPO, **minutes)


def settle(mirror):
    """Waits until nothing is being uploaded."""
    mirror._pool.submit(lambda: None).result(60)


def offer(mirror, folder, step):
    """Writes a checkpoint, offers it and waits."""
    path = folder / f"step_{step:08d}"
    write_checkpoint(path, {**some_files(step), "config.json": b"{}"})
    mirror.offer(path)
    settle(mirror)
    return path


def commits(hub):
    """Each commit's files, but for the one that made the repository."""
    return list(hub.repos["model", REPO].commits.values())[1:]


def test_weights_go_up_often_and_the_whole_state_now_and_then(hub, tmp_path, monkeypatch):
    """One commit each; the state by its own clock, the last in any case, and older states leave in the same commit."""
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    mirror = mirror_of(hub, weights_minutes=10, state_minutes=30)
    went_up = []
    for step in range(1, 10):
        offer(mirror, tmp_path, step)
        now[0] += 300
        found = commits(hub)
        steps = {path.split("/")[1] for path in found[-1] if path.startswith("checkpoints/")}
        assert len(steps) == 1, "one whole state at any time"
        went_up.append((len(found), int(steps.pop()[-1])))
    assert went_up == [(1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1), (4, 7), (4, 7), (5, 7)]
    for files, step in zip(commits(hub), (1, 3, 5, 7, 9), strict=True):
        assert safetensors.numpy.load(files["params.safetensors"])["w"][0] == step
        assert files["metrics.jsonl"] == b"{}\n" and files["config.json"] == b"{}"
    mirror.finish()
    assert len(commits(hub)) == 6 and hub.repos["model", REPO].private
    last = {path.removeprefix("checkpoints/step_00000009/"): raw for path, raw in hub.files(REPO).items()}
    assert content(tmp_path / "step_00000009").items() <= last.items()
    assert not list(tmp_path.glob(".*")), "what was held for the upload is gone"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/commit/", status=500, times=3),
        Fault("POST", "/preupload/", status=429, headers={"Retry-After": "1"}, times=2),
        Fault("POST", "/repos/create", status=503, times=2),
        Fault("POST", "/objects/batch", stall=True, times=2),
        Fault("PUT", "/lfs/", cut=True),
    ],
    ids=lambda fault: f"{fault.path} {fault.status or 'broken'}",
)
def test_an_upload_is_tried_again(hub, tmp_path, capsys, fault):
    """Errors, a rate limit, a stall and a cut: with growing pauses, until it is up, and nothing is said."""
    hub.faults = [dataclasses.replace(fault)]
    mirror = mirror_of(hub)
    path = offer(mirror, tmp_path, 1)
    mirror.finish()
    up = hub.files(REPO)
    assert {f"checkpoints/step_00000001/{name}": raw for name, raw in content(path).items()}.items() <= up.items()
    assert hub.faults[0].times == 0 and capsys.readouterr().out == ""
    if fault.status == 500:
        assert [s for s in hub.slept if s >= 1][:3] == [1, 2, 4]
    if fault.status == 429:
        assert max(hub.slept) >= 1


def test_a_hub_that_always_fails_stops_nothing_and_is_said(hub, corpus, tokenizer, tmp_path, quick, capsys):
    """Training reaches its end, every checkpoint is here, and one line at the end says what is not up, and why."""
    hub.faults = [Fault("POST", "/commit/", status=500, times=10**6)]
    result = train.train(tiny(save_every=10), corpus, tokenizer, tmp_path, mirror=mirror_of(hub))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("upload: ")]
    assert result.step == 20 and newest(tmp_path).name == "step_00000020"
    assert said and all(is_one_line(line) for line in said) and "step_00000020" in said[-1] and "500" in said[-1]
    assert commits(hub) == [] and TOKEN not in "".join(said)


def test_a_hub_that_comes_back_gets_what_it_missed(hub, tmp_path, capsys):
    """A failed upload is due again at the next checkpoint, not an hour later, and a repository is made then."""
    hub.faults = [Fault("POST", "/repos/create", status=500, times=30)]
    mirror = mirror_of(hub)
    offer(mirror, tmp_path, 1)
    hub.faults.clear()
    offer(mirror, tmp_path, 2)
    assert "checkpoints/step_00000002/manifest.json" in hub.files(REPO)
    mirror.finish()
    assert "step_00000001: cannot be uploaded" in capsys.readouterr().out


def test_a_disk_without_links_still_uploads(hub, tmp_path, monkeypatch):
    """Google Drive's file system has no hard links: an error there would have stopped training."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    mirror = mirror_of(hub)
    offer(mirror, tmp_path, 1)
    mirror.finish()
    assert "checkpoints/step_00000001/manifest.json" in hub.files(REPO)


def test_a_new_machine_goes_on_from_the_hub(hub, corpus, tokenizer, straight, tmp_path, monkeypatch, capsys):
    """An empty folder and the same run: the last whole state was up before train() returned, comes back, goes on."""
    real = HubMirror._commit
    monkeypatch.setattr(HubMirror, "_commit", lambda *args: (threading.Event().wait(0.3), real(*args)))
    with watched(tmp_path / "a", 13, interrupt):
        train.train(tiny(), corpus, tokenizer, tmp_path / "a", mirror=mirror_of(hub))
    up = {path.split("/")[1] for path in hub.files(REPO) if path.startswith("checkpoints/")}
    assert up == {"step_00000013"}
    with watched(tmp_path / "b"):
        shutil.copyfile(tmp_path / "a" / "batches.txt", tmp_path / "b" / "batches.txt")
        train.train(tiny(), corpus, tokenizer, tmp_path / "b", mirror=mirror_of(hub))
    assert f"step_00000013 came from {REPO}" in capsys.readouterr().out
    assert_same_end(tmp_path / "b", straight)
    assert {f"checkpoints/step_00000020/{name}" for name in content(newest(tmp_path / "b"))} <= hub.files(REPO).keys()
    assert not [name for name in names(tmp_path / "b") if not name.startswith("step_")]


def put_up(hub, *steps):
    """A repository with these checkpoints, made on another machine; returns their files."""
    files = {}
    for step in steps:
        path = Path(os.environ["ONECHIP_HOME"]) / f"elsewhere_{time.monotonic_ns()}" / f"step_{step:08d}"
        write_checkpoint(path, some_files(step))
        files |= {f"checkpoints/{path.name}/{name}": raw for name, raw in content(path).items()}
    hub.add_repo(REPO, files)
    return files


def restored(hub, folder):
    """The value of the checkpoint that a run in `folder` would go on from, or None."""
    mirror = mirror_of(hub)
    mirror.restore(folder)
    mirror.finish()
    path = newest_checkpoint(folder)
    return path and value_of(path)


def test_the_newest_of_both_homes_is_taken(hub, tmp_path, capsys):
    """No repository: a fresh start. The Hub newer: its own. As new or older: the local one, which then goes up."""
    assert restored(hub, tmp_path / "fresh") is None and capsys.readouterr().out == ""
    put_up(hub, 3, 5)
    assert restored(hub, tmp_path / "empty") == 5
    write_checkpoint(tmp_path / "older" / "step_00000004", some_files(4))
    assert restored(hub, tmp_path / "older") == 5
    asked = hub.count("GET", "resolve")
    write_checkpoint(tmp_path / "same" / "step_00000005", some_files(50))
    assert restored(hub, tmp_path / "same") == 50 and hub.count("GET", "resolve") == asked
    write_checkpoint(tmp_path / "newer" / "step_00000006", {**some_files(6), "config.json": b"{}"})
    assert restored(hub, tmp_path / "newer") == 6 and hub.count("GET", "resolve") == asked
    assert "checkpoints/step_00000006/manifest.json" in hub.files(REPO), "a run that was killed before its upload"


def test_a_damaged_checkpoint_on_the_hub_is_said_and_passed_over(hub, tmp_path, capsys):
    """An older one, or a fresh start; it is not deleted when others go up. One spoiled on the way only is fetched."""
    files = put_up(hub, 3, 5)
    hub.faults = [Fault("GET", "/cdn/.*step_00000005/params", flip=True)]
    assert restored(hub, tmp_path / "flipped once") == 5 and "damaged" not in capsys.readouterr().out
    spoiled = dict(files)
    for step in (5, 3):
        path = f"checkpoints/step_{step:08d}/params.safetensors"
        spoiled[path] = files[path][:-1] + b"\x55"
        hub.add_repo(REPO, spoiled)
        assert restored(hub, tmp_path / str(step)) == (3 if step == 5 else None)
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"checkpoint: step_00000005 on {REPO} is damaged: params.safetensors has another")
        assert is_one_line(said[0]) and not list((tmp_path / str(step)).glob(".*"))
    mirror = mirror_of(hub)
    offer(mirror, tmp_path / "new", 4)
    mirror.finish()
    kept = {path.split("/")[1] for path in hub.files(REPO) if path.startswith("checkpoints/")}
    assert kept == {"step_00000004", "step_00000005"}


def test_a_hub_that_cannot_be_reached_does_not_cost_a_run(hub, tmp_path, capsys):
    """With a checkpoint here training goes on from that; with none it is refused: a fresh start might be the loss."""
    hub.faults = [Fault("GET", "/api/models/", status=500, times=10**6)]
    with pytest.raises(UserError, match=f"{REPO}: cannot be listed") as raised:
        mirror_of(hub).restore(tmp_path / "empty")
    assert is_one_line(raised.value)
    write_checkpoint(tmp_path / "here" / "step_00000002", {**some_files(2), "config.json": b"{}"})
    assert restored(hub, tmp_path / "here") == 2 and "without a look at the Hub" in capsys.readouterr().out


def test_a_mirror_needs_a_token_that_the_hub_takes(hub, capsys):
    """None without one; a refused one is a line, at once; a Hub that is only slow to answer is asked again."""
    run = Run(name="x")
    assert open_mirror(run, None) is None
    assert open_mirror(run, "hf_wrong_canary") is None
    said = capsys.readouterr().out
    assert said.startswith("upload: checkpoints stay here") and "hf_wrong" not in said and is_one_line(said.strip())
    assert max(hub.slept, default=0) < 1, "a refusal is not tried again"
    hub.faults = [Fault("GET", "/api/whoami-v2", status=500, times=2)]
    assert open_mirror(run, TOKEN).repo == REPO


# ---------------------------------------------------------------------------------------------------------------
# 10. Secrets


@pytest.fixture
def payloads(monkeypatch):
    """Everything that a loopback Hub is sent, headers aside."""
    received, real = [], loopback._Handler.read_body

    def read_body(handler):
        body = real(handler)
        headers = [f"{name}: {value}" for name, value in handler.headers.items() if name.lower() != "authorization"]
        received.append("\n".join([handler.path, *headers]).encode() + body)
        return body

    monkeypatch.setattr(loopback._Handler, "read_body", read_body)
    return received


CANARY = "hf_canaryNeverToBeSeen"
FLAGS = "--preset laptop --n_head 2 --head_dim 8 --aspect_ratio 16 --vocab_size 300 --seq_len 64 --device_batch_size 2"
FLAGS += " --total_batch_size 4 --eval_tokens 240 --save_every 5 --name x"


def start_training(hub, folder, corpus, words, **environment):
    """02_train.py in a process of its own that knows only this Hub."""
    environment = os.environ | hub.environment() | {"HOME": str(folder), "HF_HOME": str(folder / "hf")} | environment
    command = [sys.executable, str(ROOT / "02_train.py"), *FLAGS.split(), *words.split()]
    command += ["--data", str(corpus.train[0].parent)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def assert_unseen(canary, folder, said, received):
    """The canary, or half of it, in no file, no line and no payload."""
    half = canary[len(canary) // 2 :]
    assert half not in said
    assert [path for path in folder.rglob("*") if path.is_file() and half.encode() in path.read_bytes()] == []
    assert not [raw for raw in received if half.encode() in raw]


def test_a_terminated_process_leaves_all_on_the_hub_and_no_token_anywhere(corpus, tokenizer, tmp_path, payloads):
    """SIGTERM to a real process: exit code 0, its last step here and on the Hub; its token in no file, line, payload.

    Then another process with a token that the Hub no longer takes, and pasted with its line's end, as tokens are.
    """
    with Hub(users={CANARY: "someone"}) as hub:
        process = start_training(hub, tmp_path, corpus, "--num_iterations 100000 --eval_every 0", HF_TOKEN=CANARY)
        run_dir = tmp_path / "runs" / "x"
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if (run_dir / "metrics.jsonl").exists() and len(read_whole_rows(run_dir)) > 20:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        step = read_rows(run_dir)[-1]["step"]
        assert f"interrupted behind step {step:,}" in out and newest(run_dir).name == f"step_{step:08d}"
        assert f"checkpoints/step_{step:08d}/manifest.json" in hub.files("someone/onechip-x")
        assert not hub.unknown and set(hub.tokens) <= {CANARY, None} and CANARY in hub.tokens
        hub.users.clear()
        words = f"--num_iterations {step + 2} --eval_every 0"
        process = start_training(hub, tmp_path, corpus, words, HF_TOKEN=f"{CANARY}\n")
        more = process.communicate(timeout=120)
        assert process.returncode == 0 and "upload: checkpoints stay here" in more[0], more
    assert_unseen(CANARY, tmp_path, out + err + "".join(more), payloads)


def read_whole_rows(run_dir):
    return [line for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"]


def test_colabs_secret_is_as_well_kept(hub, corpus, tokenizer, tmp_path, quick, payloads, capfd):
    """A token from Colab's userdata, uploads that work and uploads that fail with what the Hub says."""
    quick.syspath_prepend(str(ROOT / "tests" / "colab"))
    quick.setenv("COLAB_SECRETS", json.dumps({"HF_TOKEN": f" {CANARY}\n"}))
    for name in [name for name in sys.modules if name == "google" or name.startswith("google.")]:
        quick.delitem(sys.modules, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "in_notebook", lambda: True)
        token = read_secret("HF_TOKEN")
    hub.users[CANARY] = "someone"
    for i, faults in enumerate(([], [Fault("POST", "/commit/", status=403, times=99)])):
        hub.faults = faults
        mirror = open_mirror(Run(name=f"y{i}", out=str(tmp_path)), token)
        train.train(tiny(num_iterations=5), corpus, tokenizer, tmp_path / f"y{i}", mirror=mirror)
    assert CANARY in hub.tokens and "checkpoints/step_00000005/state.json" in hub.files("someone/onechip-y0")
    said = capfd.readouterr()
    assert "upload: step_00000005: cannot be uploaded" in said.out
    assert_unseen(CANARY, tmp_path, said.out + said.err, payloads)
