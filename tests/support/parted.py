"""Checkpoints as several processes leave them, made of those of one process."""

import hashlib
import json

import numpy as np
from safetensors.numpy import load_file

from onechip.parts import OwnParts, part_name
from onechip.statefile import in_chunks


def cut(array, axis, count):
    """{start: box} of an array that is cut into `count` equal boxes along an axis."""
    size = array.shape[axis] // count
    starts = [tuple(i * size * (a == axis) for a in range(array.ndim)) for i in range(count)]
    return dict(zip(starts, map(np.ascontiguousarray, np.split(array, count, axis)), strict=True))


def entries(name, boxes):
    """The same as entries of a file."""
    return {f"{name}@{','.join(map(str, start))}": box for start, box in boxes.items()}


def write_parts(path, *files, shapes):
    """Writes the parts of several processes, a dict of arrays each, in place of the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, arrays in enumerate(files):
        path.with_name(part_name(path.name, i, len(files))).write_bytes(b"".join(in_chunks(OwnParts(arrays, shapes))))
    return path


def split_checkpoint(path, count):
    """Splits a checkpoint's arrays among `count` processes, along their first axis that divides; its manifest too."""
    for name in ("params.safetensors", "opt.safetensors"):
        arrays, files, shapes = load_file(path / name), [{} for _ in range(count)], {}
        for key, array in arrays.items():
            axis = next((a for a, size in enumerate(array.shape) if size and size % count == 0), None)
            if axis is None:
                files[0][key] = array
                continue
            shapes[key] = array.shape
            for file, (entry, box) in zip(files, entries(key, cut(array, axis, count)).items(), strict=True):
                file[entry] = box
        write_parts(path / name, *files, shapes=shapes)
        (path / name).unlink()
    written = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    sums = {name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in written.items()}
    (path / "manifest.json").write_text(json.dumps(sums))
    return path
