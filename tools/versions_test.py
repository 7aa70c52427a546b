"""Resumes a run on another version of jax, both ways, and compares its end with that of the runs that stay on one.

    uv run tools/versions_test.py .venv-jax-0.7.2/bin/python        .ci/run leaves that environment
    uv run tools/versions_test.py .venv-jax-0.7.2/bin/python --notebook 05_speedrun

Four runs of a notebook that trains, tiny, on the same text: by the Python that runs this, by the other one, and begun
by one and resumed by the other at half their steps. Exit code 0 if each of the latter is, up to there, bit for bit the
run that it began as, reads the very same text to the end, and has its losses to float32 rounding.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kill_test import ROOT, SIZES, TINY, read_rows

import onechip  # noqa: F401  (before jax)
from onechip.checkpoints import newest_checkpoint
from onechip.files import read_json
from onechip.runfolder import STATE, STREAM, RunFolder

STEPS, CLOSE = 60, 1e-5  # relative: rounding that sixty steps have made larger
FLAGS = f"{TINY} --warmup_ratio 0 --warmdown_ratio 0 --sample_every 0 --eval_every 10 --save_every 10"


def gather_text(folder):
    """A folder of three shards of the offline corpus, which each Python would make from its own sources."""
    corpus = importlib.import_module("01_tokenizer").offline_corpus()
    folder.mkdir()
    for path in (*corpus.train[:2], *corpus.val):
        shutil.copy(path, folder)


def train_to(python, steps, run, notebook, text):
    """One start of a run, to so many steps; what it printed."""
    words = [str(ROOT / f"{notebook}.py"), *SIZES[notebook].split(), *FLAGS.split(), "--data", str(text)]
    words += ["--num_iterations", str(steps), "--out", str(run.path.parent), "--name", run.path.name]
    home = {"ONECHIP_HOME": str(run.path.parent / "home"), "HF_TOKEN": ""}
    done = subprocess.run([python, *words], env=os.environ | home, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python}, {run.path.name}:\n{done.stdout}{done.stderr[-3000:]}")
    return done.stdout


def half_and_half(first, second, run, notebook, text):
    """Trains a run by one Python and then by another; the line that says what has changed, or none."""
    train_to(first, STEPS // 2, run, notebook, text)
    said = train_to(second, STEPS, run, notebook, text)
    return next((line for line in said.splitlines() if line.startswith("changed: jax is")), "changed: nothing")


def position_of(run):
    """Where in the data the end of a run is, to the last token."""
    end = newest_checkpoint(run.checkpoints)
    return read_json(end / STATE)["stream"], (end / STREAM).read_bytes()


def compare_runs(mixed, begun, ended):
    """What is wrong with a run that was begun as one and ended by the version of another; prints how close it is."""
    rows, before, after = (read_rows(run) for run in (mixed, begun, ended))
    losses = [[row["loss"] for row in each if "loss" in row] for each in (rows, before, after)]
    half, far = STEPS // 2, [max(abs(a / b - 1) for a, b in zip(losses[0], other, strict=True)) for other in losses[1:]]
    print(f"{mixed.path.name}: losses differ by {far[0]:.1e} and {far[1]:.1e} at most from those of the runs that stay")
    wrong = ["its first half is another"] if losses[0][:half] != losses[1][:half] else []
    wrong += ["it has read other text"] if len({str(position_of(run)) for run in (mixed, begun, ended)}) > 1 else []
    return wrong + [f"its losses differ by {max(far):.1e}"] * (max(far) > CLOSE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of another environment")
    parser.add_argument("--notebook", default="02_train", choices=SIZES, help="what trains (default: 02_train)")
    asked, pythons, wrong = parser.parse_args(), {"here": sys.executable}, []
    pythons["there"] = str(Path(asked.python).absolute())
    with tempfile.TemporaryDirectory(prefix="onechip-versions-") as folder:
        gather_text(Path(folder) / "text")
        runs = {name: RunFolder(Path(folder) / name) for name in ("here", "there", "here-there", "there-here")}
        for name, run in runs.items():
            first, second = name.split("-")[0], name.split("-")[-1]
            pair = pythons[first], pythons[second]
            print(f"{name}: {half_and_half(*pair, run, asked.notebook, Path(folder) / 'text')}", flush=True)
        for name in ("here-there", "there-here"):
            first, second = name.split("-")
            wrong += [f"{name}: {what}" for what in compare_runs(runs[name], runs[first], runs[second])]
    print("; ".join(wrong) or f"a run of {asked.notebook} resumes on the other version, both ways")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
