"""Checkpoints: pytrees as files, complete and verified, written in a thread next to training.

A checkpoint is a folder of safetensors and JSON: parameters, optimizer state, step, position in the data, metrics so
far and settings. Its manifest has every file's size and SHA-256.
"""

import dataclasses
import itertools
import json
import re
import shutil
import threading
from pathlib import Path

from onechip.errors import UserError, first_line, require, say
from onechip.files import fsync_path, hash_file, read_json, read_json_lines, rename_to_disk, reporting_full_disk
from onechip.runfolder import CONFIG, MANIFEST, METRICS, OPT, PARAMS, STATE, STREAM, checkpoint_name, find_checkpoints


def flatten(tree):
    """{"layers.0.c_q": NumPy array, ...} of a pytree of dicts, lists, tuples and NamedTuples."""
    import jax
    import numpy as np

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    if len(arrays) < len(leaves):
        raise ValueError("two arrays of this pytree have the same name: do not use a dot in the name of a parameter")
    return arrays


def unflatten(template, arrays, what="model"):
    """The inverse of flatten, as a pytree like `template`; UserError names an array that only one of the two has."""
    import jax

    left = dict(arrays)

    def find(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        require(name in left, "checkpoint", name, f"this array is missing: the checkpoint is of another {what}")
        shape = left[name].shape
        require(shape == leaf.shape, "checkpoint", f"{name} {shape}", f"the {what} has {leaf.shape}: another config?")
        return left.pop(name)

    tree = jax.tree_util.tree_map_with_path(find, template)
    for name in left:
        raise UserError(f"checkpoint={name!r}: the {what} has no such array: the checkpoint is of another {what}")
    return tree


def pack_state(state, position, notes, config, metrics=""):
    """A checkpoint's files, {name: bytes, or dict of NumPy arrays}, copied from the device.

    state: {"params": pytree, "opt": pytree, "step": int32 scalar} on the device; position in the data: a dict of JSON
    values and NumPy arrays; notes: a dict that JSON can hold; config: a dataclass; metrics: the text of metrics.jsonl.
    """
    import jax
    import numpy as np

    # The next step is given the state's memory, and on a CPU NumPy would see just that: it needs a copy.
    copy = True if jax.default_backend() == "cpu" else None
    fetched = jax.device_get(state)
    arrays = {
        key: {name: np.array(a, copy=copy, order="C") for name, a in flatten(fetched[key]).items()}  # for safetensors
        for key in ("params", "opt")
    }
    stream = {name: np.array(a, copy=None, order="C") for name, a in position.items() if isinstance(a, np.ndarray)}
    rest = {name: value for name, value in position.items() if name not in stream}
    return {
        PARAMS: arrays["params"],
        OPT: arrays["opt"],
        STREAM: stream,
        STATE: _json_bytes({"step": int(fetched["step"]), "stream": rest, **notes}),
        CONFIG: _json_bytes(dataclasses.asdict(config)),
        METRICS: metrics.encode(),
    }


def _json_bytes(value):
    return json.dumps(value, indent=2).encode()


def unpack_state(path, template):
    """(state, position, notes) of a checkpoint folder, as pack_state was given them; state holds NumPy arrays.

    template: a pytree of jax.ShapeDtypeStruct like the state. UserError, one line, for a checkpoint of another model or
    another optimizer.
    """
    import numpy as np

    path = Path(path)
    notes = read_json(path / STATE)
    step, stream = notes.pop("step", None), notes.pop("stream", None)
    require(isinstance(step, int) and 0 <= step < 2**31, f"{path / STATE}: step", step, "must be a number of steps")
    require(isinstance(stream, dict), f"{path / STATE}: stream", stream, "must be a position in the data")
    state = {
        "params": unflatten(template["params"], load_arrays(path / PARAMS)),
        "opt": unflatten(template["opt"], _load_opt(path, template["opt"]), "optimizer"),
        "step": np.asarray(step, np.int32),
    }
    return state, {**stream, **load_arrays(path / STREAM)}, notes


def _load_opt(path, template):
    """The arrays of the optimizer's state; before 2026-11-21 AdamW's two moments had a file each."""
    moments = {key: path / f"{key}.safetensors" for key in ("mu", "nu")}
    if (path / OPT).exists() or not moments["mu"].exists():
        return load_arrays(path / OPT)
    if not isinstance(template, dict) or set(template) != {"mu", "nu"}:
        raise UserError(f"{path}: holds AdamW's moments, and this optimizer needs other state; give the run a new name")
    return {f"{key}.{name}": array for key, file in moments.items() for name, array in load_arrays(file).items()}


def load_arrays(path):
    """The NumPy arrays of a safetensors file by name; UserError, one line, if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({first_line(error)})") from None


def write_checkpoint(path, files):
    """Writes a folder of `files` {name: bytes, or dict of arrays for safetensors}, completely or not at all.

    Each file is written next to its place and synced; then manifest.json with sizes and SHA-256, the folder, the
    rename, the parent. So a folder under its final name was complete, whenever the machine crashed, and its manifest
    says whether it still is.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with reporting_full_disk(path):
            _write_files(part, files)
            rename_to_disk(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # after a full disk the next attempt needs its space
        raise


def _write_files(folder, files):
    from safetensors.numpy import save_file

    manifest = {}
    for name, content in files.items():
        file = folder / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            save_file(content, file)
        fsync_path(file)
        manifest[name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    fsync_path(folder / MANIFEST)
    fsync_path(folder)


def find_damage(path):
    """What is wrong with a checkpoint folder, in words, or None if it is complete and as it was written."""
    try:
        for name, entry in read_manifest(path).items():
            if damage := find_file_damage(path / name, entry["bytes"], entry["sha256"]):
                return damage
        read_json(path / STATE)
        read_json(path / CONFIG)
        read_json_lines(path / METRICS)
    except UserError as error:
        return str(error).removeprefix(f"{path}/")
    return None


def read_manifest(path):
    """{file name: {"bytes": int, "sha256": hex}} of a checkpoint folder; UserError if it does not name a whole one."""
    manifest = read_json(path / MANIFEST)
    for name, entry in manifest.items():
        sound = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not sound or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{MANIFEST} has an entry that is not a file's, {name[:100]!r}")
    opt = ["mu.safetensors", "nu.safetensors"] if "mu.safetensors" in manifest else [OPT]
    for name in (PARAMS, *opt, STATE, METRICS, CONFIG):
        if name not in manifest:
            raise UserError(f"{MANIFEST} does not name {name}")
    return manifest


def find_file_damage(file, size, sha256):
    """What is wrong with one file of a checkpoint, in words, or None."""
    try:
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size:,} bytes, not {size:,}"
        return None if hash_file(file) == sha256 else f"{file.name} has another SHA-256 than when it was written"
    except OSError as error:  # a disk that is failing
        return f"{file.name} cannot be read ({first_line(error)})"


def newest_checkpoint(folder, set_aside=True):
    """The newest complete checkpoint under `folder`, or None.

    Damaged ones are reported and never deleted; set_aside: they are renamed, as the owner of a run may do.
    """
    for path in reversed(find_checkpoints(folder).values()):
        damage = find_damage(path)
        if damage is None:
            return path
        if path.is_symlink() or not set_aside:  # not ours to rename
            say(f"checkpoint: {path} is damaged: {damage}; skipped")
            continue
        aside = next(p for i in itertools.count() if not (p := path.with_name(f"damaged_{path.name}_{i}")).exists())
        path.rename(aside)
        say(f"checkpoint: {path} is damaged: {damage}; set aside as {aside.name}")
    return None


def clear_leftovers(folder):
    """Removes what a killed process left half-written, half-uploaded or half-downloaded in `folder`; no more."""
    for left in Path(folder).glob(".*"):
        ours = re.fullmatch(r"\.(step|nonfinite)_[0-9]{8,}\.(part|upload|download)", left.name)
        draft = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}\.part", left.name)  # of atomic_write: a folder with one file in it
        if left.is_dir() and not left.is_symlink():
            if ours or (draft and {path.name for path in left.iterdir()} <= {draft[1]}):
                shutil.rmtree(left, ignore_errors=True)


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread, and keeps the last `keep` and the best.

    `save` waits for the write before it and hands over; an error in the thread is raised by the next `save`, `check`
    or `wait`. `after(path)` is called in the thread when a checkpoint is in place.
    """

    def __init__(self, folder, keep=2, after=None):
        self._folder, self._keep, self._after = Path(folder), keep, after
        self._thread, self._error = None, None

    def save(self, step, files, best=None):
        """Starts writing step_NNNNNNNN, unless it exists; `best` is the step whose checkpoint must be kept."""
        self.wait()
        path = self._folder / checkpoint_name(step)
        if path.is_symlink() or path.is_file():
            raise UserError(f"{path}: is not a checkpoint of this run, and in the way of one: move it elsewhere")
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
        ours = {step: path for step, path in find_checkpoints(self._folder).items() if not path.is_symlink()}
        for step in sorted(ours)[: -self._keep]:
            if step != best:
                shutil.rmtree(ours[step])

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
