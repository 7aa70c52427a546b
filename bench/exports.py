"""A table of what each export's own reader computes, next to the trainer: for README.

uv run --with torch --with gguf --with flatbuffers bench/exports.py RUN [RUN ...]    RUN: a trained run's folder

Of every format that can hold the run: the largest difference of logits over real text (the source of Python's
argparse), whether 64 greedy tokens are equal, and bits per byte of that text by the reader and by ours. A reader that
is not installed is reported as not checked.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from onechip import exports
from onechip.errors import UserError
from onechip.tables import table

tok, train = importlib.import_module("01_tokenizer"), importlib.import_module("02_train")
ROWS = 8  # of text, each as long as the context, but at most 256 tokens
HEADER = ["run", "format", "reader", "logits differ by", "of", "64 tokens equal", "bits per byte", "ours"]


def by_transformers(folder, own):
    """(logits of tokens, greedy text) functions of a folder that AutoModelForCausalLM loads, and the versions."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own, dtype=torch.float32).eval()

    def logits(tokens):
        with torch.no_grad():
            return model(torch.tensor(np.asarray(tokens, np.int64))).logits.float().numpy()

    def write(ids, count):
        more = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
        return model.generate(torch.tensor([ids]), **more)[0, len(ids) :].tolist()

    return logits, write, versions("transformers", "torch")


def versions(*names):
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


PROGRAM = """
import sys, jax.export, numpy as np
from safetensors.numpy import load_file
folder, tokens, out = sys.argv[1:]
program = jax.export.deserialize(bytearray(open(folder + "/logits.stablehlo", "rb").read()))
np.save(out, program.call(load_file(folder + "/params.safetensors"), np.load(tokens)))
"""


def by_jax(folder, seq_len):
    """The same of a StableHLO program, run in a process that starts outside this repository; it writes no text."""

    def logits(tokens):
        with tempfile.TemporaryDirectory() as place:
            padded = np.zeros((len(tokens), seq_len), np.int32)
            padded[:, : tokens.shape[1]] = tokens
            np.save(f"{place}/tokens.npy", padded)
            child = [sys.executable, "-c", PROGRAM, str(folder.resolve()), f"{place}/tokens.npy", f"{place}/out.npy"]
            subprocess.run(child, check=True, cwd=place)
            return np.load(f"{place}/out.npy")[:, : tokens.shape[1]]

    return logits, None, versions("jax")


def by_numpy(folder, opened):
    """The same of 8-bit weights, widened by the lines of the card, in our own forward pass."""
    from onechip.checkpoints import unflatten

    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines, found := {})
    params = unflatten(opened.params, found["params"])
    logits = lambda tokens: np.asarray(train.forward(opened.config, params, tokens, opened.model))
    write = lambda ids, count: train.generate(opened.config, params, ids, count, model=opened.model)
    return logits, write, versions("safetensors", "numpy")


def open_with_reader(name, folder, opened):
    """(logits, write or None, versions) of an export; ImportError where its reader is not installed."""
    if name == "stablehlo":
        return by_jax(folder, opened.config.seq_len)
    if name == "int8":
        return by_numpy(folder, opened)
    if name.startswith("gguf"):
        raise ImportError("llama.cpp")
    return by_transformers(folder, name == "torch")


def bits_per_byte(logits, tokens, size):
    """Bits per byte of tokens (B, T + 1), of which `size` bytes are predicted, by logits (B, T, V)."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    picked = np.take_along_axis(z, tokens[:, 1:, None], -1)[..., 0] - np.log(np.exp(z).sum(-1))
    return -picked.sum() / math.log(2) / size


def compare(run, opened, name, folder, tokens, size):
    """A row of the table."""
    try:
        logits, write, reader = open_with_reader(name, folder, opened)
    except ImportError as error:
        return [run.name, name, f"not checked: no {error.name or error}", *[""] * 5]
    theirs = logits(tokens[:, :-1])
    ours = np.asarray(train.forward(opened.config, opened.params, tokens[:, :-1], opened.model))
    prompt = tokens[0, :16].tolist()
    text = train.generate(opened.config, opened.params, prompt, 64, model=opened.model)
    same = "-" if write is None else "yes" if write(prompt, 64) == text else "no"
    scores = [f"{bits_per_byte(z, tokens, size):.4f}" for z in (theirs, ours)]
    return [run.name, name, reader, f"{np.abs(theirs - ours).max():.1e}", f"{np.abs(ours).max():.1f}", same, *scores]


def rows_of(run):
    """The table's rows of one run; a format that cannot hold it says why."""
    opened = train.open_model(run)
    source = exports.Leaving(opened, train.forward, tok.opening_id(opened.tokenizer), False)
    length = min(256, opened.config.seq_len)
    ids = tok.encode_batch(opened.tokenizer, [inspect.getsource(argparse)])[0]
    tokens = np.array(ids[: ROWS * length + 1])
    tokens = np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(ROWS)]).astype(np.int32)
    size = sum(len(opened.tokenizer.decode(row[1:].tolist()).encode()) for row in tokens)
    put = lambda place: tok.export_tokenizer(opened.tokenizer, place)
    for name in exports.FORMATS:
        try:
            folder = exports.write_export(name, source, exports.export_folder(run, "", name), put)
        except UserError as error:
            print(f"{run.name} as {name}: {error}")
            continue
        yield compare(run, opened, name, folder, tokens, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    rows = [row for run in parser.parse_args().runs for row in rows_of(run)]
    print(table(rows, HEADER))
