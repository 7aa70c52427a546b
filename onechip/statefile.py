"""Safetensors as a stream: arrays leave a device one by one for a file, and come back one by one.

The format: eight bytes, little-endian, with the header's length; the header, JSON that has each array's type, shape and
place; the arrays' bytes, end to end (https://huggingface.co/docs/safetensors). All of the header is known before the
first array is fetched. The host never holds more than a part of a state.
"""

import collections
import dataclasses
import json
import math
import os
import threading
from pathlib import Path

from onechip.errors import UserError, first_line
from onechip.files import PIECE

# Bytes of arrays on their way to a file. A training process takes 1 to 3 GB besides, Colab has killed processes at
# 11.5 GB, and a state that fits is on the host before the disk has begun: the pause is then that of the copy.
BUFFER = 2 << 30

DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes: the limit of the format's own library


def fetch(array):
    """A NumPy copy of an array, in C order, of which the array itself keeps nothing.

    What NumPy fetches from a jax.Array stays with that until it is freed, so that a state would pile up on the host:
    here it goes with another jax.Array of the same buffers.
    """
    import jax
    import numpy as np

    if not isinstance(array, jax.Array):
        return np.array(array, copy=None, order="C")
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise ValueError(f"parts of this array of {array.shape} are in other processes: see parts.share")
    shards = array.addressable_shards
    if not array.is_fully_replicated and len(shards) > 1:  # its parts, one by one: NumPy would keep all, and copy them
        whole = np.empty(array.shape, array.dtype)
        for shard in shards:
            if shard.replica_id == 0:
                whole[shard.index] = fetch(shard.data)
        return whole
    first = shards[0].data
    view = jax.make_array_from_single_device_arrays(array.shape, first.sharding, [first])
    # The next step is given the state's memory, and on a CPU NumPy would see just that: it needs a copy.
    copy = True if next(iter(first.sharding.device_set)).platform == "cpu" else None
    return np.array(view, copy=copy, order="C")


def file_order(arrays):
    """The names of arrays, {name: array}, as a file has them: larger types first, so that each one is aligned."""
    return sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))


def in_chunks(arrays, take=fetch):
    """The bytes of a safetensors file of arrays, {name: array on a device or NumPy array}: its header, then each array.

    take(array) -> NumPy array; it is asked for one when the one before has been consumed. An attribute `about` of
    arrays, {text: text}, goes into the header.
    """
    header, end = {"__metadata__": about} if (about := getattr(arrays, "about", None)) else {}, 0
    for name in file_order(arrays):
        array, start, end = arrays[name], end, end + arrays[name].nbytes
        header[name] = {"dtype": DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in file_order(arrays):
        yield memoryview(take(arrays[name]).reshape(-1).view("uint8"))


class Abandoned(Exception):
    """The arrays that a file still needs will not come."""


class HostBuffer:
    """Arrays on their way from the device to a file: one thread fills it, one takes; at most `limit` bytes inside.

    An array larger than that passes alone.
    """

    def __init__(self, limit=None):
        self._limit = BUFFER if limit is None else limit
        self._ready, self._bytes, self._taken, self._ended = collections.deque(), 0, 0, False
        self._changed = threading.Condition()

    def fill(self, arrays):
        """Fetches arrays, one by one, as there is room; returns when the last one is here, or nobody takes them."""
        for array in arrays:
            if not self._make_room(array.nbytes):
                return
            fetched = fetch(array)
            with self._changed:
                self._ready.append(fetched)
                self._changed.notify_all()
            del fetched  # while this thread waits, only the buffer has it

    def _make_room(self, size):
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._bytes or self._bytes + size <= self._limit)
            self._bytes += size
            return not self._ended

    def take(self, array):
        """The next array, a NumPy array like `array`; the one taken before makes room. Abandoned if none will come."""
        with self._changed:
            self._bytes -= self._taken
            self._taken = 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._ended)
            if self._ended:
                raise Abandoned
            fetched = self._ready.popleft()
            self._taken = fetched.nbytes
            return fetched

    def end(self):
        """Lets both threads go, whatever they wait for."""
        with self._changed:
            self._ended = True
            self._ready.clear()
            self._changed.notify_all()


class FileArray:
    """An array in files, with dtype, shape and read_into. Indexed by slices, it reads that box alone."""

    @property
    def nbytes(self):
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self):
        """The NumPy array; UserError if a file cannot be read."""
        return self[...]

    def __getitem__(self, index):
        """The NumPy array of a box. index: `...`, or a slice with step 1 for each of the first axes."""
        import numpy as np

        box = box_of(index, self.shape)
        out = np.empty([stop - start for start, stop in box], self.dtype)
        self.read_into(out, box)
        return out


@dataclasses.dataclass(frozen=True)
class StoredArray(FileArray):
    """An array in a safetensors file. start: its first byte in the file."""

    path: Path
    dtype: object
    shape: tuple
    start: int

    def read_into(self, out, box):
        """Reads a box, (start, stop) of each axis, into a NumPy array of its shape; it needs no more than a piece."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                _read_box(file, out, box, self.shape, self.start)
        except EOFError:
            raise unreadable(self.path, "it ends too early") from None
        except OSError as error:
            raise unreadable(self.path, error) from None


def box_of(index, shape):
    """((start, stop), ...) of each axis, for what an array of a shape is indexed by: `...`, or slices with step 1."""
    index = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
    whole = (slice(None),) * (len(shape) - len(index))
    bounds = [part.indices(size) for part, size in zip((*index, *whole), shape, strict=True)]
    if any(step != 1 for *_, step in bounds):
        raise ValueError("a box has no steps")
    return tuple((start, max(start, stop)) for start, stop, _ in bounds)


def _read_box(file, out, box, shape, place):
    """Reads a box of the array of a shape that begins at byte `place` of a file into `out`, which has its shape."""
    import numpy as np

    if not out.size:
        return
    first, inner = box[0][0] if box else 0, math.prod(shape[1:]) * out.itemsize
    place += first * inner
    whole_rows = all((0, size) == bounds for bounds, size in zip(box[1:], shape[1:], strict=True))
    if whole_rows and out.flags.c_contiguous:
        return _read_bytes(file, place, out)
    if len(shape) > 1 and inner > PIECE:
        for i, row in enumerate(out):
            _read_box(file, row, box[1:], shape[1:], place + i * inner)
        return
    # Whole rows, of which a part is kept: a disk reads some megabytes as fast as a hundred short stretches of them.
    count, kept = max(1, PIECE // inner), tuple(slice(*bounds) for bounds in box[1:])
    for i in range(0, len(out), count):
        rows = np.empty((min(count, len(out) - i), *shape[1:]), out.dtype)
        _read_bytes(file, place + i * inner, rows)
        out[i : i + count] = rows[:, *kept]


def _read_bytes(file, place, out):
    file.seek(place)
    left = memoryview(out.reshape(-1).view("uint8"))
    while left:
        if not (count := file.readinto(left)):
            raise EOFError
        left = left[count:]


def unreadable(path, reason):
    """The UserError for a file that is no safetensors file, or cannot be read."""
    why = first_line(reason) if isinstance(reason, Exception) else reason
    return UserError(f"{path}: cannot be read as safetensors ({why})")


def stored_arrays(path):
    """{name: StoredArray} of a safetensors file, of which only the header is read; UserError if it is none."""
    return read_header(path)[1]


def read_header(path):
    """(what the header says besides, as the file has it; {name: StoredArray}) of a safetensors file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise unreadable(path, "its header is not there")
            header = json.loads(file.read(length).decode())
        about = header.pop("__metadata__", None)
        return about, {name: _find_array(path, entry, 8 + length, size) for name, entry in header.items()}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(path, error) from None


def _find_array(path, entry, origin, size):
    import ml_dtypes
    import numpy as np

    names = {short: long for long, short in DTYPES.items()}
    if entry["dtype"] not in names:
        raise ValueError(f"arrays of type {str(entry['dtype'])[:20]} are not read here")
    name, shape, (start, end) = names[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("its header has a size that is none")
    if end - start != math.prod(shape) * dtype.itemsize or origin + end > size:
        raise ValueError("the sizes in its header do not agree")
    return StoredArray(path, dtype, shape, origin + start)


def load_arrays(path):
    """The NumPy arrays of a safetensors file by name; UserError, one line, if it cannot be read."""
    return {name: array.read() for name, array in stored_arrays(path).items()}
