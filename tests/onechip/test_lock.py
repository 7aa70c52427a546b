"""onechip/lock.py: one owner of a run at a time, with real processes, kills and a clock that is somebody else's."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from onechip import lock
from onechip.errors import UserError
from onechip.lock import RunLock

HOLD = """
import sys, time
from onechip.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path):
    """A process that holds the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_owner_is_refused_until_the_first_has_ended(tmp_path):
    """One line that says who has the run since when, and what to do; then it is free."""
    first = hold(tmp_path / "owner")
    with pytest.raises(
        UserError, match=rf"process {first.pid} on .*, since \d{{4}}-.* has this run; .*--name"
    ) as caught:
        RunLock(tmp_path / "owner").__enter__()
    assert "\n" not in str(caught.value) and str(tmp_path / "owner") in str(caught.value)
    first.communicate()
    assert not (tmp_path / "owner").exists()
    with RunLock(tmp_path / "owner"):
        assert (tmp_path / "owner").exists()


def test_a_killed_owner_has_nothing(tmp_path):
    """kill -9 leaves the file; the next start takes the run at once, and leaves nothing else behind."""
    first = hold(tmp_path / "owner")
    first.kill()
    first.communicate()
    assert (tmp_path / "owner").exists()
    with RunLock(tmp_path / "owner"):
        assert json.loads((tmp_path / "owner").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_owner_still_has_it(tmp_path):
    """A process that is stopped (Ctrl-Z) may continue any moment."""
    first = hold(tmp_path / "owner")
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="has this run"):
            RunLock(tmp_path / "owner").__enter__()
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate()


def test_a_process_number_given_again_is_another_process(tmp_path):
    """After a reboot some other process may have the owner's number: its start tells them apart."""
    with RunLock(tmp_path / "owner"):
        left = (tmp_path / "owner").read_text()
    (tmp_path / "owner").write_text(json.dumps(json.loads(left) | {"process": "1"}))
    with RunLock(tmp_path / "owner"):
        pass


@pytest.fixture
def quick(monkeypatch):
    """Signs of life twenty times a second."""
    monkeypatch.setattr(lock, "BEAT", 0.05)


@pytest.mark.usefixtures("quick")
def test_an_owner_on_another_machine_is_dead_after_a_minute_of_silence(tmp_path):
    """By the file's own time stamp: no process of that machine can be looked at, and clocks differ."""
    with RunLock(tmp_path / "owner"):
        left = json.loads((tmp_path / "owner").read_text())
    (tmp_path / "owner").write_text(json.dumps(left | {"host": "elsewhere", "token": "theirs"}))
    with pytest.raises(UserError, match="on elsewhere"):
        RunLock(tmp_path / "owner").__enter__()
    long_ago = time.time() - 2 * lock.SILENCE
    os.utime(tmp_path / "owner", (long_ago, long_ago))
    with RunLock(tmp_path / "owner"):
        pass


@pytest.mark.usefixtures("quick")
def test_an_owner_whose_clock_is_behind_lives(tmp_path):
    """Its machine dates the file a day back, as a mounted drive lets it: what counts is that it is touched."""
    path, ended = tmp_path / "owner", threading.Event()
    with RunLock(path):
        left = json.loads(path.read_text())
    path.write_text(json.dumps(left | {"host": "elsewhere", "token": "theirs"}))
    behind = time.time() - 86400

    def beat():
        for i in itertools.count():
            os.utime(path, (behind + i, behind + i))
            if ended.wait(0.02):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="on elsewhere"):
        RunLock(path).__enter__()
    ended.set()
    thread.join()
    with RunLock(path):
        pass


@pytest.mark.usefixtures("quick")
def test_a_lock_that_is_released_meanwhile_is_free(tmp_path, monkeypatch):
    """An owner on another machine that ends while its lock is looked at: no error, and no probe is left."""
    path = tmp_path / "owner"
    with RunLock(path):
        left = json.loads(path.read_text())
    path.write_text(json.dumps(left | {"host": "elsewhere", "token": "theirs"}))
    real = lock.age_of
    monkeypatch.setattr(lock, "age_of", lambda it: (it.unlink(), real(it))[1])
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_lock_that_another_start_has_taken_meanwhile_is_theirs(tmp_path, monkeypatch):
    """Of two starts that find a dead owner, the slower one finds a living one when it looks again."""
    path, first = tmp_path / "owner", hold(tmp_path / "other")
    path.write_text(json.dumps({"host": "elsewhere", "token": "dead"}))

    def age(it):
        os.replace(tmp_path / "other", path)
        return 2 * lock.SILENCE

    monkeypatch.setattr(lock, "age_of", age)
    with pytest.raises(UserError, match=f"process {first.pid} on .* has this run"):
        RunLock(path).__enter__()
    first.communicate()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_starts_one_has_the_lock(tmp_path, monkeypatch, links):
    """Nobody reads half a lock, and takes it for a dead one's: it appears complete, or is waited for."""
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    held, refused = [], []

    def start():
        try:
            held.append(RunLock(tmp_path / "owner").__enter__())
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 15 and all("has this run" in line for line in refused)
    held[0].check()
    held[0].__exit__()
    assert list(tmp_path.iterdir()) == []


def refuse_links(*arguments):
    raise PermissionError("no links here")


def test_drafts_of_killed_starts_are_swept(tmp_path):
    """Those of this lock, by their exact names and after a minute; whatever else looks like one is somebody's."""
    path, hexadecimal = tmp_path / ".owner.json", "0123456789abcdef" * 2
    old = tmp_path / f".owner.json.{hexadecimal}"
    young = tmp_path / f".owner.json.{hexadecimal[::-1]}"
    others = [f".owner.json.{hexadecimal}0", f".owner.json.{hexadecimal[1:]}x", f".other.json.{hexadecimal}", "notes"]
    for file in (old, young, *(tmp_path / name for name in others)):
        file.write_text("")
        if file != young:
            os.utime(file, (1, 1))
    (tmp_path / f".owner.json.{'a' * 32}").mkdir()
    with RunLock(path):
        assert not old.exists() and young.exists()
        assert {path.name, young.name, *others, f".owner.json.{'a' * 32}"} == {it.name for it in tmp_path.iterdir()}


def test_an_owner_keeps_its_file_fresh(tmp_path, monkeypatch):
    """A heartbeat touches the file, which is all that another machine sees."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with RunLock(tmp_path / "owner"):
        os.utime(tmp_path / "owner", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "owner").stat().st_mtime < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "owner").stat().st_mtime > 100


def test_an_owner_learns_that_its_run_was_taken(tmp_path, monkeypatch):
    """take_over asks nobody; the old owner's check fails and its end does not remove the new owner's file."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    old = RunLock(tmp_path / "owner").__enter__()
    new = RunLock(tmp_path / "owner", take_over=True).__enter__()
    with pytest.raises(UserError, match="has taken this run over"):
        old.check()
    deadline = time.monotonic() + 10
    while not old.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert old.lost and not new.lost
    new.check()
    old.__exit__()
    assert (tmp_path / "owner").exists()
    new.__exit__()


def test_an_owner_learns_that_its_run_was_had_in_between(tmp_path, monkeypatch):
    """A stopped process continues after another has taken its run, trained, and ended: that one's files are safe."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "LOOK_AGAIN", 0.3)
    old = RunLock(tmp_path / "run" / "owner").__enter__()
    with RunLock(tmp_path / "run" / "owner", take_over=True):
        pass
    with pytest.raises(UserError, match="/run/owner: is gone: another process has had this run in between"):
        old.check()
    deadline = time.monotonic() + 10
    while not old.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert old.lost
    old.__exit__()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_on_a_disk_that_comes_back_is_not_gone(tmp_path, monkeypatch):
    """Neither while its folder is away, nor while the folder is there and its files are not yet."""
    monkeypatch.setattr(lock, "LOOK_AGAIN", 0.3)
    with RunLock(tmp_path / "run" / "owner") as held:
        (tmp_path / "run").rename(tmp_path / "away")
        held.check()
        (tmp_path / "run").mkdir()
        back = threading.Timer(0.1, lambda: (tmp_path / "away" / "owner").rename(tmp_path / "run" / "owner"))
        back.start()
        held.check()
        back.join()


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_lock_that_cannot_be_read_holds_nothing(tmp_path, content):
    """A machine that died while writing it must not lock a run for ever."""
    (tmp_path / "owner").write_text(content)
    with RunLock(tmp_path / "owner"):
        pass


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "/proc/1/runs/run", f"runs/{'a' * 300}", "here"])
def test_a_folder_that_cannot_be_written_to_is_refused_in_one_line(tmp_path, monkeypatch, place):
    """--out that is a file, or below one or below /proc; a name too long; a working folder that is gone."""
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone" if place == "here" else tmp_path)
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=rf"^{place}: cannot be written to \(.*\); choose another --out$") as caught:
        RunLock(Path(place) / ".owner.json").__enter__()
    assert "\n" not in str(caught.value)


def test_a_lock_that_could_not_be_removed_is_no_owner(tmp_path, monkeypatch):
    """A disk that was away when a kernel's run ended: Run all again in the same kernel finds its own old lock."""
    path = tmp_path / ".owner.json"

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    with RunLock(path):
        with pytest.raises(UserError, match="has this run"), RunLock(path):
            pass
        with monkeypatch.context() as patch, RunLock(tmp_path / "other" / ".owner.json"):
            patch.setattr(Path, "unlink", refuse)
    assert (tmp_path / "other" / ".owner.json").exists() and not path.exists()
    with RunLock(tmp_path / "other" / ".owner.json") as again:
        again.check()


def test_a_check_that_cannot_read_the_lock_ends_nothing(tmp_path, monkeypatch):
    """A disk that is away for one of two looks: the run goes on, and it is not taken for another's."""
    with RunLock(tmp_path / ".owner.json") as held:
        looks = iter([None, {"token": "", "pid": 1}])
        monkeypatch.setattr(held, "_read", lambda: next(looks))
        held.check()
        monkeypatch.undo()
