"""Shards that come while they are read: what is fetched when, what stays, and what happens when Hub or disk fail."""

import contextlib
import os
import shutil
import signal
import threading
import time
import types
from pathlib import Path

import pytest
from hub import Fault, connected_hub

from onechip import download, shards
from onechip.errors import UserError
from onechip.hubclient import load_hub
from onechip.loader import PrefetchDataLoader
from onechip.machine import deferred_interrupt
from onechip.shards import HubShards, following

pytestmark = pytest.mark.usefixtures("in_time")

REPO, REVISION, COUNT = "someone/data", "a" * 40, 9
FILES = {f"s{i}.bin": f"shard {i}, ".encode() * (40 + 7 * i) for i in range(COUNT)}


@pytest.fixture
def hub(monkeypatch):
    """A Hub with nine shards; what failed is tried again, and a wait is reported, at once."""
    monkeypatch.setattr(shards, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(shards, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(shards, "SAID_AFTER", 0.2)
    monkeypatch.setattr(load_hub().constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    with connected_hub(monkeypatch) as hub:
        hub.add_repo(REPO, FILES, "dataset", commit=REVISION)
        yield hub


def shards_in(folder, check=lambda path: None):
    return HubShards(REPO, REVISION, list(FILES), folder, check)


def until(condition, seconds=20.0):
    """Waits for what another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def names_in(folder):
    return sorted(path.name for path in folder.glob("s*.bin"))


def lines(capsys, begin="shards:"):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(begin)]


def full(monkeypatch, free, total=100_000):
    """A disk with so many bytes free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=total, free=free, used=0))


# ----------------------------------------------------------------------------------------------------------------------
# What is fetched when


def test_shards_come_a_few_ahead_of_their_reader(hub, tmp_path):
    """From where a reader begins, only so many more; another one with each step; each is the Hub's, byte for byte."""
    data = shards_in(tmp_path)
    data.ahead = 2
    with following(data, 4) as arrivals:
        assert len(arrivals) == len(data) == COUNT and hub.requests == []
        assert arrivals[4].read_bytes() == FILES["s4.bin"]
        until(lambda: len(names_in(tmp_path)) == 3)
        assert arrivals[4] == data.paths[4] and not hub.count("GET", "cdn.*s7")
        assert arrivals[5].read_bytes() == FILES["s5.bin"]
        until(lambda: len(names_in(tmp_path)) == 4)
        threading.Event().wait(0.1)
        assert names_in(tmp_path) == ["s4.bin", "s5.bin", "s6.bin", "s7.bin"]
    assert hub.count("GET", "cdn") == 4 and hub.count("POST", "paths-info") == 1
    assert {path.name: path.read_bytes() for path in data} == FILES  # one by one, and all of them


def test_shards_that_are_here_are_used_without_the_hub(hub, tmp_path):
    """A cache with all of them asks nothing, starts no thread and says nothing."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    with following(shards_in(tmp_path), 0) as arrivals:
        assert [path.read_bytes() for path in map(arrivals.__getitem__, range(COUNT))] == list(FILES.values())
        assert not [thread for thread in threading.enumerate() if thread.name == "shards"]
    assert hub.requests == [] and len(list(shards_in(tmp_path))) == COUNT


def test_a_tuple_of_paths_is_read_as_it_is(tmp_path):
    """What is not of the Hub needs no following."""
    paths = (tmp_path / "a", tmp_path / "b")
    with following(paths, 1) as same:
        assert same is paths


@pytest.mark.parametrize("fault", [{"cut": True}, {"stall": True}, {"short": True}, {"flip": True}, {"status": 500}])
def test_a_shard_has_its_name_only_when_it_is_whole(hub, tmp_path, fault, capsys):
    """Whatever an answer lacks costs a repetition; nobody ever sees a shard of another content."""
    hub.faults = [Fault("GET", "s1", **fault)]
    with following(shards_in(tmp_path), 0) as arrivals:
        assert [arrivals[s].read_bytes() for s in range(3)] == [FILES[f"s{s}.bin"] for s in range(3)]
    assert hub.faults[0].times == 0 and not [line for line in lines(capsys) if "waits" not in line]
    until(lambda: all(path.name.startswith("s") for path in tmp_path.iterdir()))  # no part is left


# ----------------------------------------------------------------------------------------------------------------------
# Failures


def test_a_hub_that_goes_away_is_reported_once_and_waited_for(hub, tmp_path, capsys):
    """Reading goes on with what is here; a line for the failure, one for the wait, one when it is over, and no more."""
    data = shards_in(tmp_path)
    data.ahead = 1
    with following(data, 0) as arrivals:
        assert arrivals[0] and arrivals[1]
        until(lambda: len(names_in(tmp_path)) == 3)
        hub.faults = [Fault(method, "s[3-9]", status=503, times=10**6) for method in ("GET", "HEAD")]
        assert arrivals[2].read_bytes() == FILES["s2.bin"]
        got = []
        reader = threading.Thread(target=lambda: got.append(arrivals[3].read_bytes()))
        reader.start()
        until(lambda: hub.count("HEAD", "s3") > 40)  # several rounds of five attempts each
        assert not got and reader.is_alive()
        hub.faults = []
        reader.join(20)
        assert got == [FILES["s3.bin"]]
        until(lambda: (tmp_path / "s4.bin").exists() and not arrivals._failed)
    said = lines(capsys)
    assert len(said) == 3 and "downloads work again" in said[2]
    (failed,) = (line for line in said if "cannot be downloaded after 5 attempts" in line)
    assert failed.startswith("shards: s3.bin:") or failed.startswith("shards: s4.bin:")
    assert "training goes on" in failed and len([line for line in said if "waits for s3.bin" in line]) == 1


def test_the_first_shard_is_the_start(hub, tmp_path, capsys):
    """Before anything is read, a shard that cannot be had is an error of one line, at once."""
    hub.faults = [Fault(method, "s4", status=503, times=10**6) for method in ("GET", "HEAD")]
    for ask in (lambda: shards_in(tmp_path)[4], lambda: first_of(shards_in(tmp_path), 4)):
        with pytest.raises(UserError, match="s4.bin: cannot be downloaded after 5 attempts") as error:
            ask()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "s4.bin").exists()


def first_of(data, s):
    with following(data, s) as arrivals:
        return arrivals[s]


def test_a_full_disk_is_told_once_and_tried_again(hub, tmp_path, monkeypatch, capsys):
    """A download that the disk has no room for: one line, no part left, and reading goes on when there is room."""
    full, check = threading.Event(), download.check_hash

    def write(part, listed):
        if full.is_set() and part.name != "s1.bin":
            raise OSError(28, "No space left on device")
        check(part, listed)

    monkeypatch.setattr(download, "check_hash", write)
    full.set()
    data = shards_in(tmp_path)
    data.ahead = 3
    with pytest.raises(UserError, match="s0.bin: the disk is full"):
        data[0]
    with following(data, 1) as arrivals:
        assert arrivals[1]
        until(lambda: hub.count("GET", "cdn.*s2") > 5)
        assert names_in(tmp_path) == ["s1.bin"]
        full.clear()
        assert arrivals[2].read_bytes() == FILES["s2.bin"]
        until(lambda: len(names_in(tmp_path)) == 5 and not arrivals._failed)
    said = [line for line in lines(capsys) if "waits" not in line]
    assert len(said) == 2 and "the disk is full" in said[0] and "work again" in said[1]
    assert not list(tmp_path.glob(".*.part"))


# ----------------------------------------------------------------------------------------------------------------------
# Small disks


def test_shards_are_removed_after_use_where_the_disk_is_small(hub, tmp_path, monkeypatch, capsys):
    """Two passes: never more than fit, the one that is read is there, the held-out one and a link are left alone."""
    data, most = shards_in(tmp_path), []
    (tmp_path / "s_held_out.bin").write_bytes(b"held out")
    (tmp_path / "elsewhere").write_bytes(FILES["s6.bin"])
    (tmp_path / "s6.bin").symlink_to(tmp_path / "elsewhere")
    full(monkeypatch, free=20_000 + 4 * 900)  # a fifth of the disk is kept free
    data.plan(900)
    (line,) = lines(capsys, "disk:")
    assert "deleted once it is read, 3 are fetched ahead" in line
    with following(data, 0) as arrivals:
        for s in [*range(COUNT), *range(COUNT)]:
            path = arrivals[s]
            assert path.read_bytes() == FILES[f"s{s}.bin"]
            until(data.paths[(s + 1) % COUNT].exists)
            most.append(len([name for name in names_in(tmp_path) if name not in ("s6.bin", "s_held_out.bin")]))
    assert max(most) <= 4 and (tmp_path / "s_held_out.bin").exists() and (tmp_path / "s6.bin").is_symlink()


def test_shards_stay_where_there_is_room(hub, tmp_path, monkeypatch, capsys):
    """Where all that is missing fits, nothing is deleted; the reserve is 20 GB or a fifth; a full cache is silent."""
    data = shards_in(tmp_path)
    full(monkeypatch, free=20_000 + COUNT * 900)
    data.plan(900)
    assert "they are kept" in lines(capsys, "disk:")[0] and not data.removes
    full(monkeypatch, free=20_000 + COUNT * 900 - 1)
    data.plan(900)
    assert data.removes
    full(monkeypatch, free=20e9 + COUNT * 900, total=1e12)
    other = shards_in(tmp_path)
    other.plan(900)
    assert not other.removes
    with following(other, 0) as arrivals:
        assert [arrivals[s].name for s in range(COUNT)] == names_in(tmp_path)
    capsys.readouterr()
    full(monkeypatch, free=0)
    other.plan(900)
    assert lines(capsys, "disk:") == []


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_without_any_room_still_trains(hub, tmp_path, monkeypatch):
    """One shard ahead at the least."""
    data = shards_in(tmp_path)
    full(monkeypatch, free=5)
    data.plan(900)
    with following(data, 7) as arrivals:
        for s in (7, 8, 0, 1):
            assert arrivals[s].read_bytes() == FILES[f"s{s}.bin"]
            assert len(names_in(tmp_path)) <= 2


def test_what_a_killed_process_left_is_removed(hub, tmp_path):
    """An old part of a download goes before the next download; one that is being written stays."""
    old, young = tmp_path / ".s3.bin.aaaa_old.part", tmp_path / ".s3.bin.aa_young.part"
    for folder in (old, young):
        folder.mkdir()
        (folder / "s3.bin").write_bytes(b"half")
    for path in (old / "s3.bin", old):
        os.utime(path, (1, 1))
    assert shards_in(tmp_path)[0]
    assert not old.exists() and young.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Ends


def read_all(data, first):
    """(path's name, state) of each shard from the first on, as a loader's batches."""
    with following(data, first) as arrivals:
        for s in range(first, len(arrivals)):
            yield arrivals[s].name, s


@contextlib.contextmanager
def waiting_loader(hub, folder):
    """A loader whose thread waits for a shard that does not come."""
    hub.faults = [Fault("GET", "cdn.*s2", stall=True, times=10**6)]
    loader = PrefetchDataLoader(read_all(shards_in(folder), 0))
    assert [next(loader) for _ in range(2)] == [("s0.bin", 0), ("s1.bin", 1)]
    until(lambda: hub.count("GET", "cdn.*s2"))
    began = time.monotonic()
    try:
        yield loader
    finally:
        loader.close()
    assert time.monotonic() - began < 5
    until(lambda: not [thread for thread in threading.enumerate() if thread.name in ("shards", "loader")])


def test_closing_the_loader_ends_a_wait_and_the_threads(hub, tmp_path):
    """Within a second or two, although the Hub never answers; a download under way ends with its attempt."""
    with waiting_loader(hub, tmp_path):
        pass


def test_an_interrupt_ends_a_wait(hub, tmp_path, interruptible):
    """Ctrl-C while the next batch does not come is a KeyboardInterrupt there, so that a run can save and end."""
    with waiting_loader(hub, tmp_path) as loader, deferred_interrupt() as noted:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        assert noted.requested and not noted.insisted


def test_a_batch_that_is_ready_is_not_lost_to_an_interrupt():
    """An interrupt is raised only where there is nothing to hand out."""
    with PrefetchDataLoader(iter([(1, 2)])) as loader, deferred_interrupt() as noted:
        until(lambda: not loader._ready.empty())
        noted.requested = True
        assert next(loader) == (1, 2)


def test_paths_are_known_before_anything_is_here(tmp_path):
    """`paths` waits for none, whoever asks for names or a folder."""
    data = shards_in(tmp_path / "nowhere")
    assert shards.local_paths(data)[3] == tmp_path / "nowhere" / "s3.bin"
    assert shards.local_paths((Path("a"),)) == (Path("a"),)
