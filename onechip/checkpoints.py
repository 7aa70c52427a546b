"""Checkpoints: pytrees as files, complete and verified.

A checkpoint is a folder of safetensors and JSON: parameters, optimizer state, step, position in the data, metrics so
far and settings. Its manifest has every file's size and SHA-256.
"""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

from onechip.errors import UserError, first_line, require, say
from onechip.files import (
    fsync_path,
    hash_file,
    read_json,
    read_json_lines,
    rename_to_disk,
    reporting_full_disk,
    write_hashed,
)
from onechip.parts import array_files, missing_from, open_arrays
from onechip.runfolder import CONFIG, MANIFEST, METRICS, OPT, PARAMS, STATE, STREAM, find_checkpoints
from onechip.statefile import fetch, file_order, in_chunks, load_arrays, stored_arrays
from onechip.together import ALONE, write_together


def name_leaves(tree):
    """{"layers.0.c_q": array, ...} of a pytree of dicts, lists, tuples and NamedTuples; no array is copied."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays of this pytree have the same name: do not use a dot in the name of a parameter")
    return named


def flatten(tree):
    """The same with NumPy arrays."""
    import numpy as np

    return {name: np.asarray(leaf) for name, leaf in name_leaves(tree).items()}


def unflatten(template, arrays, what="model"):
    """The inverse of name_leaves, as a pytree like `template`; UserError names an array that only one of them has."""
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
    """A checkpoint's files, {name: bytes, or dict of arrays}; those of the state stay on the device until written.

    state: {"params": pytree, "opt": pytree, "step": int32 scalar} on the device; position in the data: a dict of JSON
    values and NumPy arrays; notes: a dict that JSON can hold; config: a dataclass; metrics: the text of metrics.jsonl.
    """
    import numpy as np

    stream = {name: a for name, a in position.items() if isinstance(a, np.ndarray)}
    rest = {name: value for name, value in position.items() if name not in stream}
    return {
        PARAMS: name_leaves(state["params"]),
        OPT: name_leaves(state["opt"]),
        STREAM: stream,
        STATE: _json_bytes({"step": int(state["step"]), "stream": rest, **notes}),
        CONFIG: _json_bytes(dataclasses.asdict(config)),
        METRICS: metrics.encode(),
    }


def _json_bytes(value):
    return json.dumps(value, indent=2).encode()


def arrays_in(files):
    """The arrays of a checkpoint's files, in the order in which write_checkpoint takes them."""
    return [c[name] for c in files.values() if isinstance(c, dict) for name in file_order(c)]


def unpack_state(path, template, place=lambda array, like: array[...]):
    """(state, position, notes) of a checkpoint folder, as pack_state was given them.

    template: a pytree of jax.ShapeDtypeStruct like the state. place(array, its ShapeDtypeStruct) gets one array of the
    state at a time, and what it returns is in the state: array[...] reads it whole, slices read a box of it, as
    parts.load_onto does. UserError, one line, for a checkpoint of another model or another optimizer.
    """
    import jax
    import numpy as np

    path = Path(path)
    notes = read_json(path / STATE)
    step, stream = notes.pop("step", None), notes.pop("stream", None)
    require(isinstance(step, int) and 0 <= step < 2**31, f"{path / STATE}: step", step, "must be a number of steps")
    require(isinstance(stream, dict), f"{path / STATE}: stream", stream, "must be a position in the data")
    stored = {
        "params": unflatten(template["params"], open_arrays(path / PARAMS)),
        "opt": unflatten(template["opt"], _find_opt(path, template["opt"]), "optimizer"),
    }
    position = {**stream, **load_arrays(path / STREAM)}
    state = jax.tree.map(place, stored, {key: template[key] for key in stored})
    return {**state, "step": place(np.asarray(step, np.int32), template["step"])}, position, notes


def _find_opt(path, template):
    """The stored arrays of the optimizer's state; before 2026-11-21 AdamW's two moments had a file each."""
    moments = {key: path / f"{key}.safetensors" for key in ("mu", "nu")}
    if array_files(path / OPT) or not moments["mu"].exists():
        return open_arrays(path / OPT)
    if not isinstance(template, dict) or set(template) != {"mu", "nu"}:
        raise UserError(f"{path}: holds AdamW's moments, and this optimizer needs other state; give the run a new name")
    return {f"{key}.{name}": array for key, file in moments.items() for name, array in stored_arrays(file).items()}


def write_checkpoint(path, files, take=fetch):
    """Writes a folder of `files` {name: bytes, or dict of arrays for safetensors}, completely or not at all.

    Each file is written next to its place, hashed on the way and synced; then manifest.json with sizes and SHA-256, the
    folder, the rename, the parent. So a folder under its final name was complete, whenever the machine crashed, and its
    manifest says whether it still is. take(array) gives each array's NumPy array, in the order of arrays_in. Of
    OwnFiles each host writes its own, at the same time, to a disk that all see.
    """
    if files is None:  # another host writes all of it
        return
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    write = lambda files: _write_files(path, part, files, take)
    publish = lambda manifest: _publish(path, part, manifest)
    if getattr(files, "hosts", ALONE).count > 1:
        return write_together(path, part, files, write, publish)
    shutil.rmtree(part, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)  # not the folders above: those of a disk that is away must not be made again
    part.mkdir()
    try:
        publish(write(files))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # after a full disk the next attempt needs its space
        raise


def _write_files(path, part, files, take):
    manifest = {}
    with reporting_full_disk(path):
        for name, content in files.items():
            chunks = [content] if isinstance(content, bytes) else in_chunks(content, take)
            manifest[name] = write_hashed(part / name, chunks)
    return manifest


def _publish(path, part, manifest):
    with reporting_full_disk(path):
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2))
        fsync_path(part / MANIFEST)
        fsync_path(part)
        rename_to_disk(part, path)


def find_damage(path):
    """What is wrong with a checkpoint folder, in words, or None if it is complete and as it was written."""
    try:
        for name, entry in read_manifest(path).items():
            if damage := find_file_damage(path / name, entry["bytes"], entry["sha256"]):
                return damage
        read_json(path / CONFIG)
        check_numbers(STATE, read_json(path / STATE), ("best_step", "best_score", "best_val_bpb"))
        for i, row in enumerate(read_json_lines(path / METRICS), 1):
            check_numbers(f"{METRICS}, line {i}", row, NUMBERS)
            step = row.get("step")
            require(type(step) is int and 0 <= step < 2**31, f"{METRICS}, line {i}: step", step, "is no step")
    except UserError as error:
        return str(error).removeprefix(f"{path}/")
    return None


NUMBERS = ("loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_second", "mfu", "time")  # in metrics.jsonl


def check_numbers(place, values, names):
    """UserError unless those of a dict's values that have these names are numbers, or None: a run compares them."""
    for name in names:
        value = values.get(name)
        sound = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        require(sound, f"{place}: {name}", value, "is no number")


def read_manifest(path):
    """{file name: {"bytes": int, "sha256": hex}} of a checkpoint folder; UserError if it does not name a whole one."""
    manifest = read_json(path / MANIFEST)
    for name, entry in manifest.items():
        sound = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not sound or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{MANIFEST} has an entry that is not a file's, {name[:100]!r}")
    opt = ["mu.safetensors", "nu.safetensors"] if "mu.safetensors" in manifest else [OPT]
    for name in (PARAMS, *opt, STATE, METRICS, CONFIG):
        if lost := missing_from(manifest, name):
            raise UserError(f"{MANIFEST} does not name {lost}")
    return manifest


LARGE = 1 << 28  # bytes: a start looks for the newest checkpoint several times, and 14 GB take a minute to read
_sound = set()  # large files, as they are, that this process has hashed


def find_file_damage(file, size, sha256):
    """What is wrong with one file of a checkpoint, in words, or None."""
    try:
        if not file.is_file():
            return f"{file.name} is missing"
        found = file.stat()
        if found.st_size != size:
            return f"{file.name} has {found.st_size:,} bytes, not {size:,}"
        state = (file.absolute(), found.st_ino, found.st_mtime_ns, sha256)
        if state not in _sound:
            if hash_file(file) != sha256:
                return f"{file.name} has another SHA-256 than when it was written"
            if size >= LARGE:
                _sound.add(state)
        return None
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
