"""A file from a URL: resumed, its hash kept and compared ever after. And a zip, unpacked into its own folder only."""

import contextlib
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from onechip.errors import UserError, first_line, say
from onechip.files import (
    atomic_write,
    fsync_path,
    hash_file,
    read_json_or_none,
    rename_to_disk,
    reporting_full_disk,
    write_json,
    write_text,
)
from onechip.hubclient import STALL, try_again

READ_SIZE = 1 << 20  # bytes read at a time
MOST_BYTES = 1 << 30  # of a download
MOST_FILES, MOST_UNPACKED = 1000, 1 << 32  # files in a zip, and their bytes together


# ----------------------------------------------------------------------------------------------------------------------
# Download


@contextlib.contextmanager
def one_at_a_time(path):
    """Waits until no other process is here with this file, which is created if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def request_rest(url, have, version):
    """An answer with what comes after `have` bytes of a file, or with all of it if that version of it is gone.

    UserError for what another attempt cannot change.
    """
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have and version else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL)
    except urllib.error.HTTPError as error:
        if 400 <= error.code < 500 and error.code not in (408, 416, 429):
            raise UserError(f"{url}: HTTP {error.code} ({error.reason}); check the address") from None
        raise


def entity_tag(answer):
    """What tells a file's versions apart, as an If-Range header takes it; "" if the server does not say."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def is_continued(answer, have):
    """Whether an answer goes on after `have` bytes; if not, it has all. OSError if it is another part of the file."""
    if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise OSError("the server sent another part than was asked for")
    return answer.status == 206


def download_rest(url, part, note):
    """Appends to `part` what it lacks, or starts it again where the server gives no ranges or has another version.

    note: a file that keeps the version, so that no two are mixed. OSError if less came than was announced.
    """
    have = part.stat().st_size if part.exists() else 0
    try:
        answer = request_rest(url, have, note.read_text() if note.exists() else "")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing comes after what is here: it is of another file
            part.unlink()
        raise
    with answer, open(part, "ab" if is_continued(answer, have) else "wb") as file:
        have = file.tell()
        write_text(note, entity_tag(answer))
        size = answer.headers.get("Content-Length", "")
        announced = have + int(size) if size.isdigit() else None
        while have <= MOST_BYTES and (piece := answer.read(READ_SIZE)):
            file.write(piece)
            have += len(piece)
    if have > MOST_BYTES:
        part.unlink()
        raise UserError(f"{url}: sends more than the {MOST_BYTES:,} bytes that are taken; check the address")
    if announced not in (None, have):
        raise OSError(f"{have:,} of {announced:,} bytes came")


def check_known_hash(arrived, path, url, pinned):
    """UserError, and the file `arrived` deleted, unless its hash is the one that `path` is known by.

    The first one's is kept in NAME.json, and shown.
    """
    found, record = hash_file(arrived), path.with_name(f"{path.name}.json")
    known = pinned or (read_json_or_none(record) or {}).get("sha256")
    if not known:
        size = arrived.stat().st_size
        write_json(record, {"url": url, "bytes": size, "sha256": found})
        say(f"{path.name}: {size:,} bytes, SHA-256 {found}, kept as the right one ({record})")
    elif found != known:
        arrived.unlink()
        remedy = "run again" if pinned else f"run again, or delete {record} if it was changed on purpose"
        raise UserError(f"{path.name}: SHA-256 {found[:12]} is not {known[:12]}, which is known of {url}; {remedy}")


def fetch_file(url, path, pinned=None, check=lambda path: None):
    """Downloads a URL to `path` unless the file is there, and checks its hash either way; returns the path.

    A download that was cut goes on where it was. pinned: its SHA-256, hex; without one the first download's is kept
    next to the file, in NAME.json, and compared with every later one. check(path) raises UserError for a file of the
    wrong kind, such as the page of a network that wants a login: its hash is not kept.
    """
    path = Path(path)
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: is no address of the web; use one that begins with https://")
    part, note = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.version")
    with one_at_a_time(path.with_name(f".{path.name}.lock")), reporting_full_disk(path):
        if path.exists():
            check_known_hash(path, path, url, pinned)
            return path
        say(f"{path.name}: downloading {url}")

        def attempt():
            try:
                download_rest(url, part, note)
            except (HTTPException, urllib.error.URLError) as error:
                raise OSError(first_line(error)) from None

        try_again(attempt, f"{path.name}: cannot be downloaded")
        try:
            check(part)
        except UserError as error:
            part.unlink()
            raise UserError(str(error).replace(str(part), f"{path.name} of {url}")) from None
        check_known_hash(part, path, url, pinned)
        fsync_path(part)
        rename_to_disk(part, path)
        note.unlink(missing_ok=True)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Unpacking


def check_entry(info):
    """Why a zip's entry is not unpacked, in a few words; None if nothing is wrong with it."""
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0"):
        return "a path that leaves its folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device, not a file"
    return "encrypted" if info.flag_bits & 1 else None


def list_entries(archive):
    """The files of an open zip, checked before any is written: names, kinds, number, declared sizes. UserError."""
    files = [info for info in archive.infolist() if not info.is_dir()]
    for info in archive.infolist():
        if reason := check_entry(info):
            raise UserError(f"entry {info.filename[:80]!r} is {reason}")
    if len(files) > MOST_FILES:
        raise UserError(f"{len(files):,} files are more than the {MOST_FILES:,} that are unpacked")
    if len({info.filename for info in files}) < len(files):
        raise UserError("two entries have the same name")
    if (total := sum(info.file_size for info in files)) > MOST_UNPACKED:
        raise UserError(f"{total:,} bytes unpacked are more than {MOST_UNPACKED:,}")
    return files


def unpack_entries(archive, folder):
    """Writes a zip's files to a folder. zipfile gives no more of a file than its declared size; less is refused."""
    for info in list_entries(archive):
        target = folder / info.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, open(target, "xb") as file:
            while (piece := source.read(READ_SIZE)) and file.tell() + len(piece) <= info.file_size:
                file.write(piece)
            if piece or file.tell() < info.file_size:
                raise UserError(f"entry {info.filename[:80]!r} has another size than it says")


@contextlib.contextmanager
def opened_zip(path):
    """An open zip; UserError, one line, for whatever is wrong with it, now or while it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError as error:
        raise UserError(f"{path}: {error}; it is not unpacked") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: is no zip that can be read ({first_line(error)}); fetch it again") from None


def check_zip(path):
    """UserError unless a file is a zip whose list of files can be read and is one that `unpack` takes."""
    with opened_zip(path) as archive:
        list_entries(archive)


def unpack(path, folder):
    """Unpacks a zip to a new folder, completely or not at all. UserError, one line, for a zip that is damaged or does
    more than put files into its folder."""
    with atomic_write(folder) as draft, opened_zip(path) as archive:
        draft.mkdir()
        unpack_entries(archive, draft)
