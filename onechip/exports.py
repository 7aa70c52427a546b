"""Trained models for other readers: `--export FORMAT --run FOLDER` leaves FOLDER/exports/FORMAT, with a card.

A format that cannot hold a model refuses it, and says which part it lacks. bench/exports.py has each format's reader
compare its logits with ours.
"""

import difflib
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from onechip.conversations import BOUNDARY, CHAT_TEMPLATE
from onechip.errors import UserError, require, say
from onechip.export import names_of_files
from onechip.files import write_json, write_text
from onechip.gguf_export import write_gguf
from onechip.plain_export import write_int8, write_stablehlo
from onechip.torch_export import write_nanochat, write_own, write_safetensors


class Leaving(NamedTuple):
    """A model to export. opened: its config, params, tokenizer and model; forward: of logits; bos: what opens a text.

    chat: whether it was trained on conversations, whose template then goes along.
    """

    opened: NamedTuple
    forward: Callable
    bos: int
    chat: bool


class Format(NamedTuple):
    """write(source, folder) writes the files; reader: what loads them; loading: how, lines with {folder!r}."""

    write: Callable
    reader: str
    loading: str


def foreign_form(source):
    """(config.json, arrays) of the other library's class that a model's notebook knows; UserError if it knows none."""
    model = source.opened.model
    require(model.write, "export", model.name, "is no architecture of another library: use --export torch")
    return model.write(source.opened.config, source.opened.params, source.bos)


def write_foreign(source, folder):
    about, arrays = foreign_form(source)
    write_json(folder / "config.json", about)
    write_safetensors(folder, arrays)


def write_gguf_of(kind, source, folder):
    about, arrays = foreign_form(source)
    template = CHAT_TEMPLATE.replace(BOUNDARY, "") if source.chat else ""
    write_gguf(folder / f"model-{kind}.gguf", kind, about, arrays, source.opened.tokenizer, template)


TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}TRUST)
prompt = tokenizer(tokenizer.bos_token + "The ", split_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(prompt["input_ids"], max_new_tokens=64, do_sample=False)[0]))
"""
LLAMA = """
from llama_cpp_py_sync import Llama  # or any other program around llama.cpp
print(Llama("{folder}/model-KIND.gguf").generate("The ", max_tokens=64, temperature=0.0))
"""
PROGRAM = """
import jax.export, numpy as np  # and the package flatbuffers, installed
from safetensors.numpy import load_file
program = jax.export.deserialize(bytearray(open("{folder}/logits.stablehlo", "rb").read()))
tokens = np.zeros((1, program.in_avals[-1].shape[1]), np.int32)  # your ids; pad a shorter text on the right
print(program.call(load_file("{folder}/params.safetensors"), tokens).shape)
"""
INT8 = """
from safetensors.numpy import load_file
arrays = load_file("{folder}/int8.safetensors")
small = [name[:-5] for name in arrays if name.endswith(".int8")]
params = {{name: array for name, array in arrays.items() if not name.endswith((".int8", ".scale"))}}
params |= {{name: arrays[name + ".int8"] * arrays[name + ".scale"] for name in small}}
"""
TRUSTED = TRANSFORMERS.replace("TRUST", ", trust_remote_code=True")
BY_CLASS = TRANSFORMERS.replace("TRUST", "")

FORMATS = {
    "torch": Format(
        lambda source, folder: write_own(source.opened, folder, source.bos),
        "transformers, by the file modeling_onechip.py next to the weights", TRUSTED,
    ),
    "nanochat": Format(
        lambda source, folder: write_nanochat(source.opened, folder, source.bos), "transformers' NanoChat", BY_CLASS
    ),
    "qwen3": Format(write_foreign, "transformers' and mlx-lm's Qwen3", BY_CLASS),
    "gguf-bf16": Format(functools.partial(write_gguf_of, "BF16"), "llama.cpp", LLAMA.replace("KIND", "BF16")),
    "gguf-q8_0": Format(functools.partial(write_gguf_of, "Q8_0"), "llama.cpp", LLAMA.replace("KIND", "Q8_0")),
    "stablehlo": Format(
        lambda source, folder: write_stablehlo(source.opened, folder, source.forward), "JAX alone", PROGRAM
    ),
    "int8": Format(lambda source, folder: write_int8(source.opened, folder), "numpy and safetensors", INT8),
}  # fmt: skip
NO_F16 = "is refused: activations of ReLU squared exceed 65,504, the largest F16, and come out as NaN; use gguf-bf16"
TOKENIZER_NOTE = {
    "gguf": "llama.cpp cuts digits in threes, the training cut them in twos, and it has no such pattern: in a text "
    "with three digits in a row its ids differ from the training's. Pass ids where that matters.",
}  # fmt: skip


def check_format(name):
    """UserError, one line, for a format that is not written, with the reason or the nearest name."""
    require(name != "gguf-f16", "export", name, NO_F16)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"export={name!r}: use one of {', '.join(FORMATS)}{hint}")


def write_export(name, source, folder, write_tokenizer):
    """Writes a format into a folder, completely or not at all: files, tokenizer, card. Returns the folder.

    write_tokenizer(folder): the tokenizer's files. A folder of an older export is replaced.
    """
    check_format(name)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        FORMATS[name].write(source, draft)
        write_tokenizer(draft)
        write_text(draft / "README.md", export_card(name, source, folder))
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    say(f"export: {folder} has {', '.join(names_of_files(folder))}")
    return folder


def export_folder(source, out, name):
    """Where an export of a run's folder goes; of a Hub repository, under `out`."""
    folder = Path(source).expanduser()
    run = folder if folder.is_dir() else Path(out) / str(source).replace("/", "--")
    return run / "exports" / name


def export_card(name, source, folder):
    """README.md of an export: what it is, what loads it, how it was checked."""
    notes = [note for prefix, note in TOKENIZER_NOTE.items() if name.startswith(prefix)]
    return CARD.format(
        name=name,
        model=source.opened.model.name,
        reader=FORMATS[name].reader,
        loading=FORMATS[name].loading.format(folder=str(folder)).strip(),
        notes="".join(f"\n{note}\n" for note in notes),
        checked=NOT_LOADED if name.startswith("gguf") else LOADED_NOTE,
    )


LOADED_NOTE = """\
How this format was checked: tests/onechip/test_exports.py of onechip writes it from models of odd sizes, loads it
as above, and compares with the trainer's own. These weights were not compared: bench/exports.py does that."""
NOT_LOADED = (
    "**Not checked**: no llama.cpp was at hand. The file is written by the `gguf` package; nothing has loaded it."
)
CARD = """\
---
license: mit
pipeline_tag: text-generation
tags:
- onechip
---
# {name} of a {model}

Read by {reader}:

```python
{loading}
```
{notes}
The training opened every text with `<|bos|>`, and stops at it.

{checked}
"""
