"""Files: whole or not at all."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from onechip.errors import UserError


def fsync_path(path):
    """Forces a file's or folder's content to disk, so that a rename after it cannot outlive it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_full(error):
    """Whether an error says that the disk, or one's share of it, is full; safetensors says it in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


@contextlib.contextmanager
def telling_full_disk(path):
    """Raises UserError, naming `path`, for whatever error says that the disk is full."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"{path}: the disk is full; free some space and run again, nothing half-written is left"
        ) from None


@contextlib.contextmanager
def atomic_write(path):
    """Yields a path beside `path` to write a file or folder to; renames it to `path` on success, removes it on failure.

    A reader sees the old file or the new one, never a part, whatever moment the machine dies at. A full disk raises
    UserError and leaves nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)) / path.name
    try:
        with telling_full_disk(path):
            yield beside
            for written in [*beside.rglob("*"), beside]:  # a folder's entries need their own sync
                fsync_path(written)
            os.replace(beside, path)
            fsync_path(path.parent)
    finally:
        shutil.rmtree(beside.parent, ignore_errors=True)


def hash_file(path):
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source, target):
    """A hard link, or a copy where the file system has none, Google Drive's for one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def removing_on_error(folder):
    """Removes a folder that could not be completed: on a full disk, its space is what the next attempt needs."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
