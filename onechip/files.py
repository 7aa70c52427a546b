"""Files that are written completely or not at all, and JSON that somebody else may have written."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path

from onechip.errors import UserError, first_line

JSON_LIMIT = 1 << 24  # bytes of a JSON file; ours have some kilobytes
ABANDONED = 3600.0  # seconds after which what nobody touches is a killed process's leftover
PIECE = 1 << 24  # bytes written, then hashed, at a time


class FullDisk(UserError):
    """A disk, or the user's quota of it, that is full."""


def fsync_path(path):
    """Forces a file's or folder's content to disk: a later rename must not reach the disk before it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems have no sync of a folder: there is nothing that could be done instead.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP) or not os.path.isdir(path):
            raise
    finally:
        os.close(fd)


def rename_to_disk(source, target):
    """Renames a file or folder whose content is on disk already, and forces its new name to disk."""
    os.replace(source, target)
    fsync_path(target.parent)


def is_full(error):
    """Whether an error says that the disk, or the user's quota, is full; safetensors says it in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


@contextlib.contextmanager
def reporting_full_disk(path):
    """Turns any error that says that the disk is full into a FullDisk that names `path`."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise FullDisk(
            f"{path}: the disk is full; free some space and run again, nothing half-written is left"
        ) from None


def cannot_write(path, error, remedy):
    """The UserError, one line, for an OSError that says that nothing can be written to `path`."""
    return UserError(f"{path}: cannot be written to ({error.strerror or first_line(error)}); {remedy}")


def require_writable(folder, remedy):
    """Makes a folder, and a file in it that goes again; UserError, one line, if that cannot be."""
    probe = draft_path(Path(folder) / "probe")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(folder, error, remedy) from None


@contextlib.contextmanager
def atomic_write(path):
    """Yields a path next to `path` to write a file or folder to; renames it to `path` on success, removes it on error.

    A reader sees the old file or the new one, never a part, at whatever moment the machine dies. A full disk raises
    FullDisk and leaves nothing behind.
    """
    path = Path(path)
    with reporting_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)) / path.name
    try:
        with reporting_full_disk(path):
            yield draft
            for written in [*draft.rglob("*"), draft]:  # a folder's entries need their own sync
                fsync_path(written)
            rename_to_disk(draft, path)
    finally:
        shutil.rmtree(draft.parent, ignore_errors=True)


def write_text(path, text):
    """Writes a text file, UTF-8, completely or not at all."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes a value as a JSON file, completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def create_whole(path, text):
    """Creates a complete text file unless it exists; returns whether it did. Of many callers, one does."""
    draft = draft_path(path)
    try:
        draft.write_text(text, encoding="utf-8")
        fsync_path(draft)
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # no hard links on this file system, such as Google Drive's
            return _create_in_place(path, text)
        return True
    finally:
        draft.unlink(missing_ok=True)


def _create_in_place(path, text):
    """As create_whole, but for a moment a reader sees a file that is empty."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def age_of(path):
    """Seconds since a file was last touched, by the clock of its file system; infinity if it is not there."""
    now = clock_of(path.parent)
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def clock_of(folder):
    """The time, seconds, by the clock of a folder's file system, which may be another machine's."""
    probe = draft_path(folder / "clock")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def draft_path(path):
    """A hidden path next to `path`, .NAME.32_HEX_DIGITS, that nobody else uses."""
    return path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex}")


def is_draft(path, of):
    """Whether a path could be a draft_path of the path `of`, to the letter."""
    head, _, tail = path.name.rpartition(".")
    return head == f".{of.name.lstrip('.')}" and len(tail) == 32 and not tail.strip("0123456789abcdef")


def clear_abandoned(folder):
    """Removes what killed processes left of atomic_write and of draft_paths in a folder, and no other's file.

    Of processes that run, what they are writing has been touched within the last hour.
    """
    for left in Path(folder).glob(".*"):
        form = r"\.(.+)\.[a-z0-9_]{8}\.part" if left.is_dir() else r"\.(.+)\.[0-9a-f]{32}"
        name = re.fullmatch(form, left.name)
        with contextlib.suppress(OSError):  # it is being renamed, or swept by another process
            if name and not left.is_symlink() and _is_abandoned(left, name[1]):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _is_abandoned(left, name):
    inside = list(left.rglob("*")) if left.is_dir() else []
    if any(path.parent == left and path.name not in (name, ".cache") for path in inside):  # the latter: a download's
        return False
    return clock_of(left.parent) - max(path.stat().st_mtime for path in [left, *inside]) > ABANDONED


def read_json(path):
    """The JSON object in a file, as a dict. UserError, one line with the file's name, for whatever else is there."""
    return _parse_object(_read_text(path, JSON_LIMIT), path)


def read_json_or_none(path):
    """The JSON object in a file, as a dict; None if there is no file, or none that can be read."""
    try:
        return read_json(path)
    except UserError:
        return None


def read_json_lines(path, growing=False):
    """The JSON objects in a file that has one on each line, as a list of dicts; UserError as in read_json.

    growing: another process may be writing to the file, so a last line without its newline is left out: on Linux a
    reader can see the first part of a single write.
    """
    text = _read_text(path)
    lines = (text[: text.rfind("\n") + 1] if growing else text).removesuffix("\n").split("\n")
    return [_parse_object(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)] if lines != [""] else []


def _read_text(path, limit=None):
    try:
        with open(path, "rb") as file:
            raw = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if limit is not None and len(raw) > limit:
        raise UserError(f"{path}: has more than {limit:,} bytes, too many for a file of settings")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def _parse_object(text, place):
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{place}: is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise UserError(f"{place}: is not JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: is JSON, but not an object in braces")
    return value


def hash_file(path):
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashed(path, chunks):
    """Writes chunks of bytes to a new file, to disk, and hashes them on the way: {"bytes": int, "sha256": hex}.

    Of each chunk nothing is kept when the next one is asked for.
    """
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for chunk in chunks:
            piece = b""
            for start in range(0, len(chunk), PIECE):
                piece = memoryview(chunk)[start : start + PIECE]
                digest.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
            del chunk, piece
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
