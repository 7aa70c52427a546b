"""Kills a training run again and again, resumes it each time, and compares its end with that of a run left alone.

    uv run tools/kill_test.py --kills 20
    uv run tools/kill_test.py --notebook 05_speedrun     04_maxtext as well
    uv run tools/kill_test.py --hosts 2                  one of two processes, which train together, is killed

Runs 02_train.py or another notebook that trains, tiny and offline, once undisturbed, then with `kill -9` at random
moments: while it starts, before its first step, and twice as often while it trains, writes and evaluates. Exit code 0
if metrics.jsonl (without its times), parameters and the optimizer's state at the end are bit for bit the same. Of
several hosts the others have to end by themselves within a minute, and to say which one is gone.
Any flag of the notebook may follow.
"""

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from onechip.parts import open_arrays
from onechip.runfolder import OPT, PARAMS, RunFolder, find_checkpoints
from onechip.statefile import in_chunks

SIZES = {
    "02_train": "--n_head 2 --aspect_ratio 16",
    "04_maxtext": "--n_head 2 --n_kv_head 1 --n_embd 48 --n_layer 2 --mlp_dim 80 --tile 16",
    "05_speedrun": "--depth 2",
}
TINY = (
    "--preset laptop --data offline --head_dim 16 --vocab_size 512 --seq_len 64 --device_batch_size 2 "
    "--total_batch_size 4 --num_iterations 400 --eval_every 40 --eval_tokens 4096 --sample_every 200 --save_every 3"
)


SOON = 60.0  # seconds in which the hosts that are left end


def host_flags(count):
    """The words for each of so many hosts; the same port at every start."""
    if count == 1:
        return [[]]
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = ["--coordinator", f"127.0.0.1:{server.getsockname()[1]}", "--hosts", str(count)]
    return [[*place, "--host", str(i), "--host_minutes", "0.5"] for i in range(count)]


class Start:
    """One start of the run: a process for each host, and what each writes to a log."""

    def __init__(self, out, name, flags, hosts):
        self.run, self.logs = RunFolder(out / name), [out / f"{name}.{i}.log" for i in range(len(hosts))]
        self.began, self.first = time.monotonic(), None
        self.before = self.look()[0]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, *flags, "--out", str(out), "--name", name]
        environment = os.environ | cache | {"HF_TOKEN": ""}  # nothing goes up
        self.processes = []
        for path, own in zip(self.logs, hosts, strict=True):
            with open(path, "w") as log:
                where = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
                self.processes.append(subprocess.Popen([*command, *own], **where))

    def look(self):
        """(which file metrics.jsonl is, how many steps it has)."""
        path = self.run.metrics
        return (path.stat().st_ino, path.read_text().count('"loss"')) if path.exists() else (None, 0)

    def has_resumed(self):
        """Whether it has read its checkpoint, and written the rows of that again."""
        file, steps = self.look()
        if self.first is None and file != self.before:
            self.first = steps
        return self.first is not None

    def has_trained(self):
        return self.has_resumed() and self.look()[1] > self.first

    def wait(self, seconds=1e9, until=lambda: False):
        """Waits that long, or until the condition holds or the process ends; returns its age in seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(p.poll() is None for p in self.processes) and not until():
            time.sleep(0.005)
        return time.monotonic() - self.began

    def kill(self, host):
        """Kills a host; False if all had ended by themselves. If one failed without it, nothing here makes sense."""
        self.processes[host].kill()
        began = time.monotonic()
        codes = [process.wait() for process in self.processes]
        late = time.monotonic() - began > SOON
        for i, (code, log) in enumerate(zip(codes, self.logs, strict=True)):
            said = log.read_text()
            follows = codes[host] < 0 and re.search(rf"error: host {host} (has ended|did not come)", said) and not late
            if code > 0 and not follows:
                sys.exit(f"host {i} failed{' late' * late} without a kill of its own:\n{said}")
        return codes[host] < 0

    def end(self):
        """Waits for the end of all, each without an error."""
        for process, log in zip(self.processes, self.logs, strict=True):
            if process.wait():
                sys.exit(f"failed without a kill:\n{log.read_text()}")

    def describe(self):
        resumed = re.search(r"continues after step [\d,]+", self.logs[0].read_text())
        writing = resumed and any(self.run.checkpoints.glob(".step_*.part"))
        last = max((row["step"] for row in read_rows(self.run)), default=0)
        how = resumed[0] if resumed else "did not resume"
        return f"{how}, rows up to step {last}{', in the middle of a checkpoint' if writing else ''}"


def read_rows(run):
    """The rows of metrics.jsonl without their times; the last line may be cut."""
    rows = map(json.loads, run.metrics.read_text().split("\n")[:-1] if run.metrics.exists() else [])
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second", "mfu")} for row in rows]


def run_to_the_end(out, name, flags, hosts):
    run = Start(out, name, flags, hosts)
    ages = [run.wait(until=mark) for mark in (run.has_resumed, run.has_trained, lambda: False)]
    run.end()
    return ages


def kill_and_resume(out, flags, kills, seed, hosts):
    start, ready, whole = run_to_the_end(out, "reference", flags, hosts)
    print(f"reference: {whole:.1f} s, of which {ready:.1f} s to train a step", flush=True)
    draw, done = random.Random(seed), 0
    while done < kills:
        run = Start(out, "killed", flags, hosts)
        marks = {lambda: True: start, run.has_resumed: ready - start, run.has_trained: (whole - ready) / kills}
        mark, span = draw.choices(list(marks.items()), (1, 1, 2))[0]
        run.wait(until=mark)
        age = run.wait(draw.uniform(0, 2 * span if mark == run.has_trained else span))
        victim = draw.randrange(len(hosts)) if len(hosts) > 1 else 0  # one host: the moments of before
        if run.kill(victim):
            done += 1
            which = f" of host {victim}" if len(hosts) > 1 else ""
            print(f"kill {done}{which}: after {age:.2f} s, {run.describe()}", flush=True)
    run_to_the_end(out, "killed", flags, hosts)


def read_whole(path):
    """The bytes of a safetensors file; of those of several hosts, what one would have written."""
    return b"".join(in_chunks(open_arrays(path), take=lambda array: array[...]))


def find_differences(out):
    runs = [RunFolder(out / name) for name in ("reference", "killed")]
    a, b = map(read_rows, runs)
    differ = [f"row {i}: {x} and {y}" for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y][:1]
    differ += [f"{len(a)} and {len(b)} rows"] * (len(a) != len(b))
    ends = [list(find_checkpoints(run.checkpoints).values())[-1] for run in runs]
    for name in (PARAMS, OPT):
        differ += [name] if len({read_whole(end / name) for end in ends}) > 1 else []
    return differ + [path.name for path in runs[1].checkpoints.glob("damaged_*")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebook", default="02_train", choices=SIZES, help="what trains (default: 02_train)")
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--hosts", type=int, default=1, help="processes that train together (default: 1)")
    asked, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="onechip-kill-") as folder:
        tiny = [str(ROOT / f"{asked.notebook}.py"), *SIZES[asked.notebook].split(), *TINY.split()]
        kill_and_resume(Path(folder), [*tiny, *flags], asked.kills, asked.seed, host_flags(asked.hosts))
        differ = "; ".join(find_differences(Path(folder)))
    same = "the metrics (without times), parameters and optimizer state are bit for bit those of the run left alone"
    print(f"{asked.kills} kills of {asked.notebook}: {f'DIFFERENT: {differ}' if differ else same}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
