"""Downloads from a real server that cuts, refuses and changes; zips that want more than their folder."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from corpus import is_one_line
from web import Web

from onechip import fetch as room
from onechip import hubclient
from onechip.errors import UserError
from onechip.fetch import check_zip, fetch_file, unpack

RAW = np.random.default_rng(0).bytes(3 * room.READ_SIZE + 1234)
HASH = hashlib.sha256(RAW).hexdigest()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(hubclient, "FIRST_PAUSE", 0.0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Download


def test_a_file_comes_once_and_its_hash_is_shown_and_kept(tmp_path, capsys):
    """One request; the second call makes none; NAME.json has the hash."""
    path = tmp_path / "deep" / "eval_bundle.zip"
    with Web(RAW) as web:
        assert fetch_file(web.url, path) == fetch_file(web.url, path) == path and len(web.requests) == 1
    assert path.read_bytes() == RAW
    record = json.loads((path.parent / "eval_bundle.zip.json").read_text())
    assert record == {"url": web.url, "bytes": len(RAW), "sha256": HASH}
    out = capsys.readouterr().out
    assert f"{len(RAW):,} bytes, SHA-256 {HASH}, kept as the right one" in out and out.count("\n") == 2
    assert names(path.parent) == [".eval_bundle.zip.lock", "eval_bundle.zip", "eval_bundle.zip.json"]


def test_a_cut_download_goes_on_where_it_was(tmp_path):
    """Three answers that end early, each resumed by a range of the same version."""
    with Web(RAW) as web:
        web.cuts = [room.READ_SIZE + 7, 11, 500_000]
        fetch_file(web.url, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == RAW
    starts = [headers.get("Range") for _, headers in web.requests]
    begun = (room.READ_SIZE + 7, room.READ_SIZE + 18, room.READ_SIZE + 500_018)
    assert starts == [None, *(f"bytes={start}-" for start in begun)]


def test_another_part_than_was_asked_for_is_not_taken(tmp_path):
    with Web(RAW) as web:
        web.cuts, web.skips = [1000], [5]
        fetch_file(web.url, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == RAW and [status for status, _ in web.requests] == [200, 206, 206]


@pytest.mark.parametrize("fields", [{"ranges": False}, {"tagged": False}], ids=str)
def test_a_server_without_ranges_or_versions_starts_again(tmp_path, fields):
    with Web(RAW, **fields) as web:
        web.cuts = [room.READ_SIZE, 2 * room.READ_SIZE]
        fetch_file(web.url, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == RAW and [status for status, _ in web.requests] == [200] * 3


def test_two_versions_are_not_mixed(tmp_path, monkeypatch):
    """The file changes while it comes: what came of the first is thrown away."""
    monkeypatch.setattr(hubclient, "ATTEMPTS", 1)
    other = RAW[::-1]
    with Web(RAW) as web:
        web.cuts = [1000]
        with pytest.raises(
            UserError, match=f"a.zip: cannot be downloaded after 1 attempts .1,000 of {len(RAW):,}"
        ) as e:
            fetch_file(web.url, tmp_path / "a.zip")
        assert is_one_line(e) and "a.zip" not in names(tmp_path)
        web.content = other
        fetch_file(web.url, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == other and [status for status, _ in web.requests] == [200, 200]


def test_what_is_left_of_a_longer_file_is_thrown_away(tmp_path):
    """416: nothing comes after what is here."""
    with Web(RAW) as web:
        version = '"' + hashlib.md5(RAW).hexdigest() + '"'
        (tmp_path / ".a.zip.partial").write_bytes(RAW + b"more")
        (tmp_path / ".a.zip.version").write_text(version)
        fetch_file(web.url, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == RAW and [status for status, _ in web.requests] == [416, 200]


def test_busy_servers_are_asked_again_and_absent_files_are_not(tmp_path):
    with Web(RAW) as web:
        web.statuses = [503, 429]
        fetch_file(web.url, tmp_path / "a.zip")
        assert [status for status, _ in web.requests] == [503, 429, 200]
        web.requests, web.statuses = [], [404]
        with pytest.raises(UserError, match="HTTP 404 .Not Found.; check the address") as absent:
            fetch_file(web.url, tmp_path / "b.zip")
        assert is_one_line(absent) and len(web.requests) == 1
    with pytest.raises(UserError, match="b.zip: cannot be downloaded after 5 attempts .*; check the network") as e:
        fetch_file(web.url, tmp_path / "b.zip")
    assert is_one_line(e)
    with pytest.raises(UserError, match="is no address of the web"):
        fetch_file("file:///etc/passwd", tmp_path / "c")


def test_another_file_than_the_first_is_refused(tmp_path):
    """Fetched again with other bytes, it is not kept, and the line says what to delete if that is right."""
    path = tmp_path / "a.zip"
    with Web(RAW) as web:
        fetch_file(web.url, path)
        path.unlink()
        web.content = RAW[:-1] + b"x"
        with pytest.raises(UserError, match=f"is not {HASH[:12]}, which is known of .*a.zip.json if it was") as e:
            fetch_file(web.url, path)
        assert is_one_line(e) and names(tmp_path) == [".a.zip.lock", ".a.zip.version", "a.zip.json"]
        web.content = RAW
        fetch_file(web.url, path)
        path.write_bytes(b"changed")  # on this machine
        with pytest.raises(UserError, match="is not"):
            fetch_file(web.url, path)
        assert fetch_file(web.url, path).read_bytes() == RAW


def test_a_pinned_hash_wins(tmp_path):
    """Over what was kept, and without keeping anything."""
    with Web(RAW) as web:
        fetch_file(web.url, tmp_path / "a.zip", HASH)
        assert not (tmp_path / "a.zip.json").exists()
        (tmp_path / "a.zip.json").write_text('{"sha256": "00"}')
        fetch_file(web.url, tmp_path / "a.zip", HASH)
        with pytest.raises(UserError, match="is not 000000000000, which is known of"):
            fetch_file(web.url, tmp_path / "b.zip", "0" * 64)


def test_a_page_in_place_of_the_file_is_not_taken_for_the_first(tmp_path):
    """A network's login page, and a file that was cut without a word, leave no hash behind."""
    whole = make_zip(tmp_path / "right.zip", {"a": b"1" * 900}).read_bytes()
    (tmp_path / "right.zip").unlink()
    with Web(b"<html>log in</html>", sized=False) as web:
        for content in (web.content, whole[:-40]):
            web.content = content
            with pytest.raises(UserError, match="a.zip of http.* is no zip that can be read") as refused:
                fetch_file(web.url, tmp_path / "a.zip", check=check_zip)
            assert is_one_line(refused) and names(tmp_path) == [".a.zip.lock", ".a.zip.version"]
        web.content = whole
        assert fetch_file(web.url, tmp_path / "a.zip", check=check_zip).read_bytes() == whole


@pytest.mark.parametrize("sized", [True, False])
def test_an_endless_file_is_refused(tmp_path, monkeypatch, sized):
    monkeypatch.setattr(room, "MOST_BYTES", 2 * room.READ_SIZE)
    with Web(RAW, sized=sized) as web, pytest.raises(UserError, match="sends more than the 2,097,152 bytes"):
        fetch_file(web.url, tmp_path / "a.zip")
    assert names(tmp_path) == [".a.zip.lock", ".a.zip.version"]


FETCH = "import sys; sys.path.insert(0, {root!r}); from onechip.fetch import fetch_file; fetch_file({url!r}, {path!r})"


def start_fetch(web, path):
    """A process that fetches."""
    code = FETCH.format(root=str(Path(room.__file__).parent.parent), url=web.url, path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_killed_download_is_resumed_and_two_at_once_are_one(tmp_path):
    """A process that is killed in the middle leaves what came; of two that start together one downloads."""
    path, part = tmp_path / "a.zip", tmp_path / ".a.zip.partial"

    with Web(RAW) as web:
        answer, wait = web.answer, []

        def slowly(request):
            status, body = answer(request)
            if not wait:
                wait.append(1)
                request.wfile.write(body[: 2 * room.READ_SIZE])
                request.wfile.flush()
                time.sleep(20)
            return status, body

        web.answer = slowly
        killed = start_fetch(web, path)
        while not part.exists() or part.stat().st_size < room.READ_SIZE:
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        have = part.stat().st_size
        both = [start_fetch(web, path), start_fetch(web, path)]
        assert [process.communicate()[1] for process in both] == [b"", b""]
    assert path.read_bytes() == RAW
    assert [headers.get("Range") for _, headers in web.requests] == [None, f"bytes={have}-"]


# ----------------------------------------------------------------------------------------------------------------------
# Unpacking


def make_zip(path, entries):
    """A zip with {name or ZipInfo: bytes}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def special(name, mode):
    """An entry of another kind: mode is what Unix says of it."""
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def test_a_zip_is_unpacked(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"top.txt": b"1", "in/": b"", "in/deep/er.txt": b"22"})
    unpack(path, tmp_path / "out")
    assert (tmp_path / "out" / "in/deep/er.txt").read_bytes() == b"22" and names(tmp_path / "out") == ["in", "top.txt"]
    assert names(tmp_path) == ["a.zip", "out"]


UNPACK = """
import sys, os, signal, zipfile
sys.path.insert(0, {root!r})
from onechip.fetch import unpack
opened = zipfile.ZipFile.open
def open_or_die(self, info, *args):
    if info.filename == "second":
        os.kill(os.getpid(), signal.SIGKILL)
    return opened(self, info, *args)
zipfile.ZipFile.open = open_or_die
unpack({path!r}, {folder!r})
"""


def test_a_killed_unpacking_leaves_no_half_folder(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"first": b"1", "second": b"2"})
    root, folder = str(Path(room.__file__).parent.parent), tmp_path / "out"
    code = UNPACK.format(root=root, path=str(path), folder=str(folder))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not folder.exists() and len(names(tmp_path)) == 2  # a draft, which has another name
    unpack(path, folder)
    assert names(folder) == ["first", "second"]


LINK, PIPE = 0o120777, 0o010644


@pytest.mark.parametrize(
    "entries, what",
    [
        ({"/etc/x": b""}, "'/etc/x' is a path that leaves its folder"),
        ({"in/../../x": b""}, "is a path that leaves its folder"),
        ({"..\\x": b""}, "is a path that leaves its folder"),
        ({"c:x": b""}, "is a path that leaves its folder"),
        ({special("link", LINK): b"/etc/passwd"}, "'link' is a link or a device"),
        ({special("pipe", PIPE): b""}, "'pipe' is a link or a device"),
        ({"ok": b"1", special("folder/", LINK): b""}, "'folder/' is a link or a device"),
        ({f"f{i}": b"" for i in range(6)}, "6 files are more than the 5"),
        ({"a": b"x" * 600, "b": b"y" * 500}, "1,100 bytes unpacked are more than 1,000"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_a_zip_that_wants_more_is_refused_before_anything_is_written(tmp_path, monkeypatch, entries, what):
    monkeypatch.setattr(room, "MOST_FILES", 5)
    monkeypatch.setattr(room, "MOST_UNPACKED", 1000)
    path = make_zip(tmp_path / "a.zip", entries)
    with pytest.raises(UserError, match="it is not unpacked") as refused:
        unpack(path, tmp_path / "out")
    assert what in str(refused.value) and is_one_line(refused) and names(tmp_path) == ["a.zip"]


def test_a_zip_with_two_files_of_one_name_is_refused(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(UserError, match="two entries have the same name"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def forge_size(path, name, size):
    """Has a zip say that an entry has `size` bytes, in both of its places."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        start = archive.start_dir
    raw[info.header_offset + 22 : info.header_offset + 26] = size.to_bytes(4, "little")
    raw[start + 24 : start + 28] = size.to_bytes(4, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize("said", [10, 5_000_000])
def test_a_zip_that_lies_about_sizes_is_refused(tmp_path, said):
    """A bomb that says that it is small, and a file that says that it is larger than it is."""
    path = make_zip(tmp_path / "a.zip", {"bomb": bytes(3_000_000)})
    forge_size(path, "bomb", said)
    with pytest.raises(UserError) as refused:
        unpack(path, tmp_path / "out")
    assert is_one_line(refused) and names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "absent"])
def test_a_damaged_zip_is_one_line(tmp_path, damage):
    path = make_zip(tmp_path / "a.zip", {"a": RAW[:5000], "b": b"2"})
    raw = path.read_bytes()
    damaged = {"cut": raw[:-30], "flipped": raw[:2000] + bytes([raw[2000] ^ 1]) + raw[2001:], "text": b"<html>"}
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(UserError) as refused:
        unpack(path, tmp_path / "out")
    what = "there is no such file" if damage == "absent" else "is no zip that can be read"
    assert what in str(refused.value) and is_one_line(refused) and "out" not in names(tmp_path)


def test_encrypted_entries_are_refused(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a": b"1"})
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[start + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="'a' is encrypted"):
        unpack(path, tmp_path / "out")
    assert io.BytesIO(path.read_bytes()).read(2) == b"PK"
