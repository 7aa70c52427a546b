"""Trained models as files: find those of a run, an export or a Hub repository, and leave a folder for a stranger."""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jax

from onechip.card import model_card
from onechip.checkpoints import newest_checkpoint, unflatten
from onechip.disk import rescue_folder
from onechip.doors import Model, Optimizer, config_with
from onechip.errors import UserError, first_line, require
from onechip.files import atomic_write, cannot_write, read_json, write_hashed, write_text
from onechip.hub import is_repo_name
from onechip.hubclient import load_hub, try_again
from onechip.parts import name_weights, open_arrays
from onechip.runfolder import ABOUT, CONFIG, PARAMS, STATE, TOKENIZER, RunFolder
from onechip.statefile import in_chunks
from onechip.weights import weight_shapes

FOREIGN_WEIGHTS = "model.safetensors"  # in an export that another library reads


class ModelFiles(NamedTuple):
    """Where a trained model's parts are. about: its config.json as a dict; weights: its safetensors file.

    That file may lie there in the parts of several hosts.
    """

    source: str
    about: dict
    weights: Path
    tokenizer: Path

    @property
    def foreign(self):
        """Whether the weights have another library's names and layout."""
        return self.weights.name != PARAMS

    def load_params(self, config, model):
        """The parameters, a pytree on the default device; UserError names what does not fit.

        One array at a time passes through the host; another library's format is read as a whole.
        """
        arrays = open_arrays(self.weights)
        if self.foreign:
            arrays = {name: array.read() for name, array in arrays.items()}
            require(model.read, "model", model.name, f"does not read the format of {self.weights}")
            try:
                arrays = model.read(config, arrays)
            except (KeyError, ValueError) as error:
                reason = f"not the arrays of this model ({first_line(error)})"
                raise UserError(f"{self.weights}: {reason}; get it again") from None
        params = unflatten(weight_shapes(config, model.weights(config)), arrays)
        put = lambda array: jax.block_until_ready(jax.device_put(array if self.foreign else array.read()))
        return jax.tree.map(put, params)

    def make_config(self, config_class):
        """The Config that the model was trained with; UserError if its fields are not those of config_class."""
        fields = self.about.get("config", self.about)  # a checkpoint's holds nothing else
        require(isinstance(fields, dict), "config", fields, "config.json must have an object in braces there")
        known = {field.name for field in dataclasses.fields(config_class)}
        unknown = sorted(set(fields) - known)
        remedy = f"{config_class.__name__} has no such field: open it with the notebook that trained it"
        require(not unknown, "config.json", ", ".join(unknown), remedy)
        return config_class(**fields)


def find_model_files(source):
    """The ModelFiles of a run's folder, a checkpoint, an export, or a Hub repository; UserError if it is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        names = str(source).split("/")
        on_hub = len(names) == 2 and all(map(is_repo_name, names))
        require(on_hub, "model", str(source), "no such folder, nor a repository, owner/name")
        fetch = lambda: load_hub().snapshot_download(source, ignore_patterns="checkpoints/*")
        folder = Path(try_again(fetch, f"{source}: no folder, and cannot be downloaded"))
    run, weights = folder, newest_checkpoint(RunFolder(folder).checkpoints, set_aside=False)
    if (folder / STATE).exists():  # a checkpoint: the rest is in its run's folder
        run, weights = folder.parent.parent, folder
    newest = weights or folder
    config = first_of(newest / ABOUT, run / CONFIG)
    files = {
        "config": config,
        "weights": newest / PARAMS if name_weights(newest) else first_of(folder / FOREIGN_WEIGHTS),
        "tokenizer": first_of(*(place / TOKENIZER for place in (newest, run, run / "model"))),
    }
    for what, found in files.items():
        require(found, "model", str(source), f"has no {what}: is it a run's folder, and has training begun?")
    return ModelFiles(str(source), read_json(files.pop("config")), **files)


def first_of(*paths):
    """The first path that exists, or None."""
    return next((path for path in paths if path and path.exists()), None)


def find_model(name, folder, default):
    """The model that a config.json names, NOTEBOOK.CONSTANT, of a notebook in `folder`.

    default: the model that is loaded already, with its name.
    """
    return default if name == default.name else find_part("model", name, folder, Model)


def find_optimizer(name, folder, default):
    """The same for an optimizer."""
    return default if name == default.name else find_part("optimizer", name, folder, Optimizer)


def config_of(about, model, folder):
    """The Config class of a model that was trained with the optimizer that its config.json names."""
    name = about.get("optimizer", "")
    settings = find_part("optimizer", name, folder, Optimizer).settings if names_a_part(name) else None
    return config_with(model.config, settings)


def find_part(what, name, folder, kind):
    """The Model or Optimizer NOTEBOOK.CONSTANT of a notebook in `folder`; UserError if it is no such thing.

    Nothing else is ever imported by what a file says. what: the field that has the name; kind: the tuple's type.
    """
    module, _, constant = str(name).partition(".")
    spec = importlib.util.find_spec(module) if names_a_part(name) else None
    here = spec and spec.origin and Path(spec.origin).resolve() == (folder / f"{module}.py").resolve()
    require(here, what, name, f"no notebook here has it: use the commit that config.json names, or pass {what}=")
    part = getattr(importlib.import_module(module), constant, None)
    require(isinstance(part, kind), what, name, f"{module} has no such {what}: use the commit in config.json")
    return part


def names_a_part(name):
    """Whether a name has the form NOTEBOOK.CONSTANT."""
    return bool(re.fullmatch(r"\d\d_[a-z0-9]+\.[A-Z][A-Z0-9_]*", str(name)))


def copy_into(folder, *paths):
    """Copies those files that exist into a folder, each completely or not at all."""
    folder.mkdir(exist_ok=True)
    for path in filter(Path.exists, paths):
        with atomic_write(folder / path.name) as part:
            shutil.copyfile(path, part)


def export_weights(result):
    """Copies the newest checkpoint's weights, the config and the curve of a run to its folder model/; returns that.

    The weights are one file of whole arrays, in however many parts the checkpoint has them. The newest may be one that
    was rescued, while the run's own disk was away. UserError if the run was interrupted before its first step, and
    where that disk still cannot be written to.
    """
    run, found = RunFolder(result.run_dir), []
    for place in (run.checkpoints, rescue_folder(run.path)):
        with contextlib.suppress(OSError):  # a disk that is away
            found += filter(None, [newest_checkpoint(place, set_aside=False)])
    require(found, "model", str(run.path), "has no checkpoint yet: the same command trains on")
    newest = max(found, key=lambda path: path.name)
    try:
        copy_into(run.model, run.config, run.picture)
        with atomic_write(run.model / PARAMS) as part:
            write_hashed(part, in_chunks(open_arrays(newest / PARAMS), take=lambda array: array[...]))
    except OSError as error:
        raise cannot_write(run.model, error, f"the weights are in {newest}; the same command exports them") from None
    return run.model


def names_of_files(folder):
    """Names of the files in a folder, sorted, without hidden ones."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def write_card(folder, result, loading, *, source="", repository="", notes="", library="jax", **style):
    """Writes README.md of an exported model.

    loading: lines of Python that sample from it, with {repository}, {source!r} and {prompt!r} to fill in; source: the
    Hub repository that the folder will be uploaded to, if any; style: more of model_card's keywords.
    """
    about = RunFolder(result.run_dir).read_config()
    prompt = result.samples[0][0] if result.samples else "The "
    lines = loading.format(repository=repository, source=source or str(folder), prompt=prompt)
    size = sum(leaf.size for leaf in jax.tree.leaves(result.params))
    card = model_card(result, about, size, lines, about.get("dataset", ""), notes, library, **style)
    write_text(folder / "README.md", card)
