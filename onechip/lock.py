"""One owner of a run at a time, also on a shared disk, and also after a kill."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from onechip.errors import UserError, say
from onechip.files import age_of, cannot_write, create_whole, is_draft, read_json_or_none, write_text
from onechip.hosts import agree, is_first

BEAT = 10.0  # seconds between signs of life
HELD = set()  # tokens of the locks that this process holds; one that it could not remove from a disk is not among them
LOOK_AGAIN = 1.0  # seconds until a lock that is not there is taken for gone
SILENCE = 60.0  # seconds without one after which an owner on another machine is taken for dead


def process_start(pid):
    """When a process was started, as the kernel counts; None if there is no such process, "" if that is unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # not ours to signal: it is there
        pass
    try:  # /proc only on Linux; the command's name, in parentheses, may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class RunLock:
    """A context manager that holds a run's folder; UserError, one line, if a living process has it.

    The lock is a file that says who has the run since when. An owner on this machine is dead if its process is gone;
    on another one, if its file has not been touched for a minute by the file system's own clock, and stays so while it
    is watched, as that clock may be the other machine's. take_over: take the run from a living owner, whose next
    `check` fails. `lost`: whether a heartbeat found that this has happened. Of
    several hosts, host 0 holds the lock; the others look whether they see it, and with it the same folder.
    """

    def __init__(self, path, take_over=False):
        self._path, self._take_over = Path(path), take_over
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._me = {**me, "process": process_start(os.getpid()), "token": uuid.uuid4().hex}
        self.lost, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self):
        if is_first():
            self._hold()
        token = agree(self._me["token"])
        if not is_first():
            self._find(token)
        return self

    def _find(self, token):
        """Waits until host 0's lock is seen, as a shared disk may take a while; UserError if it is not."""
        end = time.monotonic() + SILENCE
        while (self._read() or {}).get("token") != token:
            if time.monotonic() > end:
                raise UserError(f"{self._path} of host 0 is not seen here: all hosts need one shared --out")
            time.sleep(0.2)

    def _hold(self):
        folder = self._path.parent
        HELD.add(self._me["token"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim()
        except BaseException as error:
            HELD.discard(self._me["token"])
            if not isinstance(error, OSError):
                raise
            raise cannot_write(folder, error, "choose another --out") from None
        self._thread.start()

    def __exit__(self, *exception):
        if not is_first():
            return
        self._ended.set()
        self._thread.join()
        HELD.discard(self._me["token"])
        if self._is_mine():
            with contextlib.suppress(OSError):  # a disk that is away: the lock expires there
                self._path.unlink(missing_ok=True)

    def check(self):
        """Raises UserError if another process has taken the run over, or had it; no look at the disk says nothing."""
        owner = (self._read() if is_first() else None) or self._me
        if owner.get("token") != self._me["token"]:
            raise UserError(f"{self._path.parent}: {self._describe(owner)} has taken this run over; it ends here")
        if is_first() and self._is_gone():
            raise UserError(f"{self._path}: is gone: another process has had this run in between; it ends here")

    def _claim(self):
        while not create_whole(self._path, json.dumps(self._me) + "\n"):
            owner = self._read_settled()
            if owner is not None and not self._take_over and self._lives(owner):
                remedy = f"wait for it, end it, choose another --name, or set --take_over true (see {self._path})"
                raise UserError(f"{self._path.parent}: {self._describe(owner)} has this run; {remedy}")
            if self._path.exists() and self._read() == owner:  # else it was released, or taken by another, just now
                self._replace()
                break
        self._sweep()

    def _replace(self):
        """Takes a dead owner's lock; if two do so at once, the last one has it and the other is refused."""
        write_text(self._path, json.dumps(self._me) + "\n")
        time.sleep(0.2)
        self.check()

    def _sweep(self):
        """Deletes the drafts that killed processes have left next to the lock."""
        for path in self._path.parent.iterdir():
            if is_draft(path, self._path) and path.is_file() and not path.is_symlink() and age_of(path) > SILENCE:
                path.unlink(missing_ok=True)

    def _read(self):
        """The owner as a dict, or None if there is no lock that can be read."""
        return read_json_or_none(self._path)

    def _read_settled(self):
        """As _read; without hard links another process may be writing its lock at this moment."""
        owner = self._read()
        if owner is None:
            time.sleep(0.2)
            owner = self._read()
        return owner

    def _is_gone(self):
        """Whether the lock is not there although its folder is: who took the run from a stopped process has ended."""
        for pause in (LOOK_AGAIN, 0.0):  # twice, as a shared disk may come back piece by piece
            try:
                if os.path.lexists(self._path) or not self._path.parent.is_dir():
                    return False
            except OSError:
                return False
            time.sleep(pause)
        return True

    def _is_mine(self):
        return (self._read() or {}).get("token") == self._me["token"]

    def _lives(self, owner):
        if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int):
            started = process_start(owner["pid"])
            if owner["pid"] == os.getpid() and started == owner.get("process"):
                return owner.get("token") in HELD
            return started is not None and started in ("", owner.get("process"))
        if age_of(self._path) < SILENCE:
            return True
        say(f"lock: {self._describe(owner)} is silent; looking for {1.5 * BEAT:.0f} s whether it has ended")
        return self._is_touched()

    def _is_touched(self):
        """Whether the file changes while a sign of life is waited for: of an owner whose clock is behind."""
        before, end = self._stamp(), time.monotonic() + 1.5 * BEAT
        while before is not None and time.monotonic() < end:
            if (now := self._stamp()) != before:
                return now is not None
            time.sleep(BEAT / 20)
        return False

    def _stamp(self):
        """When the file was touched last, ns by whatever clock; None if it is gone."""
        with contextlib.suppress(OSError):
            return self._path.stat().st_mtime_ns
        return None

    def _describe(self, owner):
        return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')},"

    def _beat(self):
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a shared disk that is away for a moment
                os.utime(self._path)
            self.lost = (self._read() or self._me).get("token") != self._me["token"] or self._is_gone()
