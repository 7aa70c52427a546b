"""Checkpoints: pytrees as files, complete, verified, written in a thread next to training."""

import dataclasses
import itertools
import json
import os
import shutil
import threading
from pathlib import Path

from onechip.errors import first_line, require, say
from onechip.files import fsync_path, hash_file, removing_on_error, telling_full_disk


def path_name(path):
    """A pytree path as one word: layers.0.c_q."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def flatten(tree):
    """{"layers.0.c_q": NumPy array, ...} of a pytree of dicts, lists and tuples."""
    import jax
    import numpy as np

    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(template, arrays):
    """The inverse of flatten, in the shape of `template`; UserError names an array that is missing or ill-shaped."""
    import jax

    def find(path, leaf):
        name = path_name(path)
        require(name in arrays, "checkpoint", name, "this array is missing: the checkpoint is of another model")
        shape = arrays[name].shape
        require(shape == leaf.shape, "checkpoint", f"{name} {shape}", f"the model has {leaf.shape}: another config?")
        return arrays[name]

    return jax.tree_util.tree_map_with_path(find, template)


MANIFEST = "manifest.json"


def write_checkpoint(path, files):
    """Writes a folder of `files` {name: bytes, or dict of arrays for safetensors}, whole or not at all.

    Beside its place, each file synced; then manifest.json with sizes and SHA-256, the folder, the rename, the parent:
    whatever the moment of a crash, a folder under its final name was complete, and the manifest tells if it still is.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    manifest = {}
    with telling_full_disk(path), removing_on_error(part):
        for name, content in files.items():
            if isinstance(content, bytes):
                (part / name).write_bytes(content)
            else:
                save_file(content, part / name)
            fsync_path(part / name)
            manifest[name] = {"bytes": (part / name).stat().st_size, "sha256": hash_file(part / name)}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2))
        fsync_path(part / MANIFEST)
        fsync_path(part)
        os.replace(part, path)
        fsync_path(path.parent)


def find_damage(path):
    """What is wrong with a checkpoint folder, in words, or None: every file must be as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    damages = (find_file_damage(path / name, *entry) for name, entry in expected.items())
    return next(filter(None, damages), None) if expected else f"{MANIFEST} names no file"


def find_file_damage(file, size, sha256):
    """What is wrong with one file of a checkpoint, in words, or None."""
    try:
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size:,} bytes, not {size}"
        return None if hash_file(file) == sha256 else f"{file.name} has another SHA-256 than when it was written"
    except OSError as error:  # a disk that goes bad
        return f"{file.name} cannot be read ({first_line(error)})"


def newest_checkpoint(folder):
    """The newest whole checkpoint under `folder`, or None. Damaged ones are named, and set aside, never deleted."""
    for path in sorted(Path(folder).glob("step_*"), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        aside = next(p for i in itertools.count() if not (p := path.with_name(f"damaged_{path.name}_{i}")).exists())
        path.rename(aside)
        say(f"checkpoint: {path} is damaged: {damage}; set aside as {aside.name}")
    return None


def clear_leftovers(folder):
    """Removes what a process that was killed left half-written, half-uploaded or half-downloaded under `folder`."""
    for pattern in (".*.part", ".*.upload", ".*.download"):
        for left in Path(folder).glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def fixed_fields(config_class):
    """Names of the fields that a run keeps from its first step to its last."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata["fixed"]]


def compare_with_checkpoint(path, config, made_from):
    """Says what is not as it was when the checkpoint was written; UserError for a field that may not change."""
    made_before = json.loads((Path(path) / "state.json").read_text())["made_from"]
    before, now = json.loads((Path(path) / "config.json").read_text()), dataclasses.asdict(config)
    fixed = fixed_fields(config)
    for name in (name for name in now if now[name] != before.get(name)):
        remedy = f"{path} was made with {before.get(name)!r}; set that, or another name for a new run"
        require(name not in fixed, name, now[name], remedy)
        say(f"changed: {name} is {now[name]!r}, was {before.get(name)!r} up to here")
    for name, value in made_from.items():
        if value != made_before.get(name):
            say(f"changed: {name} is {value}, was {made_before.get(name)} up to here")


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread, and keeps the last `keep` and the best.

    `save` waits for the write before it and hands over; an error in the thread is raised by the next `save`, `check`
    or `close`. `after(path)` is called in the thread when a checkpoint is in place.
    """

    def __init__(self, folder, keep=2, after=None):
        self._folder, self._keep, self._after = Path(folder), keep, after
        self._thread, self._error = None, None

    def save(self, step, files, best=None):
        """Starts writing step_NNNNNNNN; `best` is the step whose checkpoint must not be cleared away."""
        self.wait()
        path = self._folder / f"step_{step:08d}"
        if path.exists():
            return
        self._thread = threading.Thread(target=self._work, args=(path, files, best), name="checkpoint")
        self._thread.start()

    def _work(self, path, files, best):
        try:
            write_checkpoint(path, files)
            self._clear(best)
            if self._after:
                self._after(path)
        except BaseException as error:
            self._error = error

    def _clear(self, best):
        whole = sorted(self._folder.glob("step_*"))
        for old in whole[: -self._keep]:
            if old.name != f"step_{best or -1:08d}":
                shutil.rmtree(old)

    def check(self):
        """Raises what went wrong in the thread, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self):
        """Waits for the write in progress, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
