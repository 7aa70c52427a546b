"""onechip/parts.py: each process writes the parts that it holds, and any mesh, or none, reads every bit of them."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, SUPPORT
from corpus import newest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from parted import cut, entries, split_checkpoint, write_parts
from safetensors.numpy import load_file

from onechip import checkpoints, statefile
from onechip.checkpoints import clear_leftovers, find_damage, flatten, newest_checkpoint, pack_state, unpack_state
from onechip.errors import UserError
from onechip.export import export_weights
from onechip.parts import OwnParts, array_files, holds_weights, load_onto, open_arrays, part_name, share
from onechip.statefile import fetch, in_chunks, stored_arrays
from onechip.together import ALONE, Hosts, meeting
from onechip.writer import CheckpointWriter

MESHES = {"data=2,fsdp=4": (2, 4), "fsdp=8": (1, 8), "data=8": (8, 1)}
LAYOUTS = (1, 2, 4)  # processes, which have eight devices together
POSITION = {"epoch": 3, "tokens": np.arange(20, 31, dtype=np.int32)}
BITS = np.random.default_rng(5)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a checkpoint keeps of its settings: nothing."""


def draw(dtype, *shape):
    """Random bits as an array, NaNs of all kinds included."""
    return BITS.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype).reshape(shape)


# Cut by rows, by columns, in the middle, by both axes of the mesh, along two axes of the array, and not at all.
ARRAYS = {
    "params": {
        "wte": draw(np.float32, 40, 3),
        "layers": [
            {"c_q": draw(np.float32, 3, 16, 5), "c_fc": draw(np.float32, 7, 24)},
            {"c_q": draw(ml_dtypes.bfloat16, 48, 2), "gain": draw(np.float32, 9)},
        ],
        "none": draw(np.int8, 0, 8),
    },
    "opt": {"mu": [draw(np.float32, 6, 32), draw(np.int8, 8)], "count": draw(np.int32)},
    "step": np.int32(7),
}
SPECS = {
    "params": {
        "wte": P("fsdp"),
        "layers": [
            {"c_q": P(None, "fsdp"), "c_fc": P(None, "fsdp")},
            {"c_q": P(("data", "fsdp")), "gain": P()},
        ],
        "none": P(None, "fsdp"),
    },
    "opt": {"mu": [P(None, ("fsdp", "data")), P("fsdp")], "count": P()},
    "step": P(),
}


def bytes_in(tree):
    """{name: (type, shape, bytes)} of a pytree of NumPy arrays."""
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in flatten(tree).items()}


def is_one_line(said):
    return "\n" not in str(said) and 0 < len(str(said)) < 400


# ----------------------------------------------------------------------------------------------------------------------
# In the processes that share a mesh


def shapes_on(mesh, specs=SPECS):
    """The state's pytree of jax.ShapeDtypeStruct with shardings."""
    sharded = lambda a, spec: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(sharded, ARRAYS, specs)


def make_mesh(name):
    kind = AxisType.Explicit if name == "fsdp=8" else AxisType.Auto
    return jax.make_mesh(MESHES[name], ("data", "fsdp"), axis_types=(kind,) * 2, devices=jax.devices())


def join(index, count, port):
    """The Hosts of this process, which meet by jax's own store of keys."""
    if count == 1:
        return ALONE
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, initialization_timeout=60)
    from jax._src.distributed import global_state

    client, limit = global_state.client, int(os.environ.get("MEET_SECONDS", "60")) * 1000
    read = lambda key: client.blocking_key_value_get(key, limit)
    return Hosts(index, count, meeting(index, count, client.key_value_set, read))


def save(hosts, mesh, folder, step=7, specs=SPECS):
    """Saves the state on a mesh as a run does, and gives its memory away before the files are complete."""
    state = {**jax.tree.map(load_onto, ARRAYS, shapes_on(mesh, specs)), "step": jnp.int32(step)}
    writer = CheckpointWriter(folder, disk=None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    packed = pack_state(state, POSITION, {"best_step": 4}, Config(), '{"step": 7}\n')
    writer.save(step, share(packed, hosts))
    arrays = jax.tree.leaves(state["params"])
    jax.block_until_ready(jax.jit(lambda tree: [leaf * 0 for leaf in tree], donate_argnums=0)(arrays))
    writer.wait()
    assert not writer.failed


def differing(state, mesh):
    """Names of the arrays of which a device here has other bits than it should."""
    wrong, wanted = [], flatten(ARRAYS)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, array), like in zip(leaves, jax.tree.leaves(shapes_on(mesh)), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        same = array.sharding == like.sharding and array.dtype == like.dtype
        for shard in array.addressable_shards:
            same = same and fetch(shard.data).tobytes() == np.asarray(wanted[name][shard.index]).tobytes()
        wrong += [] if same else [name]
    return wrong


def run_child(what, folder, index, count, port):
    """One process of several: "save" from each mesh, or "load" into each mesh what all have saved."""
    hosts, folder = join(int(index), int(count), port), Path(folder)
    assert jax.device_count() == 8 and jax.process_count() == hosts.count
    report = {}
    for name in MESHES:
        mesh = make_mesh(name)
        if what == "save":
            save(hosts, mesh, folder / f"{count} {name}" / "checkpoints")
            if name == "data=8":
                copies = jax.tree.map(lambda _: P(), ARRAYS)
                save(hosts, mesh, folder / f"{count} copies" / "checkpoints", specs=copies)
        else:
            for saved in sorted(folder.glob("*/checkpoints/step_00000007")):
                state, position, _ = unpack_state(saved, shapes_on(mesh), load_onto)
                assert position["tokens"].tolist() == POSITION["tokens"].tolist()
                report[f"{saved.parts[-3]} to {name}"] = differing(state, mesh)
    print(json.dumps(report))


def run_victim(folder, index, count, port):
    """Host 0 or 1, as KILLED says, is killed in the middle of the second checkpoint that it writes."""
    hosts, folder, real = join(int(index), int(count), port), Path(folder), checkpoints.write_hashed
    save(hosts, make_mesh("fsdp=8"), folder / "checkpoints", step=7)

    def kill(path, chunks):
        if path.name.startswith("opt") and os.environ["KILLED"] == index:
            path.write_bytes(next(iter(chunks)))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, chunks)

    checkpoints.write_hashed = kill
    try:
        save(hosts, make_mesh("fsdp=8"), folder / "checkpoints", step=8)
    except Exception as error:
        print(error, flush=True)
        os._exit(3)  # an exit in order would wait for the one that is gone


def start(function, *arguments, count, **more):
    """Starts `count` processes of eight devices together that call a function of this file with (..., index, count)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(ROOT), str(SUPPORT), str(ROOT / "tests"), str(ROOT / "tests" / "onechip")]
    code = f"import sys; sys.path[:0] = {paths}; import onechip; import test_parts as t; t.{function}(*sys.argv[1:])"
    device_count = f"--xla_force_host_platform_device_count={8 // count}"
    env = os.environ | {"XLA_FLAGS": device_count, "JAX_PLATFORMS": "cpu"} | more
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": env}
    return [subprocess.Popen([*command, str(i), str(count), str(port)], **pipes) for i in range(count)]


def run(function, *arguments, count, **more):
    """What each process prints as its last line, JSON."""
    processes = start(function, *arguments, count=count, **more)
    done = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, code in done] == [0] * count, "\n".join(said[1][-1500:] for said, _ in done)
    return [json.loads(said[0].splitlines()[-1]) for said, _ in done]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{"2 fsdp=8": its checkpoint, ...}: saved from each mesh by one, two and four processes."""
    folder = tmp_path_factory.mktemp("saved")
    for count in LAYOUTS:
        run("run_child", "save", folder, count=count)
    return {path.parts[-3]: path for path in sorted(folder.glob("*/checkpoints/*"))}


@pytest.mark.slow
def test_each_mesh_reads_what_each_has_written(saved):
    """Every bit, from each of three meshes and from copies, saved by 1, 2 and 4 processes, into each by as many."""
    assert len(saved) == 12
    for count in LAYOUTS:
        for report in run("run_child", "load", saved["1 fsdp=8"].parents[2], count=count):
            assert len(report) == 36
            assert {name: wrong for name, wrong in report.items() if wrong} == {}


@pytest.mark.slow
def test_one_process_reads_them_without_a_mesh(saved):
    """Whole arrays, of every bit, and a checkpoint that is complete; notes and position are there once."""
    wanted = bytes_in(ARRAYS)
    for path in saved.values():
        assert find_damage(path) is None and newest_checkpoint(path.parent) == path
        state, position, notes = unpack_state(path, jax.eval_shape(lambda: ARRAYS))
        assert bytes_in(state) == wanted
        assert position.pop("tokens").tolist() == list(range(20, 31)) and position == {"epoch": 3}
        assert notes == {"best_step": 4} and [file for file in path.parent.iterdir() if file != path] == []


@pytest.mark.slow
def test_the_files_are_those_of_one_process_where_nothing_is_cut(saved, tmp_path):
    """One process, or a mesh of which each device has a copy: to the last byte what an unsharded state's are."""
    checkpoint = lambda path: {file.name: file.read_bytes() for file in path.iterdir()}
    writer = CheckpointWriter(tmp_path / "checkpoints")
    writer.save(7, pack_state(ARRAYS, POSITION, {"best_step": 4}, Config(), '{"step": 7}\n'))
    writer.wait()
    plain = checkpoint(tmp_path / "checkpoints" / "step_00000007")
    for name in ("1 data=2,fsdp=4", "1 fsdp=8", "1 data=8", "1 copies", "2 copies", "4 copies"):
        assert checkpoint(saved[name]) == plain, name
    for name in ("2 data=8", "4 data=8"):  # c_q and mu are cut over both axes
        assert {file for file in checkpoint(saved[name]) if "-of-" not in file} == set(plain) - PARTED, name


PARTED = {"params.safetensors", "opt.safetensors"}


@pytest.mark.slow
def test_each_box_is_written_once(saved):
    """As an entry that another library reads, by the process of the first copy; what is whole, by the first process."""
    path = saved["4 fsdp=8"]
    found = {i: set(load_file(path / part_name("params.safetensors", i, 4))) for i in range(4)}
    assert found[0] == {
        "layers.1.gain", "wte@0,0", "wte@5,0", "layers.0.c_q@0,0,0", "layers.0.c_q@0,2,0", "layers.0.c_fc@0,0",
        "layers.0.c_fc@0,3", "layers.1.c_q@0,0", "layers.1.c_q@6,0", "none@0,0", "none@0,1",
    }  # fmt: skip
    assert found[3] >= {"wte@30,0", "wte@35,0", "layers.0.c_q@0,12,0", "layers.1.c_q@42,0"} and len(found[3]) == 10
    names = {file.name for file in path.iterdir()}
    assert {part_name("opt.safetensors", i, 4) for i in range(4)} | {"stream.safetensors", "manifest.json"} <= names
    assert not [name for name in names if name.startswith("part-manifest")]
    copies = saved["2 data=2,fsdp=4"]  # the second process has a second copy of what only fsdp cuts
    second = set(load_file(copies / part_name("params.safetensors", 1, 2)))
    assert second == {f"layers.1.c_q@{row},0" for row in (24, 30, 36, 42)}


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0", "1"])
def test_a_process_killed_in_the_middle_leaves_the_older_checkpoint(tmp_path, killed):
    """Of two real processes one is killed as it writes: the other one ends, and the checkpoint before is the newest."""
    processes = start("run_victim", tmp_path, count=2, KILLED=killed, MEET_SECONDS="5")
    for process in processes:
        try:
            process.communicate(timeout=90)
        finally:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes[int(killed)] == -signal.SIGKILL and codes[1 - int(killed)] not in (0, None)
    folder = tmp_path / "checkpoints"
    if killed == "0":  # it was the one that clears up
        assert (folder / ".step_00000008.part").is_dir()
        clear_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["step_00000007"]
    path = newest_checkpoint(folder)
    assert bytes_in(unpack_state(path, jax.eval_shape(lambda: ARRAYS))[0]) == bytes_in(ARRAYS)


class Read:
    """A NumPy array that notes which of its boxes are read."""

    def __init__(self, array):
        self.array, self.boxes = array, []

    def __getitem__(self, index):
        self.boxes.append(str(index))
        return self.array[index]


def run_reads(*_):
    """Prints how many boxes are read for arrays of which each of eight devices needs a copy, a quarter, an eighth."""
    report = []
    for spec in (P(), P(None, "fsdp"), P("data", "fsdp")):
        read = Read(np.arange(48.0, dtype=np.float32).reshape(6, 8))
        sharding = NamedSharding(make_mesh("data=2,fsdp=4"), spec)
        array = load_onto(read, jax.ShapeDtypeStruct(read.array.shape, np.float32, sharding=sharding))
        assert np.array_equal(np.asarray(array), read.array) and array.sharding == sharding
        report.append([len(read.boxes), len(set(read.boxes))])
    print(json.dumps(report))


@pytest.mark.slow
def test_each_box_is_read_once():
    """Also where several devices of a host have a copy of it."""
    assert run("run_reads", count=1) == [[[1, 1], [4, 4], [8, 8]]]


def run_probe(folder, *_):
    """Saves and loads a state of 320 MiB on eight devices; prints the rise of the peak, in MiB, beyond the arrays."""
    statefile.BUFFER = 32 << 20
    mesh = make_mesh("fsdp=8")
    specs = [P("fsdp"), P(None, "fsdp")] * 10
    shapes = [
        jax.ShapeDtypeStruct((1 << 12, 1 << 10), np.float32, sharding=NamedSharding(mesh, spec)) for spec in specs
    ]
    fill = lambda like, i: jax.jit(lambda: jnp.full(like.shape, i, like.dtype), out_shardings=like.sharding)()
    like = {"params": {}, "opt": shapes, "step": jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P()))}
    state = {"params": {}, "opt": [fill(like, i) for i, like in enumerate(shapes)], "step": jnp.int32(1)}
    jax.block_until_ready(state)
    status = lambda name: int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    writer, report = CheckpointWriter(Path(folder)), {}
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    writer.save(1, pack_state(state, {}, {}, Config()))
    writer.wait()
    report["write"] = status("VmHWM") - before
    state = None
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    state = unpack_state(Path(folder) / "step_00000001", like, load_onto)[0]
    report["read"] = status("VmHWM") - before
    report["right"] = all(bool(fetch(array)[-1, -1] == i) for i, array in enumerate(state["opt"]))
    print(json.dumps(report))


@pytest.mark.slow
def test_a_sharded_state_passes_through_the_host_one_array_at_a_time(tmp_path):
    """Of 320 MiB in arrays of 16 on eight devices, which here are the host's memory, no second copy is ever there."""
    # The C library gives back what is freed: of boxes of 2 MiB it would keep a fifth, in pieces.
    [report] = run("run_probe", tmp_path, count=1, MALLOC_MMAP_THRESHOLD_="1000000")
    assert report["right"] and report["write"] < 32 + 2 * 16 + 32, report
    assert report["read"] < 320 + 16 + 48, report


# ----------------------------------------------------------------------------------------------------------------------
# Parts that are read


WHOLE = np.arange(4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
GAIN = np.arange(3, dtype=np.float32)


def test_any_box_is_read(tmp_path):
    """Boxes of all kinds, empty ones included, of arrays that lie whole, in rows, in columns and in uneven blocks."""
    blocks = {
        (0, 0, 0): WHOLE[:3],
        (3, 0, 0): WHOLE[3:, :4],
        (3, 4, 0): WHOLE[3:, 4:, :2],
        (3, 4, 2): WHOLE[3:, 4:, 2:],
    }
    draw = np.random.default_rng(0)
    for i, boxes in enumerate((cut(WHOLE, 0, 2), cut(WHOLE, 1, 3), cut(WHOLE, 2, 5), blocks)):
        names = list(entries("a", boxes).items())
        path = write_parts(
            tmp_path / str(i) / "x.safetensors", dict(names[::2]), dict(names[1::2]), shapes={"a": WHOLE.shape}
        )
        [(name, found)] = open_arrays(path).items()
        assert (
            name == "a" and found.shape == WHOLE.shape and found.dtype == WHOLE.dtype and found.nbytes == WHOLE.nbytes
        )
        check_boxes(found, draw)
    path = tmp_path / "whole.safetensors"
    path.write_bytes(b"".join(in_chunks({"a": WHOLE})))
    for piece in (20, 60, 1 << 24):  # bytes: less than a row, two rows, all
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(statefile, "PIECE", piece)
            check_boxes(stored_arrays(path)["a"], draw)


def check_boxes(found, draw):
    assert found[...].tobytes() == found.read().tobytes() == WHOLE.tobytes()
    assert np.array_equal(found[1:3], WHOLE[1:3]) and np.array_equal(found[:, 2:5], WHOLE[:, 2:5])
    for _ in range(40):
        bounds = [sorted(draw.integers(0, size + 1, 2)) for size in WHOLE.shape]
        box = tuple(slice(int(a), int(b)) for a, b in bounds)
        assert found[box].shape == WHOLE[box].shape and np.array_equal(found[box], WHOLE[box])
    with pytest.raises(ValueError, match="no steps"):
        found[::2]


SECOND = "a@2,0,0"  # what the second process has
PLACE = r"params-00002-of-00002\.safetensors='"


def rename(entry):
    return lambda first, second: second.update({entry: second.pop(SECOND)})


OUTSIDE = r"a part of shape \(2, 6, 5\) at \(3, 0, 0\) lies outside of \(4, 6, 5\)"
BROKEN = {
    "a part is missing": (lambda _, b: b.pop(SECOND), r"params-\*-of-00002.*='a': parts of it are missing: 60 of 120"),
    "no part is there": (lambda a, b: (a.pop("a@0,0,0"), b.pop(SECOND)), "='a': parts of it are missing: 0 of 120"),
    "two overlap": (rename("a@1,0,0"), f"{PLACE}a': two of its parts overlap, the other one is in params-00001-"),
    "one is outside": (rename("a@3,0,0"), f"{PLACE}a': {OUTSIDE}"),
    "fewer axes": (rename("a@2,0"), f"{PLACE}a': a part .* lies outside"),
    "no start": (rename("a@2,x,0"), f"{PLACE}a@2,x,0': its name has no start"),
    "another type": (
        lambda _, b: b.update({SECOND: np.int32(b[SECOND])}),
        f"{PLACE}a': its parts have different types",
    ),
    "whole twice": (lambda _, b: b.update(gain=GAIN), f"{PLACE}gain': this array is in another file"),
    "whole and cut": (lambda _, b: b.update(a=WHOLE), "safetensors='a': this array is there both whole and in parts"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_parts_that_do_not_fit_are_refused_in_one_line(tmp_path, what):
    """With the array's name and the file's."""
    change, said = BROKEN[what]
    first, second = ({name: box} for name, box in entries("a", cut(WHOLE, 0, 2)).items())
    change(first, second)
    path = write_parts(tmp_path / "params.safetensors", {"gain": GAIN, **first}, second, shapes={"a": WHOLE.shape})
    with pytest.raises(UserError, match=said) as raised:
        open_arrays(path)
    assert is_one_line(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    "shapes", ["{", "[]", '{"a": 3}', '{"a": [-1, 2]}', '{"a": [1.5]}', '{"a": "xy"}', "[" * 100_000]
)
def test_a_crafted_header_is_refused_in_one_line(tmp_path, shapes):
    """Shapes that are none, with the file's name."""
    path = write_parts(tmp_path / "params.safetensors", {"a@0": GAIN}, {"b": GAIN}, shapes={"a": [3]})
    arrays = OwnParts({"a@0": GAIN}, {})
    arrays.about = {"shapes": shapes}
    (tmp_path / part_name(path.name, 0, 2)).write_bytes(b"".join(in_chunks(arrays)))
    with pytest.raises(UserError, match="00001-of-00002.safetensors: its header has no shapes") as raised:
        open_arrays(path)
    assert is_one_line(raised.value)


def test_files_that_are_missing_or_of_two_saves_are_refused_in_one_line(tmp_path):
    """With the name of the file that is missing; nothing is guessed from what is there."""
    path = tmp_path / "params.safetensors"
    assert array_files(path) == []
    with pytest.raises(UserError, match="cannot be read"):
        open_arrays(path)
    write_parts(path, {"a": GAIN}, {"b": GAIN}, {"c": GAIN}, shapes={})
    assert set(open_arrays(path)) == {"a", "b", "c"}
    (tmp_path / part_name(path.name, 1, 3)).unlink()
    with pytest.raises(UserError, match="params-00002-of-00003.safetensors'?: this file is missing") as raised:
        open_arrays(path)
    assert is_one_line(raised.value)
    write_parts(path, {"a": GAIN}, {"b": GAIN}, shapes={})
    with pytest.raises(UserError, match="files of 2 and 3 hosts") as raised:
        open_arrays(path)
    assert is_one_line(raised.value)
    path.write_bytes(b"".join(in_chunks({"a": GAIN})))
    assert set(open_arrays(path)) == {"a"}, "a file of one process is what its name says"


# ----------------------------------------------------------------------------------------------------------------------
# Who else reads a checkpoint


def test_damage_to_a_part_is_found(tmp_path):
    """A part that is missing, changed or not in the manifest is reported by the file's name; the older one counts."""
    writer = CheckpointWriter(tmp_path)
    for step in (6, 7):
        writer.save(step, pack_state({**ARRAYS, "step": np.int32(step)}, POSITION, {}, Config(), '{"step": 6}\n'))
    writer.wait()
    part = "opt-00002-of-00002.safetensors"
    path = split_checkpoint(tmp_path / "step_00000007", 2)
    assert find_damage(path) is None
    manifest = json.loads((path / "manifest.json").read_text())
    lost = {name: entry for name, entry in manifest.items() if name != part}
    (path / "manifest.json").write_text(json.dumps(lost))
    assert find_damage(path) == f"manifest.json does not name {part}"
    (path / "manifest.json").write_text(json.dumps(manifest))
    raw = (path / part).read_bytes()
    (path / part).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert find_damage(path) == f"{part} has another SHA-256 than when it was written"
    (path / part).unlink()
    assert find_damage(path) == f"{part} is missing"
    assert newest_checkpoint(tmp_path).name == "step_00000006"


@pytest.mark.slow
def test_a_run_of_several_processes_opens_and_is_exported_whole(straight, tmp_path):
    """open_model reads the parts, of a run and of a checkpoint; the export is the file that one process writes."""
    result, train = straight[0], importlib.import_module("02_train")
    shutil.copytree(result.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    path = newest(tmp_path / "run")
    plain = (path / "params.safetensors").read_bytes()
    split_checkpoint(path, 4)
    assert find_damage(path) is None and sum(map(holds_weights, os.listdir(path))) == 4
    for source in (tmp_path / "run", path):
        assert bytes_in(train.open_model(source).params) == bytes_in(result.params)
    folder = export_weights(result._replace(run_dir=tmp_path / "run"))
    assert (folder / "params.safetensors").read_bytes() == plain
    assert not any("-of-" in name for name in os.listdir(folder))
    (path / "params-00003-of-00004.safetensors").unlink()
    shutil.copytree(path, tmp_path / "apart")
    with pytest.raises(UserError, match="params-00003-of-00004.safetensors.* is missing") as raised:
        train.open_model(tmp_path / "apart")
    assert is_one_line(raised.value)
