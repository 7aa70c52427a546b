"""Checkpoints of arrays that several hosts hold: each writes its own parts, and any mesh, or none, reads them.

An array that lies whole on one host is written whole, in the format of one process. Of the others each host writes the
boxes of which it has the first copy, to params-00001-of-00004.safetensors, as Hugging Face names them: a box that
starts at row 16 is the entry layers.0.c_fc@16,0, and the header's __metadata__ has the whole array's shape.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

from onechip.errors import UserError, require
from onechip.runfolder import PARAMS
from onechip.statefile import FileArray, box_of, fetch, read_header
from onechip.together import OwnFiles

SHAPES = "shapes"  # in a header: JSON, {name: shape} of the arrays of which the file has parts


# ----------------------------------------------------------------------------------------------------------------------
# What a host writes


class OwnParts(dict):
    """The arrays and parts of arrays that go into one file. about: what its header says."""

    def __init__(self, arrays, shapes):
        super().__init__(arrays)
        self.about = {SHAPES: json.dumps(shapes, separators=(",", ":"))} if shapes else {}


class Part:
    """The box that the i-th device here has of a jax.Array; it leaves the device when NumPy asks for it."""

    def __init__(self, array, i):
        self._array, self._i, box = array, i, array.addressable_shards[i].data
        self.shape, self.dtype, self.nbytes = box.shape, box.dtype, box.nbytes

    def __array__(self, dtype=None, copy=None):
        return fetch(self._array.addressable_shards[self._i].data)


def share(files, hosts):
    """What this host writes of a checkpoint's files, {name: bytes or dict of arrays}.

    Where an array is cut, that is OwnFiles on each host: host 0 writes what is whole, in files of the same names, and
    each host its parts. Where all is whole host 0 writes it, as one host alone does, and to the others this is None.
    """
    cut = {name for name, content in files.items() if isinstance(content, dict) and any(map(is_cut, content.values()))}
    if hosts.count == 1 or not cut:
        return files if hosts.index == 0 else None
    own = {
        part_name(name, hosts.index, hosts.count): _own_parts(files[name], hosts.index) for name in files if name in cut
    }
    whole = {name: content for name, content in files.items() if name not in cut}
    return OwnFiles({**own, **(whole if hosts.index == 0 else {})}, hosts)


def part_name(name, index, count):
    """The name of a host's file: params-00002-of-00004.safetensors for the second of four."""
    return f"{Path(name).stem}-{index + 1:05d}-of-{count:05d}{Path(name).suffix}"


def parse_part(file, name):
    """(index, count) if `file` is the part_name of `name` for these, else None."""
    stem, suffix = re.escape(Path(name).stem), re.escape(Path(name).suffix)
    numbers = re.fullmatch(rf"{stem}-([0-9]{{5}})-of-([0-9]{{5}}){suffix}", file)
    return (int(numbers[1]) - 1, int(numbers[2])) if numbers else None


def is_cut(array):
    """Whether no host has all of an array. A copy on each is whole, and so is an array of this host alone."""
    import jax

    return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def _own_parts(arrays, index):
    own, shapes = {}, {}
    for name, array in arrays.items():
        if not is_cut(array):
            if index == 0:
                own[name] = array
            continue
        for i, shard in enumerate(array.addressable_shards):
            if shard.replica_id == 0:  # one device has this, wherever it is
                start = ",".join(str(bounds[0]) for bounds in box_of(shard.index, array.shape))
                own[f"{name}@{start}"], shapes[name] = Part(array, i), array.shape
    return OwnParts(own, shapes)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class PartedArray(FileArray):
    """An array in several parts, (start, StoredArray) each, which fill it."""

    dtype: object
    shape: tuple
    parts: tuple

    def read_into(self, out, box):
        """Reads a box, (start, stop) of each axis, into a NumPy array of its shape."""
        for origin, part in self.parts:
            extent = list(zip(box, origin, part.shape, strict=True))
            common = [(max(a, at), min(b, at + size)) for (a, b), at, size in extent]
            if all(a < b for a, b in common):
                place = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
                part.read_into(out[place], tuple((a - at, b - at) for (a, b), at in zip(common, origin, strict=True)))


def array_files(path):
    """The files that hold the arrays of `path`: it alone, or those of several hosts; none if there are none.

    UserError, one line, if one of several is missing.
    """
    path = Path(path)
    if path.exists():
        return [path]
    found = {}
    for file in path.parent.glob(f"{path.stem}-*"):
        if numbers := parse_part(file.name, path.name):
            found.setdefault(numbers[1], {})[numbers[0]] = file
    if not found:
        return []
    counts = " and ".join(str(count) for count in sorted(found))
    require(len(found) == 1, "checkpoint", str(path), f"has files of {counts} hosts: only one number can be right")
    [(count, files)] = found.items()
    for i in range(count):
        require(i in files, "checkpoint", str(path.with_name(part_name(path.name, i, count))), "this file is missing")
    return [files[i] for i in range(count)]


def open_arrays(path):
    """{name: StoredArray or PartedArray} of a safetensors file, or of those of several hosts in its place.

    Only headers are read. UserError, one line with file and array: parts that are missing, overlap or do not fit.
    """
    files = array_files(path)
    if files in ([], [Path(path)]):
        return read_header(path)[1]
    whole, parts, shapes = {}, {}, {}
    for file in files:
        about, arrays = read_header(file)
        listed = _read_shapes(file, about)
        for name, shape in listed.items():
            require(shapes.setdefault(name, shape) == shape, str(file), name, f"is elsewhere {shapes[name]}")
        for entry, array in arrays.items():
            name, _, start = entry.rpartition("@")
            if name in listed:
                parts.setdefault(name, []).append((_read_start(file, entry, start), array))
            else:
                require(entry not in whole, str(file), entry, "this array is in another file as well")
                whole[entry] = array
    for name, shape in shapes.items():
        require(name not in whole, str(files[0]), name, "this array is there both whole and in parts")
        whole[name] = _join(name, shape, parts.get(name, []), files[0])
    return whole


def _read_shapes(file, about):
    """{name: shape} of the arrays of which a file has parts."""
    try:
        shapes = json.loads((about or {}).get(SHAPES, "{}"))
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        sound = all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape)
    except (ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{file}: its header has no shapes of arrays that can be read")
    return shapes


def _read_start(file, entry, text):
    numbers = text.split(",") if text else []
    require(all(re.fullmatch("[0-9]{1,18}", n) for n in numbers), str(file), entry, "its name has no start of a part")
    return tuple(map(int, numbers))


def _join(name, shape, parts, file):
    """The PartedArray of parts, (start, StoredArray) each, if they fill an array of a shape without overlap."""
    import numpy as np

    for start, part in parts:
        inside = len(start) == len(shape) == len(part.shape)
        inside = inside and all(a + n <= size for a, n, size in zip(start, part.shape, shape, strict=True))
        lies = f"a part of shape {part.shape} at {start} lies outside of {shape}"
        require(inside, str(part.path), name, lies)
        require(part.dtype == parts[0][1].dtype, str(part.path), name, "its parts have different types")
    low = np.array([start for start, _ in parts], np.int64).reshape(len(parts), len(shape))
    high = low + np.array([part.shape for _, part in parts], np.int64).reshape(low.shape)
    for i in range(1, len(parts)):
        meet = (np.maximum(low[:i], low[i]) < np.minimum(high[:i], high[i])).all(axis=1)
        if meet.any():
            other = parts[int(meet.argmax())][1].path.name
            require(False, str(parts[i][1].path), name, f"two of its parts overlap, the other one is in {other}")
    filled, size = sum(math.prod(part.shape) for _, part in parts), math.prod(shape)
    place = file.with_name(re.sub("-[0-9]{5}-of-", "-*-of-", file.name))
    require(filled == size, str(place), name, f"parts of it are missing: {filled:,} of {size:,} numbers are there")
    require(parts, str(place), name, "parts of it are missing: none is there")
    return PartedArray(parts[0][1].dtype, shape, tuple(parts))


def load_onto(array, like):
    """A jax.Array like a jax.ShapeDtypeStruct with a sharding, of a NumPy or stored array; here when this returns.

    Of a stored array, only the boxes that this host's devices have are read, each one once.
    """
    import jax
    import numpy as np

    if like.sharding is None:
        return jax.block_until_ready(jax.device_put(array[...]))
    boxes = {}

    def read(index):
        box = box_of(index, like.shape)
        if box not in boxes:
            boxes[box] = np.asarray(array[index])
        return boxes[box]

    return jax.block_until_ready(jax.make_array_from_callback(like.shape, like.sharding, read))


def name_weights(folder):
    """Names of the files in a folder that hold a model's weights: one, or those of several hosts, or none."""
    return [file.name for file in array_files(Path(folder) / PARAMS)]


def holds_weights(file):
    """Whether a file of this name holds a model's weights, or a host's part of them."""
    return file == PARAMS or parse_part(file, PARAMS) is not None


def missing_from(names, name):
    """What the names of files lack of the file `name`, or of those of several hosts in its place; None if nothing.

    Of those of several hosts it is the first one that is missing.
    """
    if name in names:
        return None
    counts = sorted({numbers[1] for found in names if (numbers := parse_part(found, name))})
    wanted = [part_name(name, i, count) for count in counts for i in range(count)]
    return next((file for file in wanted or [name] if file not in names), None)
