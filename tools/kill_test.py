"""Kills a training run again and again, resumes it each time, and compares its end with that of a run left alone.

    uv run tools/kill_test.py --kills 20

Runs 02_train.py, tiny and offline, once undisturbed, then with `kill -9` at random moments: a quarter of them while it
starts, the rest while it trains, evaluates and writes. Exit code 0 if metrics.jsonl (but for times) and parameters and
moments at the end are bit for bit the same. Any flag of 02_train.py may follow.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "02_train.py"
TINY = (
    "--preset laptop --data offline --n_head 2 --head_dim 16 --aspect_ratio 16 --vocab_size 512 --seq_len 64 "
    "--device_batch_size 2 --total_batch_size 4 --num_iterations 400 --eval_every 40 --eval_tokens 4096 "
    "--sample_every 200 --save_every 7"
).split()
TIMES = ("time", "tokens_per_second", "mfu")
ARRAYS = ("params.safetensors", "mu.safetensors", "nu.safetensors")


class Process:
    """One start of the run: its process, and what it writes to a log."""

    def __init__(self, out, name, flags):
        self.run, self.log = out / name, out / f"{name}.log"
        cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = {k: v for k, v in (os.environ | cache).items() if k != "HF_TOKEN"}  # nothing goes up
        command = [sys.executable, str(TRAIN), *TINY, *flags, "--out", str(out), "--name", name]
        self.before, self.began = self.version(), time.monotonic()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def version(self):
        """Changes when a process has read its checkpoint and is about to train."""
        path = self.run / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def wait(self, seconds=1e9, until=lambda: False):
        """Waits that long, or until the condition holds or the process ends; returns its age in seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None and not until():
            time.sleep(0.003)
        return time.monotonic() - self.began

    def wait_for_training(self):
        return self.wait(until=lambda: self.version() != self.before)

    def describe(self):
        resumed = re.search(r"goes on behind step ([\d,]+)", self.log.read_text())
        writing = any((self.run / "checkpoints").glob(".step_*.part"))
        first = f"resumed behind step {resumed[1]}" if resumed else "nothing resumed"
        last = (read_rows(self.run) or [{"step": 0}])[-1]["step"]
        return f"{first}, rows up to step {last}{', in the middle of a checkpoint' if writing else ''}"


def read_rows(run):
    """The rows of metrics.jsonl without their times; the last line may be cut."""
    path = run / "metrics.jsonl"
    rows = map(json.loads, path.read_text().split("\n")[:-1] if path.exists() else [])
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def run_to_the_end(out, name, flags):
    process = Process(out, name, flags)
    seconds = process.wait_for_training(), process.wait()
    if process.process.returncode:
        sys.exit(f"failed without a kill:\n{process.log.read_text()}")
    return seconds


def kill_and_resume(out, flags, kills, seed):
    start, whole = run_to_the_end(out, "reference", flags)
    print(f"reference: {whole:.1f} s, of which {start:.1f} s to start", flush=True)
    draw, done = random.Random(seed), 0
    while done < kills:
        process = Process(out, "killed", flags)
        if draw.random() < 0.25:
            process.wait(draw.uniform(0, start))
        else:
            process.wait_for_training()
            process.wait(draw.uniform(0, 2 * (whole - start) / kills))
        seconds = time.monotonic() - process.began
        process.process.kill()
        if process.process.wait() < 0:  # else it had ended by itself
            done += 1
            print(f"kill {done}: after {seconds:.2f} s, {process.describe()}", flush=True)
    run_to_the_end(out, "killed", flags)


def find_differences(out):
    """What is not the same in the two runs, in words."""
    a, b = read_rows(out / "reference"), read_rows(out / "killed")
    differ = [f"row {i}: {x} and {y}" for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y][:1]
    differ += [] if len(a) == len(b) else [f"{len(a)} and {len(b)} rows"]
    ends = [sorted((out / name / "checkpoints").glob("step_*"))[-1] for name in ("reference", "killed")]
    differ += [name for name in ARRAYS if len({(end / name).read_bytes() for end in ends}) > 1]
    return differ + [path.name for path in (out / "killed" / "checkpoints").glob("damaged_*")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    asked, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="onechip-kill-") as folder:
        kill_and_resume(Path(folder), flags, asked.kills, asked.seed)
        differ = find_differences(Path(folder))
    same = "the metrics (but for times), parameters and moments are bit for bit those of the run left alone"
    print(f"{asked.kills} kills: " + (f"DIFFERENT: {'; '.join(differ)}" if differ else same))
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
