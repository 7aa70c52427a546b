"""onechip/files.py: files that are written completely or not at all, and JSON of somebody else's."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from onechip import files
from onechip.errors import UserError
from onechip.files import (
    age_of,
    atomic_write,
    clear_abandoned,
    create_whole,
    hash_file,
    read_json,
    read_json_lines,
    read_json_or_none,
    require_writable,
    write_hashed,
    write_json,
    write_text,
)

# ----------------------------------------------------------------------------------------------------------------------
# Written completely or not at all


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_atomic_write_replaces_a_file_and_leaves_nothing_else(tmp_path):
    """A file is written into a folder that may not be there yet, replaces the old one, and is alone afterwards."""
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with atomic_write(path) as part:
            assert part.parent.parent == path.parent, "a rename is atomic only within one file system"
            part.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert listing(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_atomic_write_keeps_the_old_file_when_the_writer_fails(tmp_path, error):
    """Whatever is raised in the middle of writing passes through; the old content stays, and nothing else."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught:
        with atomic_write(path) as part:
            part.write_text("half")
            raise error
    assert caught.value is error
    assert path.read_text() == "old" and listing(tmp_path) == ["file.txt"]


def test_atomic_write_of_a_folder_is_all_or_nothing(tmp_path):
    """A folder appears under its name with all its files, or not at all and without a trace."""
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError):
        with atomic_write(path) as part:
            part.mkdir()
            (part / "a").write_text("1")
            raise RuntimeError
    assert listing(tmp_path) == []
    with atomic_write(path) as part:
        part.mkdir()
        (part / "a").write_text("1")
        (part / "deeper").mkdir()
        (part / "deeper" / "b").write_text("2")
        assert not path.exists()
    assert listing(tmp_path) == ["folder", "folder/a", "folder/deeper", "folder/deeper/b"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_in_one_line(tmp_path, number):
    """A full disk or quota is a UserError of one line with the path; the old file stays whole."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UserError, match="disk is full") as caught:
        with atomic_write(path) as part:
            part.write_text("half")
            raise OSError(number, os.strerror(number))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == "old" and listing(tmp_path) == ["file.txt"]


def test_a_disk_that_fills_up_at_the_fsync_is_reported_in_one_line(tmp_path, monkeypatch):
    """Delayed allocation reports a full disk at fsync, after the last write: that is cleaned up as well."""

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        with atomic_write(tmp_path / "file.txt") as part:
            part.write_text("whole")
    assert listing(tmp_path) == []


def test_a_disk_without_room_for_a_name_is_reported_in_one_line(tmp_path, monkeypatch):
    """No inode is left: the folder of the draft cannot be made."""

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(UserError, match=r"file.txt: the disk is full"):
        with atomic_write(tmp_path / "file.txt") as part:
            part.write_text("whole")
    assert listing(tmp_path) == []


def test_a_folder_that_takes_nothing_is_refused_in_one_line(tmp_path):
    """A file in its place, a file above it, a system's folder: the reason and a way out. Elsewhere nothing is left."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/onechip")):
        with pytest.raises(UserError, match=rf"^{folder}: cannot be written to \(.*\); choose another$") as caught:
            require_writable(folder, "choose another")
        assert "\n" not in str(caught.value)
    require_writable(tmp_path / "a" / "b", "choose another")
    assert listing(tmp_path) == ["a", "a/b", "file"]


def record_disk_calls(monkeypatch):
    """The order of fsyncs and renames, as ("fsync", inode) and ("rename", inode of what is renamed)."""
    calls, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(fd):
        calls.append(("fsync", os.fstat(fd).st_ino))
        real_fsync(fd)

    def replace(source, target):
        calls.append(("rename", os.stat(source).st_ino))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return calls


def test_atomic_write_forces_a_file_to_disk_before_its_name(tmp_path, monkeypatch):
    """After a power cut a name must never belong to an empty file: fsync the file, rename, fsync the folder."""
    calls = record_disk_calls(monkeypatch)
    with atomic_write(tmp_path / "file.txt") as part:
        part.write_text("text")
    file, folder = os.stat(tmp_path / "file.txt").st_ino, os.stat(tmp_path).st_ino
    assert calls == [("fsync", file), ("rename", file), ("fsync", folder)]


def test_atomic_write_forces_a_folder_and_its_entries_to_disk_before_its_name(tmp_path, monkeypatch):
    """A folder's list of names is data of its own: it and all below it are fsynced before the rename."""
    calls = record_disk_calls(monkeypatch)
    path = tmp_path / "folder"
    with atomic_write(path) as part:
        (part / "deeper").mkdir(parents=True)
        (part / "a").write_text("1")
        (part / "deeper" / "b").write_text("2")
    inode = lambda place: os.stat(place).st_ino
    rename = calls.index(("rename", inode(path)))
    synced = {number for kind, number in calls[:rename] if kind == "fsync"}
    for name in ("a", "deeper/b", "deeper", "."):
        assert inode(path / name) in synced, f"{name} is not on disk when the folder gets its name"
    assert calls[-1] == ("fsync", inode(tmp_path)) and rename == len(calls) - 2


def test_json_is_written_as_a_whole_and_read_back(tmp_path):
    """Indented by two, with a line break at its end, so that a person can read and compare it."""
    path, value = tmp_path / "new" / "a.json", {"b": [1, None], "a": "naïve"}
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert read_json(path) == {"old": 1}
    write_json(path, value)
    assert path.read_text() == json.dumps(value, indent=2) + "\n" and read_json(path) == value
    assert listing(tmp_path) == ["new", "new/a.json"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    """As a whole, and the same bytes on every machine."""
    for text in ("first", "naïve 数据\n"):
        write_text(tmp_path / "a.md", text)
        assert (tmp_path / "a.md").read_bytes() == text.encode()
    assert listing(tmp_path) == ["a.md"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_created_once(tmp_path, monkeypatch, links):
    """By the first of its creators and by no other, with hard links or without, as on Google Drive."""

    def refuse(*arguments):
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    assert create_whole(tmp_path / "a", "1") and not create_whole(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "1" and listing(tmp_path) == ["a"]


KILLED = """
import os, sys
from onechip import files
with files.atomic_write(files.Path(sys.argv[1]) / "loss.png") as part:
    part.write_text("half")
    files.draft_path(files.Path(sys.argv[1]) / "lease").touch()
    os._exit(9)
"""


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    """After an hour: a write that is under way is younger, by whatever part of it. A person's files stay."""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    drafts, before = [path for path in tmp_path.iterdir() if path.is_dir()], listing(tmp_path)
    clear_abandoned(tmp_path)
    assert len(drafts) == 2 and listing(tmp_path) == before
    for name in (".notes.part", ".loss.png.12345678", ".a.0123456789", "loss.png"):
        (tmp_path / name).touch()
    (tmp_path / ".mine.abcdefgh.part").mkdir()
    (tmp_path / ".mine.abcdefgh.part" / "notes.txt").touch()
    (tmp_path / ".link.abcdefgh.part").symlink_to(tmp_path / ".mine.abcdefgh.part")
    theirs = set(listing(tmp_path)) - set(before)
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        os.utime(path, (1, 1), follow_symlinks=False)
    os.utime(drafts[0] / "loss.png")
    clear_abandoned(tmp_path)
    assert set(listing(tmp_path)) == theirs | {drafts[0].name, f"{drafts[0].name}/loss.png"}


def test_a_files_age_is_by_its_file_systems_clock(tmp_path):
    """Whatever this machine's clock says; a file that is gone is older than any; no probe is left."""
    (tmp_path / "a").touch()
    assert -1 < age_of(tmp_path / "a") < 60
    os.utime(tmp_path / "a", (1, 1))
    assert age_of(tmp_path / "a") > 1e9 and age_of(tmp_path / "b") == float("inf")
    assert listing(tmp_path) == ["a"]


# ----------------------------------------------------------------------------------------------------------------------
# JSON that somebody else may have written

BAD_JSON = {
    "no file": (None, "cannot be read (No such file or directory)"),
    "empty": (b"", "is not JSON (Expecting value"),
    "cut": (b'{"a": 1, "b"', "is not JSON"),
    "binary": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "a list": (b"[1]", "not an object"),
    "a word": (b'"text"', "not an object"),
    "nested": (b"[" * 200_000, "nested too deep"),
    "nested objects": (b'{"a":' * 200_000, "nested too deep"),
    "a long number": (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_refused_in_one_line_with_the_files_name(tmp_path, kind):
    """Whatever is in a file, a reader of JSON gives an object or one line that names the file and what is wrong."""
    raw, problem = BAD_JSON[kind]
    path = tmp_path / "config.json"
    if raw is not None:
        path.write_bytes(raw)
    for read in (read_json, read_json_lines):
        if kind == "empty" and read is read_json_lines:
            assert read(path) == []
            continue
        with pytest.raises(UserError) as raised:
            read(path)
        message = str(raised.value)
        assert message.startswith(str(path)) and problem in message and "\n" not in message
        assert len(message) < len(str(path)) + 300
    assert read_json_or_none(path) is None


def test_a_folder_or_a_huge_file_is_not_read_as_json(tmp_path):
    """A limit of 16 MiB: a file of settings has some kilobytes."""
    with pytest.raises(UserError, match="Is a directory"):
        read_json(tmp_path)
    path = tmp_path / "huge.json"
    path.write_bytes(b'{"a": "' + b"x" * (1 << 24) + b'"}')
    with pytest.raises(UserError, match="more than 16,777,216 bytes"):
        read_json(path)


def test_a_line_that_is_torn_is_named(tmp_path):
    """One object a line; the line's number is in the message."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: is not JSON"):
        read_json_lines(path)


@pytest.mark.parametrize(
    ("text", "rows"), [("", 0), ('{"st', 0), ('{"step": 1}', 0), ('{"step": 1}\n', 1), ('{"step": 1}\n{', 1)]
)
def test_a_line_that_is_being_written_is_not_there_yet(tmp_path, text, rows):
    """A reader of a growing file gets the lines that are whole; damage before the last line is still named."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert read_json_lines(path, growing=True) == [{"step": 1}] * rows
    path.write_text("{\n" + text)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: is not JSON"):
        read_json_lines(path, growing=True)


# ----------------------------------------------------------------------------------------------------------------------
# Hashes


def test_a_file_is_hashed_as_its_bytes_are(tmp_path):
    """SHA-256 of the whole file, hex, whatever its size."""
    for raw in (b"", b"x" * 300_000):
        (tmp_path / "file").write_bytes(raw)
        assert hash_file(tmp_path / "file") == hashlib.sha256(raw).hexdigest()


def test_what_is_written_is_hashed_on_the_way(tmp_path, monkeypatch):
    """Chunks of any size, empty ones too, are the file; size and SHA-256 are those of the file read again."""
    monkeypatch.setattr(files, "PIECE", 1000)
    chunks = [b"", b"head", memoryview(b"x" * 2500), memoryview(bytes(range(250)) * 8), b""]
    entry = write_hashed(tmp_path / "file", iter(chunks))
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)
    assert entry == {"bytes": 4504, "sha256": hash_file(tmp_path / "file")}
    assert write_hashed(tmp_path / "none", [])["bytes"] == 0
