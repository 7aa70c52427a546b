"""Kills workers of a sweep again and again, starts others, and compares each trial with the same one left alone.

    uv run tools/sweep_kill_test.py --kills 10 --workers 2

Runs 03_worker.py, tiny and offline, in several processes that share a folder, and `kill -9`s one of them at random
moments: while it starts, while it trains, while it saves. Exit code 0 if all trials come to an end, no row is there
twice, and each trial's scores are bit for bit those of its settings trained in one go. Any flag of 03 may follow.
"""

import argparse
import importlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import onechip  # noqa: F401  (before jax)
from onechip.files import read_json

worker = importlib.import_module("03_worker")
TINY = (
    "--preset laptop --data offline --where local --any_version true --n_head 2 --n_kv_head 1 --head_dim 16 "
    "--aspect_ratio 16 --seq_len 64 --vocab_size 512 --device_batch_size 2 --total_batch_size 8 --eval_tokens 1024 "
    "--loss_slice 512 --num_iterations 2000 --save_minutes 0.01 --evaluations 8 --lease 3"
)


def start_worker(out, flags, number):
    """A worker's process; what it says goes to a log."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, str(ROOT / "03_worker.py"), *TINY.split(), "--out", str(out), "--name", "s", *flags]
    with open(out / f"worker-{number}.log", "w") as log:
        where = {"stdout": log, "stderr": subprocess.STDOUT, "env": os.environ | cache | {"HF_TOKEN": ""}}
        return subprocess.Popen(command, **where)


def kill_workers(out, flags, kills, count, draw):
    """Kills so many workers at random moments, each replaced by another, and waits for the end of the sweep.

    Returns how many it has killed: fewer where the sweep is over before.
    """
    workers = {i: start_worker(out, flags, i) for i in range(count)}
    began, number = time.monotonic(), count
    while not list(out.glob("s/trial-*/metrics.jsonl")):
        time.sleep(0.05)
    ready = time.monotonic() - began
    for done in range(1, kills + 1):
        time.sleep(draw.uniform(0, ready))
        victim = draw.choice(sorted(workers))
        workers[victim].kill()
        if workers.pop(victim).wait() == 0:
            kills = done - 1
            break
        running = [path.name for path in sorted(out.glob("s/*.lease-*"))]
        print(f"kill {done}: worker {victim} after {time.monotonic() - began:.0f} s; leases {running}", flush=True)
        workers[number] = start_worker(out, flags, number)
        number += 1
    for i, process in workers.items():
        if process.wait():
            sys.exit(f"worker {i} failed without a kill:\n{(out / f'worker-{i}.log').read_text()}")
    return kills


def find_sweep_differences(out):
    """(number of trials, what is wrong with them)."""
    sweep, wrong = read_json(out / "s" / "sweep.json"), []
    corpus = worker.tok.get_corpus("offline", worker.constants(sweep)["num_shards"])
    trials = worker.LocalSweep(out / "s", sweep).trials()
    for trial in trials:
        job = worker.Job(trial["name"], trial["parameters"], out / "alone" / trial["name"], worker.Request())
        worker.run_trial(job, corpus)
        alone = worker.read_evaluations(job.run_dir)
        if trial["state"] not in ("finished", "stopped"):
            wrong.append(f"{trial['name']} is {trial['state']}: {trial['reason']}")
        elif trial["state"] == "finished" and len(trial["rows"]) != len(alone):
            wrong.append(f"{trial['name']} has {len(trial['rows'])} of {len(alone)} scores")
        elif trial["rows"] != alone[: len(trial["rows"])]:
            wrong.append(f"{trial['name']} has other scores than alone")
    return len(trials), wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how many, at the most (default: 10)")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    asked, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="onechip-sweep-") as folder:
        kills = kill_workers(Path(folder), flags, asked.kills, asked.workers, random.Random(asked.seed))
        count, wrong = find_sweep_differences(Path(folder))
    same = "each trial's scores are bit for bit those of its settings left alone"
    print(f"{kills} kills in {count} trials: {'WRONG: ' + '; '.join(wrong) if wrong else same}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
