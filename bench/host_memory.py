"""Host memory and the pause of a checkpoint: figures for LOG.md.

    uv run bench/host_memory.py run      2,000 small steps with prefetch, evaluations, checkpoints, samples: is it flat?
    uv run bench/host_memory.py state    one checkpoint of the default model's state, at its real size; `state laptop`
                                         of the laptop's; `state 05_speedrun 24` of 05's at depth 24
    uv run bench/host_memory.py parts    the same of 05's at depth 28 by four hosts, a process each, and read again on
                                         another mesh; `parts 24 2` at depth 24 by two

On a CPU the device's memory is the host's too; `state` takes it off. 05's state is 14 GB: each of its arrays is made
when the checkpoint fetches it, in the device's place; `parts` drops each box that it has read, in the same place.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import jax
import numpy as np

from onechip.checkpoints import pack_state
from onechip.doors import config_with
from onechip.machine import home
from onechip.parts import OwnParts, open_arrays, part_name
from onechip.runfolder import OPT, PARAMS, checkpoint_name
from onechip.together import Hosts, OwnFiles, meeting
from onechip.weights import bytes_of
from onechip.writer import CheckpointWriter, pause_seconds

train = importlib.import_module("02_train")
tok = train.tok
GB = 1e9


def resident():
    """This process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def watch_run(steps=2000):
    """Trains a small model and prints resident memory every 200 steps."""
    small = {"n_head": 2, "head_dim": 32, "aspect_ratio": 32, "seq_len": 64, "vocab_size": 1024, "loss_slice": 8192}
    often = {"num_iterations": steps, "eval_every": 50, "sample_every": 100, "save_every": 25, "eval_tokens": 8192}
    config = train.Config(**train.PRESETS["laptop"] | small | often)
    corpus = tok.get_corpus("offline", 0)
    tokenizer = tok.get_tokenizer(corpus, config.vocab_size)

    def on_log(row):
        if "loss" in row and row["step"] % 200 == 0:
            print(json.dumps({"step": row["step"], "resident_mb": round(resident() / 1e6)}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        task = train.pretraining(config, corpus, tokenizer)
        sample = train.make_sample_writer(config, tokenizer, ["import "])
        train.train(config, task, folder, sample=sample, on_log=on_log)


class Made:
    """An array of a shape and a type that is made when NumPy asks for it: random bits, the same ones each time."""

    BLOCK = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)

    def __init__(self, like):
        self.shape, self.dtype, self.nbytes = like.shape, like.dtype, bytes_of(like)

    def __array__(self, dtype=None, copy=None):
        raw = np.empty(self.nbytes, np.uint8)
        for start in range(0, self.nbytes, len(self.BLOCK)):
            raw[start : start + len(self.BLOCK)] = self.BLOCK[: self.nbytes - start]
        return raw.view(self.dtype).reshape(self.shape)


def real_state(preset):
    """(config, state) of a preset of 02's default model, on the device."""
    config, mesh = train.Config(**train.PRESETS[preset]), train.make_mesh()
    state = train.init_state(config, mesh)
    return config, jax.block_until_ready(jax.tree.map(lambda a: a + 1, state))  # zeros would share one page


def made_state(notebook, depth):
    """(config, state) of 05's model and optimizer at a depth, of arrays that do not exist yet."""
    speedrun = importlib.import_module(notebook)
    config = config_with(speedrun.Config, speedrun.MuonSettings)(depth=int(depth))
    shapes = train.state_shapes(config, train.make_mesh(), speedrun.NANOCHAT, speedrun.MUON)
    return config, {**jax.tree.map(Made, shapes), "step": 0}


def watch_state(what="chip", *depth):
    """Writes one checkpoint of a state, and prints the pause, the writing time and the peak on the host."""
    config, state = made_state(what, *depth) if what[:2].isdigit() else real_state(what)
    stream = {"epoch": 0, "shard": 0, "row_group": 0, "document": 0, "tokens": np.ones(100_000, np.int32)}
    before, peak, done = resident(), [0], threading.Event()

    def look():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    threading.Thread(target=look, daemon=True).start()
    with tempfile.TemporaryDirectory(dir=home()) as folder:
        writer, began = CheckpointWriter(Path(folder) / "checkpoints"), time.perf_counter()
        writer.save(0, pack_state(state, stream, {}, config))
        pause = time.perf_counter() - began
        writer.wait()
        total = time.perf_counter() - began
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    done.set()
    figures = {"checkpoint_gb": size / GB, "pause_s": pause, "write_s": total, "added_peak_gb": (peak[0] - before) / GB}
    figures |= {"peak_gb": peak[0] / GB, "disk_mb_s": size / total / 1e6, "pause_at_250_mb_s": pause_seconds(size)}
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


# ----------------------------------------------------------------------------------------------------------------------
# Several hosts


def cut_box(shape, index, count, axes):
    """The index-th of `count` equal boxes, slices, along the first of some axes that divides; None if none does."""
    for axis in axes:
        if shape[axis] and shape[axis] % count == 0:
            size = shape[axis] // count
            return tuple(
                slice(index * size, (index + 1) * size) if a == axis else slice(0, n) for a, n in enumerate(shape)
            )
    return None


def own_files(packed, index, count):
    """The OwnFiles of one of several hosts: of each array a box along its first axis that divides."""
    own = {} if index else {name: content for name, content in packed.items() if name not in (PARAMS, OPT)}
    for name in (PARAMS, OPT):
        mine, shapes = {}, {}
        for key, array in packed[name].items():
            box = cut_box(array.shape, index, count, range(len(array.shape)))
            if box is not None:
                like = jax.ShapeDtypeStruct([part.stop - part.start for part in box], array.dtype)
                mine[f"{key}@{','.join(str(part.start) for part in box)}"], shapes[key] = Made(like), array.shape
            elif index == 0:
                mine[key] = array
        own[part_name(name, index, count)] = OwnParts(mine, shapes)
    return OwnFiles(own, hosts_by_files(index, count))


def hosts_by_files(index, count):
    """The Hosts of a process that meets the others by files in the working directory."""

    def write(key, text):
        draft = Path(f"{index}.draft")
        draft.write_text(text)
        draft.rename(key.replace("/", "-"))

    def read(key):
        while not (path := Path(key.replace("/", "-"))).exists():
            time.sleep(0.01)
        return path.read_text()

    return Hosts(index, count, meeting(index, count, write, read))


def with_peak(action):
    """(seconds, GB that the peak of resident memory rose) while action() ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident(), time.perf_counter()
    action()
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return round(time.perf_counter() - began, 1), round((peak - before) / GB, 2)


def be_host(index, count, depth):
    """Writes one host's share of a checkpoint and reads another one; prints times, sizes and peaks."""
    config, state = made_state("05_speedrun", depth)
    own = own_files(pack_state(state, {}, {}, config), int(index), int(count))
    arrays = [array for content in own.values() if isinstance(content, dict) for array in content.values()]
    writer = CheckpointWriter(Path("checkpoints"))
    write_s, write_gb = with_peak(lambda: (writer.save(0, own), writer.wait()))
    largest = [0]

    def read():
        for name in (PARAMS, OPT):
            for array in open_arrays(Path("checkpoints") / checkpoint_name(0) / name).values():
                axes = reversed(range(len(array.shape)))  # another mesh
                box = array[cut_box(array.shape, int(index), int(count), axes) or ...]
                largest[0] = max(largest[0], box.nbytes)

    read_s, read_gb = with_peak(read)
    share, most = sum(a.nbytes for a in arrays) / GB, max(a.nbytes for a in arrays) / GB
    figures = {"host": int(index), "share_gb": round(share, 2), "largest_part_gb": round(most, 3), "write_s": write_s}
    figures |= {"write_added_peak_gb": write_gb, "largest_read_gb": round(largest[0] / GB, 3), "read_s": read_s}
    print(json.dumps(figures | {"read_added_peak_gb": read_gb, "resident_gb": round(resident() / GB, 2)}))


def watch_hosts(depth="28", count="4"):
    """Writes and reads a checkpoint by several processes; prints a line of each, and the size of all."""
    with tempfile.TemporaryDirectory(dir=home()) as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "host"]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        children = [subprocess.Popen([*command, str(i), count, depth], cwd=folder, env=env) for i in range(int(count))]
        assert [child.wait() for child in children] == [0] * int(count)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        print(json.dumps({"checkpoint_gb": round(size / GB, 2)}))


if __name__ == "__main__":
    home().mkdir(parents=True, exist_ok=True)
    mode, *arguments = sys.argv[1:] or ["run"]
    {"run": watch_run, "state": watch_state, "parts": watch_hosts, "host": be_host}[mode](*arguments)
