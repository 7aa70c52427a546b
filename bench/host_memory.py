"""Host memory and the pause of a checkpoint: figures for LOG.md.

    uv run bench/host_memory.py run      2,000 small steps with prefetch, evaluations, checkpoints, samples: is it flat?
    uv run bench/host_memory.py state    one checkpoint of the default model's state, at its real size; `state laptop`
                                         of the laptop's

On a CPU the device's memory is the host's too; `state` takes it off.
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

from onechip.checkpoints import CheckpointWriter, pack_state
from onechip.machine import home

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


def watch_state(preset="chip"):
    """Writes one checkpoint of a preset's model, and prints the pause, the writing time and the peak on the host."""
    config, mesh = train.Config(**train.PRESETS[preset]), train.make_mesh()
    state = train.init_state(config, mesh)
    state = jax.block_until_ready(jax.tree.map(lambda a: a + 1, state))  # moments of zeros would share one page
    stream = {"epoch": 0, "shard": 0, "row_group": 0, "document": 0, "tokens": np.ones(100_000, np.int32)}
    before, peak, done = resident(), [0], threading.Event()

    def look():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    threading.Thread(target=look, daemon=True).start()
    with tempfile.TemporaryDirectory(dir=home()) as folder:
        writer, began = CheckpointWriter(folder), time.perf_counter()
        writer.save(0, pack_state(state, stream, {}, config))
        pause = time.perf_counter() - began
        writer.wait()
        total = time.perf_counter() - began
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
    done.set()
    figures = {"checkpoint_gb": size / GB, "pause_s": pause, "write_s": total, "added_peak_gb": (peak[0] - before) / GB}
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    home().mkdir(parents=True, exist_ok=True)
    mode, *arguments = sys.argv[1:] or ["run"]
    {"run": watch_run, "state": watch_state}[mode](*arguments)
