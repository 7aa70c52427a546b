"""onechip/statefile.py: safetensors as the library reads them, through a buffer that never holds more than it may."""

import json
import re
import subprocess
import sys
import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from safetensors import numpy as library

from onechip import statefile
from onechip.errors import UserError
from onechip.statefile import Abandoned, HostBuffer, fetch, in_chunks, load_arrays, stored_arrays

ARRAYS = {
    "layers.1.c_q": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "naïve": np.arange(6).astype(ml_dtypes.bfloat16).reshape(3, 2),
    "gain": np.array(0.5, np.float32),
    "none": np.zeros((0, 3), np.int8),
    "ids": np.arange(5, dtype=np.int32),
    "odd": np.arange(3, dtype=np.uint8),
    "mask": np.array([True, False]),
    "double": np.array([1 / 3, -0.0]),
}


def content_of(arrays):
    """{name: (type, shape, bytes)}."""
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    """Every type, bfloat16 included, scalars, empty arrays; the bytes are the library's own, and always the same."""
    raw = b"".join(in_chunks(ARRAYS))
    assert b"".join(in_chunks(dict(reversed(ARRAYS.items())))) == raw
    on_device = {name: jnp.asarray(ARRAYS[name]) for name in ("ids", "gain")}
    assert b"".join(in_chunks(on_device)) == library.save({name: ARRAYS[name] for name in on_device})
    path = tmp_path / "ours.safetensors"
    path.write_bytes(raw)
    assert content_of(library.load_file(path)) == content_of(load_arrays(path)) == content_of(ARRAYS)
    library.save_file(ARRAYS, path, metadata={"format": "np"})
    assert content_of(load_arrays(path)) == content_of(ARRAYS)
    path.write_bytes(b"".join(in_chunks({})))
    assert load_arrays(path) == {} == library.load_file(path)


def crafted(header, data=b"12345678"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"short",
        (1 << 60).to_bytes(8, "little") + b"{}",
        crafted(b"[" * 100_000),
        crafted(b"\xff\xfe"),
        crafted([1]),
        crafted({"a": 3}),
        crafted({"a": {**ENTRY, "dtype": "F31"}}),
        crafted({"a": {**ENTRY, "dtype": ["F32"]}}),
        crafted({"a": {**ENTRY, "shape": [3]}}),
        crafted({"a": {**ENTRY, "shape": [-2]}}),
        crafted({"a": {**ENTRY, "shape": ["2"]}}),
        crafted({"a": {**ENTRY, "data_offsets": [8, 16]}}),
        crafted({"a": {**ENTRY, "data_offsets": [-8, 0]}}),
        crafted({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}),
        crafted({"a": {"dtype": "F32"}}),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, raw):
    """With its name; no crafted size is believed."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: cannot be read as safetensors") as raised:
        stored_arrays(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_file_that_shrinks_is_refused(tmp_path):
    """Between its header and its arrays it was cut: no array of whatever was in memory."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(crafted({"a": ENTRY}))
    [array] = stored_arrays(path).values()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends too early"):
        array.read()


# ----------------------------------------------------------------------------------------------------------------------
# The buffer


class Counted:
    """An array of 100 bytes that notes when it is made."""

    dtype, shape, nbytes = np.dtype(np.uint8), (100,), 100

    def __init__(self, alive):
        self.alive = alive

    def __array__(self, dtype=None, copy=None):
        self.alive.append(len(self.alive))
        return np.zeros(100, np.uint8)


def test_the_buffer_never_holds_more_than_its_limit():
    """Ten arrays of 100 bytes, 350 allowed: three wait until one is taken; one larger than the limit passes alone."""
    for limit, ahead in ((350, 3), (50, 1)):
        made = []
        buffer, arrays = HostBuffer(limit), [Counted(made) for _ in range(10)]
        filler = threading.Thread(target=buffer.fill, args=(arrays,))
        filler.start()
        for i, array in enumerate(arrays):
            filler.join(0.05)
            assert len(made) == min(10, i - (i > 0) + ahead), "the one that is being written counts"
            buffer.take(array)
        filler.join()


def test_either_side_is_let_go():
    """A writer that failed frees the training that waits for room; an interrupted training frees the writer."""
    buffer = HostBuffer(100)
    threading.Timer(0.1, buffer.end).start()
    buffer.fill([Counted([]) for _ in range(5)])  # would wait for ever
    buffer = HostBuffer(100)
    threading.Timer(0.1, buffer.end).start()
    with pytest.raises(Abandoned):
        buffer.take(Counted([]))


def test_nothing_stays_with_an_array_that_was_fetched():
    """NumPy's own way keeps a copy on the host as long as the array lives: a whole state would pile up."""
    array = jnp.ones(8, jnp.int4)  # a CPU shares the memory of other types
    assert np.asarray(fetch(array)).tolist() == [1] * 8 and array._npy_value is None
    np.asarray(array)
    assert array._npy_value is not None, "this test sees nothing any more"


def test_what_is_fetched_is_a_copy():
    """On a CPU NumPy would see the memory that the next step is given."""
    array = jnp.arange(6.0)
    assert not np.shares_memory(fetch(array), np.asarray(array))


PROBE = """
import re, sys, threading, pathlib
import onechip
import jax, jax.numpy as jnp, numpy as np
from onechip import statefile
from onechip.checkpoints import pack_state, unpack_state
from onechip.writer import CheckpointWriter
import dataclasses
Config = dataclasses.make_dataclass("Config", [])
statefile.BUFFER = 64 << 20
folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
COUNT, SIZE = 40, 4 << 20  # 40 arrays of 16 MiB: 640 MiB
state = {"params": {}, "opt": [jnp.full(SIZE, i, jnp.float32) for i in range(COUNT)], "step": jnp.int32(1)}
like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
status = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def restart_peak():
    open("/proc/self/clear_refs", "w").write("5")
jax.block_until_ready(state)
if mode == "read":
    del state
restart_peak()
before = status("VmRSS")
if mode == "write":
    writer = CheckpointWriter(folder / "checkpoints")
    writer.save(1, pack_state(state, {}, {}, Config()))
    writer.wait()
    print(status("VmHWM") - before)
else:
    first = lambda array, like: float(array[...].flat[0])
    state = unpack_state(folder / "checkpoints" / "step_00000001", like, first)[0]
    assert state["opt"] == list(range(COUNT))
    print(status("VmHWM") - before)
"""


def test_the_host_holds_a_part_of_the_state_and_no_more(tmp_path):
    """A state of 640 MiB through a buffer of 64: the process's own peak rises by less than 128 MiB, and so on reading.

    In a process of its own, by the kernel's high-water mark; what is read goes to no device: here that is the host.
    """
    for mode in ("write", "read"):
        command = [sys.executable, "-c", PROBE, str(tmp_path), mode]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) < 128, f"{mode}: {done.stdout} MiB"
    assert statefile.BUFFER == 2 << 30, "with 1 to 3 GB of a training process: less than 6 GB"
