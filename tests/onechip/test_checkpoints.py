"""onechip/checkpoints.py: the whole state, complete or not there, verified; only our own files are touched."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from onechip import checkpoints, files
from onechip import writer as writer_room
from onechip.checkpoints import (
    clear_leftovers,
    find_damage,
    flatten,
    newest_checkpoint,
    pack_state,
    unflatten,
    unpack_state,
    write_checkpoint,
)
from onechip.errors import UserError
from onechip.files import hash_file
from onechip.resume import compare_with_checkpoint
from onechip.settings import setting
from onechip.writer import CheckpointWriter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a checkpoint keeps of its settings."""

    width: int = setting(3, "how wide", fixed=True)
    rate: float = setting(0.5, "how fast")


def is_one_line(said):
    return "\n" not in str(said) and 0 < len(str(said)) < 400


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def some_files(value):
    """The files of a small checkpoint; value_of gives the value that its parameters have."""
    return {
        "params.safetensors": {"w": np.full(4, value, np.float32)},
        "opt.safetensors": {"mu.w": np.zeros(4, np.float32)},
        "metrics.jsonl": b'{"step": 1}\n',
        "state.json": b'{"step": %d}' % value,
        "config.json": b"{}",
    }


def value_of(path):
    return int(load_file(path / "params.safetensors")["w"][0])


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint is the whole state

# -0, the smallest subnormal, infinities, NaN with a payload, 1, 1/3: as bfloat16 and as float32
HALVES = np.array([0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7FC1, 0x3F80, 0x3EAA], np.uint16)
SINGLES = np.array([-0.0, 1e-45, 3.4e38, np.nan, np.inf, 1 / 3], np.float32)


class Moments(NamedTuple):
    fast: dict
    slow: tuple


def strange_state(step=7):
    """A state of nested dicts, lists, tuples and a NamedTuple, whose bit patterns a careless copy would change."""
    draw = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(draw.integers(0, 2**32, shape, np.uint32).view(np.float32))
    half = lambda *shape: jnp.asarray(np.resize(HALVES, shape).view(jnp.bfloat16))
    odd = lambda *shape: jnp.asarray(np.resize(SINGLES, shape))
    return {
        "params": {"wte": noise(5, 3), "layers": [{"c_q": odd(3, 2, 4)}, {"c_q": half(3, 2, 4)}], "gain": odd()},
        "opt": Moments({"wte": half(5, 3), "count": jnp.int32(-4)}, (noise(2), [odd(7), jnp.zeros((0, 3), jnp.int8)])),
        "step": jnp.int32(step),
    }


POSITION = {
    "epoch": 3,
    "shards": {"a": [1, None, 2.5], "b": "naïve"},
    "tokens": np.arange(200, 300, dtype=np.int32),
    "weights": np.array([0.1, -0.0], np.float64),
    "none left": np.zeros((0, 2), np.int32),
    "turned": np.arange(6, dtype=np.uint8).reshape(2, 3).T,
}
NOTES = {"best_step": 4, "best_val_bpb": 0.1 + 0.2, "remember": {"wandb": "3f9a"}, "made_from": {"jax": "0"}}


def shapes_of(state):
    return jax.eval_shape(lambda: state)


def assert_same_arrays(found, expected):
    """The same names, and each array of the same type, shape and bytes."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert type(found[name]) is np.ndarray, name
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_every_bit_comes_back(tmp_path, monkeypatch):
    """Parameters, optimizer state, step, position, notes, metrics and config, odd values included; no pickle."""

    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    state, config = strange_state(), Config(rate=0.25)
    expected = {name: np.array(array) for name, array in flatten(state).items()}
    path = tmp_path / "step_00000007"
    write_checkpoint(path, pack_state(state, POSITION, NOTES, config, '{"step": 7}\n'))
    assert path == newest_checkpoint(tmp_path)
    back, position, notes = unpack_state(path, shapes_of(state))
    assert jax.tree.structure(back) == jax.tree.structure(state) and isinstance(back["opt"], Moments)
    assert_same_arrays(flatten(back), expected)
    assert back["step"].dtype == np.int32 and back["step"] == 7 and notes == NOTES
    is_array = lambda pair: isinstance(pair[1], np.ndarray)
    assert_same_arrays(dict(filter(is_array, position.items())), dict(filter(is_array, POSITION.items())))
    plain = {name: value for name, value in POSITION.items() if not isinstance(value, np.ndarray)}
    assert {name: position[name] for name in plain} == plain and position.keys() == POSITION.keys()
    assert (path / "metrics.jsonl").read_text() == '{"step": 7}\n'
    assert json.loads((path / "config.json").read_text()) == {"width": 3, "rate": 0.25}
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".jsonl"}


@pytest.mark.parametrize("opt", [{}, jnp.ones(3), [jnp.zeros(2), {}], None])
def test_an_optimizer_may_keep_what_it_likes(tmp_path, opt):
    """Nothing at all, one array, a list: its state is one pytree in one file."""
    state = {"params": {"w": jnp.ones(2)}, "opt": opt, "step": jnp.int32(1)}
    write_checkpoint(tmp_path / "step_00000001", pack_state(state, {}, {}, Config()))
    path = newest_checkpoint(tmp_path)
    back, position, notes = unpack_state(path, shapes_of(state))
    assert jax.tree.structure(back) == jax.tree.structure(state) and (position, notes) == ({}, {})
    assert_same_arrays(flatten(back), flatten(state))
    listed = ["config.json", "manifest.json", "metrics.jsonl", "opt.safetensors", "params.safetensors", "state.json"]
    assert names(path) == [*listed, "stream.safetensors"]


def test_arrays_in_another_memory_order_are_not_scrambled(tmp_path):
    """A file has memory as it is: an array that a device hands over in Fortran's order came back shuffled."""
    state = strange_state()
    turned = {**jax.tree.map(lambda array: np.asarray(array).copy(order="F"), state), "step": state["step"]}
    write_checkpoint(tmp_path / "step_00000007", pack_state(turned, POSITION, {}, Config()))
    for key in ("params", "opt"):
        assert_same_arrays(load_file(tmp_path / "step_00000007" / f"{key}.safetensors"), flatten(state[key]))


def test_names_that_collide_are_refused():
    """Two arrays under one name would be one array in the file."""
    with pytest.raises(ValueError, match="same name"):
        flatten({"a.b": np.ones(1), "a": {"b": np.ones(1)}})


def test_what_is_written_are_the_numbers_of_the_save(tmp_path, monkeypatch):
    """The state is donated to the next steps while the thread still writes: on a CPU NumPy would see that."""
    proceed, real = threading.Event(), write_checkpoint
    monkeypatch.setattr(writer_room, "write_checkpoint", lambda *args: proceed.wait(60) and real(*args))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    start = {"params": {"w": jnp.zeros(4096)}, "opt": {"m": jnp.zeros((64, 64))}, "step": jnp.int32(0)}
    state = step(start)
    expected = {name: np.array(array, copy=True) for name, array in flatten(state).items()}
    writer = CheckpointWriter(tmp_path)
    writer.save(1, pack_state(state, {}, {}, Config()))
    leaf = state["params"]["w"]
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    proceed.set()
    writer.wait()
    assert leaf.is_deleted(), "the state should have been donated"
    assert_same_arrays(flatten(unpack_state(tmp_path / "step_00000001", shapes_of(start))[0]), expected)


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint that does not fit

ADAMW = {
    "params": {"layers": [{"c_k": jnp.ones((2, 3))}, {"c_k": jnp.zeros((2, 3))}]},
    "opt": {key: {"layers": [{"c_k": jnp.full((2, 3), i)} for i in range(2)]} for key in ("mu", "nu")},
    "step": jnp.int32(9),
}


def write_as_before(path):
    """A checkpoint as it was written before the optimizer's state became one pytree."""
    moments = {f"{key}.safetensors": flatten(ADAMW["opt"][key]) for key in ("mu", "nu")}
    state = {"step": 9, "stream": {"epoch": 1, "shard": 2, "row_group": 3, "document": 4}, "best_step": None}
    packed = {
        "params.safetensors": flatten(ADAMW["params"]),
        **moments,
        "stream.safetensors": {"tokens": np.arange(5, dtype=np.int32)},
        "state.json": json.dumps(state).encode(),
        "config.json": json.dumps({"width": 3, "rate": 0.5}).encode(),
        "metrics.jsonl": b'{"step": 9}\n',
    }
    write_checkpoint(path, packed)


def test_an_old_checkpoint_is_read(tmp_path):
    """Two files for AdamW's moments instead of one for the optimizer's state: every array is found."""
    write_as_before(tmp_path / "step_00000009")
    path = newest_checkpoint(tmp_path)
    state, position, notes = unpack_state(path, shapes_of(ADAMW))
    assert_same_arrays(flatten(state), flatten(ADAMW))
    assert jax.tree.structure(state) == jax.tree.structure(ADAMW) and notes == {"best_step": None}
    assert position.pop("tokens").tolist() == [0, 1, 2, 3, 4]
    assert position == {"epoch": 1, "shard": 2, "row_group": 3, "document": 4}


@pytest.mark.parametrize("opt", [{}, {"mu": jnp.ones(2)}, {"mu": {}, "nu": {}, "count": jnp.int32(0)}, (jnp.ones(2),)])
def test_an_old_checkpoint_is_refused_by_another_optimizer(tmp_path, opt):
    """One line that says what it holds and what to do."""
    write_as_before(tmp_path / "step_00000009")
    with pytest.raises(UserError, match="holds AdamW's moments, .* give the run a new name") as raised:
        unpack_state(tmp_path / "step_00000009", shapes_of({**ADAMW, "opt": opt}))
    assert is_one_line(raised.value)


def layers(*shapes):
    return {"layers": [{"c_k": jnp.ones(shape)} for shape in shapes]}


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(params=layers((2, 3), (2, 4))), r"layers\.1\.c_k \(2, 3\)'?: the model has \(2, 4\)"),
        (dict(params=layers((2, 3), (2, 3), (2, 3))), r"layers\.2\.c_k'?: this array is missing: .* another model"),
        (dict(params=layers((2, 3))), r"layers\.1\.c_k'?: the model has no such array: .* another model"),
        (dict(opt={**ADAMW["opt"], "x": jnp.ones(1)}), "'x': this array is missing: .* another optimizer"),
        (dict(opt={"mu": ADAMW["opt"]["mu"]}), r"nu\.layers\.0\.c_k'?: the optimizer has no such array"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, changes, said):
    """The array, and both shapes or which of the two lacks it."""
    path = tmp_path / "step_00000009"
    write_checkpoint(path, pack_state(ADAMW, {}, {}, Config()))
    with pytest.raises(UserError, match=said) as raised:
        unpack_state(path, shapes_of({**ADAMW, **changes}))
    assert is_one_line(raised.value)


@pytest.mark.parametrize(
    "name, raw",
    [
        ("params.safetensors", b"not safetensors"),
        ("opt.safetensors", None),
        ("stream.safetensors", None),
        ("state.json", b"{"),
        ("state.json", b'{"stream": {}}'),
        ("state.json", b'{"step": "9", "stream": {}}'),
        ("state.json", b'{"step": 99999999999, "stream": {}}'),
        ("state.json", b'{"step": 9, "stream": [1]}'),
    ],
)
def test_a_crafted_file_is_refused_in_one_line(tmp_path, name, raw):
    """What no run of ours would have written is refused with the file's name."""
    path = tmp_path / "step_00000009"
    write_checkpoint(path, pack_state(ADAMW, {}, {}, Config()))
    (path / name).unlink()
    if raw is not None:
        (path / name).write_bytes(raw)
    with pytest.raises(UserError) as raised:
        unpack_state(path, shapes_of(ADAMW))
    assert is_one_line(raised.value) and str(path / name) in str(raised.value)


def test_flatten_and_unflatten_are_inverse():
    """Names are paths with dots; the arrays are those of the dict, the structure is the template's."""
    state = strange_state()
    arrays = flatten(state["params"])
    assert set(arrays) == {"wte", "layers.0.c_q", "layers.1.c_q", "gain"}
    assert set(flatten(state["opt"])) == {"fast.wte", "fast.count", "slow.0", "slow.1.0", "slow.1.1"}
    back = unflatten(shapes_of(state["params"]), arrays)
    assert back["layers"][1]["c_q"] is arrays["layers.1.c_q"] and set(arrays) == set(flatten(back))


# ----------------------------------------------------------------------------------------------------------------------
# Complete or not there


class Stopped(BaseException):
    """The machine stops here."""


class Points:
    """Counts the moments at which a write can be cut off, and stops at the n-th."""

    def __init__(self, patch, stop_at=0):
        self.stop_at, self.passed = stop_at, []
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (checkpoints, "write_hashed"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
            (checkpoints, "fsync_path"),
            (files, "fsync_path"),
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
                content = args[1] if isinstance(args[1], str) else b"".join(args[1])
                (args[0].write_text if name == "write_text" else args[0].write_bytes)(content[: len(content) // 2])
                done = None  # a file cut in the middle
            else:
                done = real(*args, **kwargs)
            self.passing("after", name, args)
            return done

        return call


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
        renamed = any(name == "replace" and when == "after" for when, name, _ in passed)
        assert value_of(newest_checkpoint(folder)) == (6 if renamed else 5), f"point {n}: {passed[-1]}"
        if not renamed:
            write_checkpoint(folder / "step_00000006", some_files(6))
            assert value_of(newest_checkpoint(folder)) == 6
        clear_leftovers(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        if ended:
            break
    assert n > 40 and "damaged" not in capsys.readouterr().out
    assert names(folder) == ["step_00000004", "step_00000006"]


def test_everything_is_on_disk_before_what_says_so(tmp_path, monkeypatch):
    """Each file is synced before the manifest is written, that and the folder before the rename, the parent after."""
    points = Points(monkeypatch)
    write_checkpoint(tmp_path / "step_00000001", some_files(1))
    path_in = lambda args: next(Path(arg).name for arg in args if isinstance(arg, str | Path))
    done = [(name, path_in(args)) for when, name, args in points.passed if when == "after" and name != "fsync"]
    order = {event: i for i, event in enumerate(done)}
    manifest, renamed = order["write_text", "manifest.json"], order["replace", ".step_00000001.part"]
    assert all(order["write_hashed", name] < manifest for name in some_files(1))
    assert manifest < order["fsync_path", "manifest.json"] < renamed
    assert order["fsync_path", ".step_00000001.part"] < renamed < order["fsync_path", tmp_path.name]
    synced = sum(name == "fsync" for _, name, _ in points.passed)
    each = sum(name in ("fsync_path", "write_hashed") for _, name, _ in points.passed)
    assert synced == each, "one of them does not sync"


def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """The half-written folder is gone, since its space is what the next attempt needs; the old one is whole."""
    write_checkpoint(tmp_path / "step_00000001", some_files(1))

    def fill(path, chunks):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(checkpoints, "write_hashed", fill)
    with pytest.raises(UserError, match="step_00000002: the disk is full") as raised:
        write_checkpoint(tmp_path / "step_00000002", some_files(2))
    assert is_one_line(raised.value) and names(tmp_path) == ["step_00000001"]
    assert value_of(newest_checkpoint(tmp_path)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def change_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def without(*left_out):
    """A manifest that is right in all but what it leaves out."""
    return lambda path: change_manifest(path, lambda manifest: [manifest.pop(name) for name in left_out])


def craft(name, raw):
    """A file of other content, with a manifest that agrees."""

    def change(path):
        (path / name).write_bytes(raw)
        entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        change_manifest(path, lambda manifest: manifest.update({name: entry}))

    return change


def one_moment_only(path):
    (path / "opt.safetensors").unlink()
    without("opt.safetensors")(path)
    craft("mu.safetensors", b"12345678")(path)


ELSEWHERE = {"../a": {"bytes": 3, "sha256": "0"}}
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
    "deep manifest": lambda path: (path / "manifest.json").write_text("[" * 200_000),
    "deep objects": lambda path: (path / "manifest.json").write_text('{"a":' * 200_000),
    "more in manifest": lambda path: change_manifest(path, lambda m: m.update(a={"bytes": 3, "sha256": "0"})),
    "a name elsewhere": lambda path: change_manifest(path, lambda m: m.update(ELSEWHERE)),
    "a name of two lines": lambda path: change_manifest(path, lambda m: m.update({"a\nb": ELSEWHERE["../a"]})),
    "no params": without("params.safetensors"),
    "no optimizer": without("opt.safetensors"),
    "one moment of two": one_moment_only,
    "no state": without("state.json"),
    "no metrics": without("metrics.jsonl"),
    "no config": without("config.json"),
    "torn metrics": craft("metrics.jsonl", b'{"step": 1}\n{"st'),
    "torn state": craft("state.json", b'{"step": 3'),
    "deep state": craft("state.json", b"[" * 200_000),
    "a row without a step": craft("metrics.jsonl", b'{"step": 1}\n{"loss": 2.5}\n'),
    "a step of thousands of bits": craft("metrics.jsonl", b'{"step": 1%s}\n' % (b"0" * 2000)),
    "a loss of letters": craft("metrics.jsonl", b'{"step": 1, "loss": "2.5"}\n'),
    "a best score of letters": craft("state.json", b'{"step": 3, "stream": {}, "best_score": "low"}'),
    "config a list": craft("config.json", b"[]"),
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
}


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
    write_checkpoint(tmp_path / "step_00000003", some_files(3))  # written again, and damaged again
    DAMAGES[kind](tmp_path / "step_00000003")
    newest_checkpoint(tmp_path)
    assert content(tmp_path / "damaged_step_00000003_0") == damaged[3]
    assert (tmp_path / "damaged_step_00000003_1").exists()


def test_a_large_file_is_read_once_for_each_time_it_was_written(tmp_path, monkeypatch):
    """A start looks at the newest checkpoint several times; one that was changed in between is hashed again."""
    monkeypatch.setattr(checkpoints, "LARGE", 20)
    hashed, real = [], hash_file
    monkeypatch.setattr(checkpoints, "hash_file", lambda path: hashed.append(path.name) or real(path))
    path = tmp_path / "step_00000003"
    write_checkpoint(path, some_files(3))
    for _ in range(3):
        assert find_damage(path) is None
    assert hashed.count("params.safetensors") == 1 and hashed.count("config.json") == 3
    flip(path / "params.safetensors")
    os.utime(path / "params.safetensors", ns=(1, 1))
    assert "another SHA-256" in find_damage(path)


def test_a_disk_that_cannot_be_read_is_damage(tmp_path, monkeypatch, capsys):
    """An I/O error in one checkpoint does not keep a run from the one before."""
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step_{step:08d}", some_files(step))
    real = hash_file

    def fail(path):
        if "step_00000002" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoints, "hash_file", fail)
    assert newest_checkpoint(tmp_path).name == "step_00000001"
    assert "Input/output error" in capsys.readouterr().out


def test_the_newest_checkpoint_is_the_furthest_and_never_half_a_one(tmp_path):
    """By step number and not by date; what was left half-written is not looked at."""
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 2, 10**8):
        write_checkpoint(tmp_path / f"step_{step:08d}", some_files(3))
    (tmp_path / ".step_100000001.part").mkdir()
    assert newest_checkpoint(tmp_path).name == "step_100000000"
    shutil.rmtree(tmp_path / "step_100000000")
    assert newest_checkpoint(tmp_path).name == "step_00000010"


# ----------------------------------------------------------------------------------------------------------------------
# Only our own files are deleted or renamed

OTHERS = ["step_00000003_best_ever", "step_zzz", "step_3", "step_000000009", "nonfinite_00000099"]
HIDDEN = [".mine.part", ".step_00000003_best.part", ".step_3.part", ".step_00000003.upload.mine"]


def put_others(folder):
    """Files of a person next to a run's checkpoints: copies, notes, links; returns what must stay as it is."""
    for name in (*OTHERS, *HIDDEN):
        write_checkpoint(folder / name, some_files(3))
    (folder / "step_notes.txt").write_text("the third was best")
    (folder / "step_00000007").write_text("a file by that name")
    (folder / ".step_00000008.part").write_text("a file by that name")
    elsewhere = folder.parent / "elsewhere"
    write_checkpoint(elsewhere, some_files(4))
    (folder / "step_00000004").symlink_to(elsewhere)
    (folder / ".step_00000004.part").symlink_to(elsewhere)
    return {path.name: path.is_symlink() or content(path) for path in folder.iterdir()} | {"": content(elsewhere)}


def assert_others_stay(folder, before):
    after = {path.name: path.is_symlink() or content(path) for path in folder.iterdir() if path.name in before}
    assert after | {"": content(folder.parent / "elsewhere")} == before


@pytest.mark.parametrize("keep", [1, 2])
def test_a_persons_files_are_neither_deleted_nor_renamed_nor_counted(tmp_path, capsys, keep):
    """A copy, a note and a link stay, and `keep` counts the real checkpoints only: with one, the newest stays, too."""
    folder = tmp_path / "checkpoints"
    before = put_others(folder)
    writer = CheckpointWriter(folder, keep=keep)
    for step in (1, 2, 3):
        writer.save(step, some_files(step))
        writer.wait()
        clear_leftovers(folder)
    assert_others_stay(folder, before)
    assert {step for step in (1, 2, 3) if (folder / f"step_{step:08d}").exists()} == {3, 4 - keep}
    assert newest_checkpoint(folder) == folder / "step_00000004", "a link can be resumed from"
    flip(folder / "step_00000003" / "params.safetensors")
    (folder / "step_00000004").unlink()
    newest_checkpoint(folder)
    assert (folder / "damaged_step_00000003_0").is_dir()
    before.pop("step_00000004")
    assert_others_stay(folder, before)


def save_and_wait(writer, step):
    writer.save(step, some_files(step))
    writer.wait()


def test_a_damaged_link_is_skipped_and_stays(tmp_path, capsys):
    """What it points to is a person's; the run resumes from its own."""
    folder = tmp_path / "checkpoints"
    write_checkpoint(folder / "step_00000003", some_files(3))
    write_checkpoint(tmp_path / "elsewhere", some_files(4))
    (folder / "step_00000004").symlink_to(tmp_path / "elsewhere")
    flip(tmp_path / "elsewhere" / "params.safetensors")
    assert value_of(newest_checkpoint(folder)) == 3 and names(folder) == ["step_00000003", "step_00000004"]
    said = capsys.readouterr().out
    assert "step_00000004 is damaged: params.safetensors" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="step_00000004: .* in the way") as raised:
        save_and_wait(CheckpointWriter(folder), 4)
    assert is_one_line(raised.value) and (folder / "step_00000004").is_symlink()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """Half-written, half-uploaded, half-downloaded: folders of ours; a link or another name is not ours."""
    folder = tmp_path / "checkpoints"
    before = put_others(folder)
    for name in (
        ".step_00000005.part",
        ".nonfinite_00000006.part",
        ".step_00000005.upload",
        ".step_100000000.download",
    ):
        write_checkpoint(folder / name, some_files(5))
    clear_leftovers(folder)
    assert set(names(folder)) == set(before) - {""}
    assert_others_stay(folder, before)
    clear_leftovers(tmp_path / "nowhere")


def test_the_last_ones_and_the_best_stay(tmp_path):
    """`keep` newest and the best; what was set aside or written apart is neither counted nor removed nor resumed."""
    for name in ("nonfinite_00000099", "damaged_step_00000098_0"):
        write_checkpoint(tmp_path / name, some_files(9))
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in range(1, 7):
        writer.save(step, some_files(step), best=2 if step > 2 else None)
        writer.wait()
    assert names(tmp_path) == ["damaged_step_00000098_0", "nonfinite_00000099", *(f"step_{i:08d}" for i in (2, 5, 6))]
    assert value_of(newest_checkpoint(tmp_path)) == 6
    for step in (2, 5, 6):
        shutil.rmtree(tmp_path / f"step_{step:08d}")
    assert newest_checkpoint(tmp_path) is None


# ----------------------------------------------------------------------------------------------------------------------
# The thread


def test_a_writers_error_is_raised_once_by_the_next_call(tmp_path, monkeypatch):
    """By save, check or wait, whichever comes first; then the writer works again."""
    real = write_checkpoint

    def fail(path, files, take):
        raise RuntimeError(path.name)

    for call in (CheckpointWriter.wait, lambda writer: save_and_wait(writer, 2), wait_until_raised):
        monkeypatch.setattr(writer_room, "write_checkpoint", fail)
        writer = CheckpointWriter(tmp_path)
        writer.save(1, some_files(1))
        with pytest.raises(RuntimeError, match="step_00000001"):
            call(writer)
        writer.check()
        monkeypatch.setattr(writer_room, "write_checkpoint", real)
        writer.save(3, some_files(3))
        writer.wait()
        assert value_of(newest_checkpoint(tmp_path)) == 3
        shutil.rmtree(tmp_path / "step_00000003")


def wait_until_raised(writer):
    """Calls check() until the thread has failed."""
    for _ in range(6000):
        writer.check()
        threading.Event().wait(0.01)


def test_a_step_is_written_once_and_reported_when_it_is_in_place(tmp_path):
    """after(path) is called in the thread, with a checkpoint that is complete; a second save of a step is none."""
    done = []
    writer = CheckpointWriter(tmp_path, after=lambda path: done.append((path, find_damage(path))))
    for value in (1, 2):
        writer.save(1, some_files(value))
        writer.wait()
    assert done == [(tmp_path / "step_00000001", None)] and value_of(tmp_path / "step_00000001") == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


# ----------------------------------------------------------------------------------------------------------------------
# A run that is resumed

ORIGIN = {"commit": "abc", "data": {"name": "offline", "shards": 3}}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of Config() and ORIGIN."""
    path = tmp_path / "step_00000009"
    write_checkpoint(path, pack_state(ADAMW, {}, {"made_from": ORIGIN}, Config()))
    return path


def test_a_change_of_a_fixed_field_is_refused(checkpoint):
    """The field, both values and the remedy in one line."""
    with pytest.raises(UserError, match=r"^width=4: .* was trained with 3; .* another name") as raised:
        compare_with_checkpoint(checkpoint, Config(width=4), ORIGIN)
    assert is_one_line(raised.value)


def test_a_field_younger_than_a_checkpoint_was_its_default(checkpoint, capsys):
    """A run continues in a new version that has one more fixed field, and not with another value of that."""
    before = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in before.items() if k != "width"}))
    compare_with_checkpoint(checkpoint, Config(), ORIGIN)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="^width=4: .* was trained with 3; "):
        compare_with_checkpoint(checkpoint, Config(width=4), ORIGIN)


def test_a_safe_change_is_reported(checkpoint, capsys):
    """Both values, in a line each, of any other field and of what the run was started from; nothing else."""
    compare_with_checkpoint(checkpoint, Config(), ORIGIN)
    assert capsys.readouterr().out == ""
    compare_with_checkpoint(checkpoint, Config(rate=0.25), {**ORIGIN, "commit": "def", "new": 1})
    assert capsys.readouterr().out.splitlines() == [
        "changed: rate is 0.25, was 0.5 up to here",
        "changed: commit is def, was abc up to here",
        "changed: new is 1, was None up to here",
    ]


@pytest.mark.parametrize("raw", [b"{}", b'{"made_from": [1]}', b"{"])
def test_a_checkpoint_without_an_origin_is_compared_all_the_same(checkpoint, capsys, raw):
    """What cannot be read is one line, what is not there is a change."""
    (checkpoint / "state.json").write_bytes(raw)
    refused = pytest.raises(UserError, match="state.json: is not JSON") if raw == b"{" else contextlib.nullcontext()
    with refused:
        compare_with_checkpoint(checkpoint, Config(), {"commit": "abc"})
        assert capsys.readouterr().out == "changed: commit is abc, was None up to here\n"


def test_half_written_files_of_a_killed_process_are_swept(tmp_path):
    """What atomic_write left when its process was killed goes at the next start; a person's folders stay."""
    program = (
        "import os, sys; from onechip.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as draft:\n    draft.write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "loss.png")], check=False)
    theirs = tmp_path / ".mine.12345678.part"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("kept")
    assert len(list(tmp_path.iterdir())) == 2
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [theirs] and (theirs / "notes.txt").exists()
