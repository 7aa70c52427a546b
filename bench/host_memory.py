"""Host memory and the pause of a checkpoint: figures for LOG.md.

    uv run bench/host_memory.py run      2,000 small steps with prefetch, evaluations, checkpoints, samples: is it flat?
    uv run bench/host_memory.py state    one checkpoint of the default model's state, at its real size; `state laptop`
                                         of the laptop's; `state 05_speedrun 24` of 05's at depth 24

On a CPU the device's memory is the host's too; `state` takes it off. 05's state is 14 GB: each of its arrays is made
when the checkpoint fetches it, in the device's place.
"""

import importlib
import json
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


if __name__ == "__main__":
    home().mkdir(parents=True, exist_ok=True)
    mode, *arguments = sys.argv[1:] or ["run"]
    {"run": watch_run, "state": watch_state}[mode](*arguments)
