"""What a laptop's fine-tuning reaches: accuracy on held-out questions, before and after, and the time it takes.

    uv run bench/chat_accuracy.py                # seeds 42, 43, 44: 05's laptop model, then 07 on it
    uv run bench/chat_accuracy.py --seeds 42     # one of them

Each seed is two commands, as a user types them; the last line says whether all of them reach the goal. Time is that of
the clock, and of both cores as the operating system counts it: user and system seconds over two, which other work on
the machine changes less.
"""

import argparse
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from onechip.errors import UserError, report_in_one_line, say  # noqa: E402
from onechip.tables import table  # noqa: E402

GOAL = {"calculator": 0.9, "counting": 0.6, "spelling": 0.6}  # after; before: under BEFORE
BEFORE, CORES = 0.05, 2


class Reached(NamedTuple):
    """Accuracies {task: share} before and after; seconds of the fine-tuning's command by the clock and by its CPU."""

    before: dict
    after: dict
    clock: float
    cpu: float

    @property
    def is_enough(self):
        return all(self.before[task] < BEFORE and self.after[task] >= least for task, least in GOAL.items())


def call(*words, folder):
    """(what a command prints, seconds by the clock, seconds of both cores); UserError if it fails."""
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{words[0]} has failed: {done.stderr.strip()[-500:]}")
    cpu = (now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime) / CORES
    return done.stdout, time.monotonic() - began, cpu


def read_accuracies(printed, when):
    """{task: accuracy} of the line that says so; UserError if there is none."""
    line = re.search(rf"^{when}: (.*) of [0-9]+ questions each$", printed, re.MULTILINE)
    if not line:
        raise UserError(f"no line says what was reached {when} the fine-tuning: {printed[-300:]}")
    return {task: float(share) for task, share in re.findall(r"(\w+) ([0-9.]+) \+-", line[1])}


def reach(seed, out, flags=()):
    """What one seed of the model reaches; both runs are left in `out`."""
    base = f"base-{seed}"
    words = ("--preset", "laptop", "--data", "offline", "--out", str(out))
    printed, _, cpu = call(str(ROOT / "05_speedrun.py"), *words, "--param_seed", str(seed), "--name", base, folder=out)
    say(f"seed {seed}: {base} trained in {cpu:.0f} s of two cores")
    flags = ("--model", str(out / base), "--name", f"chat-{seed}", *flags)
    printed, clock, cpu = call(str(ROOT / "07_chat.py"), *words, *flags, folder=out)
    return Reached(read_accuracies(printed, "before"), read_accuracies(printed, "after"), clock, cpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--out", type=Path, default=Path("runs/chat_accuracy"))
    args, flags = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, enough = [], True
    for seed in args.seeds:
        found = reach(seed, args.out.resolve(), flags)
        enough &= found.is_enough
        shares = [f"{found.before[task]:.3f} -> {found.after[task]:.3f}" for task in GOAL]
        rows.append([f"{seed}", *shares, f"{found.clock:.0f}", f"{found.cpu:.0f}"])
        say(table(rows, ["seed", *GOAL, "s, clock", "s, two cores"], "<6 >16 >16 >16 >10 >14"))
    say(f"goal {GOAL}, under {BEFORE} before: {'reached' if enough else 'missed'}")
    return 0 if enough else 1


if __name__ == "__main__":
    report_in_one_line()
    sys.exit(main())
