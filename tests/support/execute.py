"""Runs a notebook in a real kernel, as a user does who edits its visible OVERRIDES line first."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

_MODEL = (
    "--n_head 2 --n_kv_head 1 --head_dim 16 --seq_len 64 --vocab_size 512 "
    "--device_batch_size 2 --total_batch_size 256 --num_iterations 5 "
)
# The smallest run of each notebook that still passes through all of it.
_SWEEP = "--aspect_ratio 16 --total_batch_size 8 --num_iterations 4 --eval_tokens 1024 --loss_slice 512 "
TINY = {
    "01_tokenizer": "--vocab_size 512",
    "02_train": _MODEL + "--eval_every 2 --aspect_ratio 16",
    "03_worker": _MODEL + _SWEEP + "--evaluations 2 --run_cap 2",
    "05_speedrun": "--depth 2 --head_dim 16 --seq_len 64 --vocab_size 512 --device_batch_size 2 --total_batch_size 256 "
    "--num_iterations 5 --eval_every 2",
    "04_maxtext": _MODEL + "--eval_every 2 --n_embd 48 --n_layer 2 --mlp_dim 80 --tile 16",
    "06_eval": "--examples 20 --text_bytes 4000",
    "07_chat": "--num_iterations 5 --eval_every 0 --eval_tokens 256 --device_batch_size 2 --questions 4",
    "08_rl": "--num_iterations 2 --total_batch_size 8 --device_batch_size 8 --answers 4 --asked 4 --tries 2 --places 8 "
    "--question_tokens 48 --answer_tokens 16",
}


def train_before(name, folder):
    """Leaves a run of 02 in `folder` for a notebook that opens the newest one, and a chat of it for 08."""
    before = {"06_eval": ["02_train"], "07_chat": ["02_train"], "08_rl": ["02_train", "07_chat"]}
    for earlier in before.get(name, []):
        command = [sys.executable, str(ROOT / f"{earlier}.py"), *TINY[earlier].split()]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def copy_repository(folder, *more):
    """Copies what a notebook imports, the other notebooks and onechip/, and the paths in `more`, into `folder`."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("onechip", *more):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder)
    return folder


def check_outputs(notebook):
    """What a reader sees of an executed notebook: no error, one picture a cell, texts that fit a screen."""
    assert json.dumps(notebook).count('"output_type": "error"') == 0
    for outputs in (cell.get("outputs", []) for cell in notebook.cells):
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert pictures <= 1, "a picture takes the last one's place"
        texts = [output.get("text", "") for output in outputs]
        assert sum(text.count("step/s") for text in texts) <= 1, "a progress bar is one line"
        assert sum(text.count("\n") for text in texts) <= 40, "a cell's text fits a screen"


def set_overrides(notebook, flags):
    """Writes `flags` into the one line `OVERRIDES = "..."` of a notebook."""
    line = re.compile(r'^OVERRIDES = "[^"]*"', re.MULTILINE)
    holders = [cell for cell in notebook.cells if cell.cell_type == "code" and line.search(cell.source)]
    assert len(holders) == 1, "a notebook has one visible OVERRIDES line"
    holders[0].source = line.sub(f'OVERRIDES = "{flags}"', holders[0].source)


def run_notebook(notebook, folder, **environment):
    """Executes `notebook` (changed in place) with `folder` as its working directory; returns all it printed."""
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, resources=where, coalesce_streams=True)  # as front ends do
    client.execute(env=os.environ | environment)
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "") + "\n"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def run_cells(cells, folder, **environment):
    """Executes source strings as the cells of a new notebook; returns all they printed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    return run_notebook(notebook, folder, **environment)
