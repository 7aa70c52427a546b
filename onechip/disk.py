"""A run's disk that fails while training goes on: when it is tried again, what is said, where a state is rescued to.

Google Drive, mounted as a folder, goes away for minutes, has a quota, and comes back.
"""

import contextlib
import hashlib
import os
import shutil
import threading
import time
from pathlib import Path

from onechip.checkpoints import newest_checkpoint
from onechip.errors import first_line, say, say_above_bars
from onechip.files import FullDisk, cannot_write, fsync_path, rename_to_disk, reporting_full_disk
from onechip.machine import home

RETRY = 60.0  # seconds between attempts to write to a disk that fails


class Disk:
    """The disk of one run's folder. Of its failures one line is printed when they begin, and one when all are over."""

    def __init__(self, path):
        self.path = Path(path)
        self._failed, self._lock = {}, threading.Lock()  # what could not be written: when that was

    def attempt(self, what, action, *args, away=lambda error: None):
        """Whether action(*args), which writes `what` to the run's folder, went through; other errors are raised.

        away(its OSError) is called instead where the folder is not there.
        """
        try:
            self._require_folder(away)
            action(*args)
        except (OSError, FullDisk) as error:
            self._report_failure(what, error)
            return False
        self._report_success(what)
        return True

    def _require_folder(self, away):
        try:
            os.stat(self.path)  # nothing may make the folder again: it would be in the way of what is mounted there
        except OSError as error:
            away(error)
            raise

    def fails(self, what):
        """Whether the last attempt to write `what` failed."""
        return what in self._failed

    def waits(self, what):
        """Whether that was so recently that the next attempt has to wait."""
        return time.monotonic() - self._failed.get(what, -RETRY) < RETRY

    def _report_failure(self, what, error):
        with self._lock:
            first, self._failed = not self._failed, {**self._failed, what: time.monotonic()}
        if first:
            reason = "the disk is full" if isinstance(error, FullDisk) else first_line(error)
            place = f"{what} cannot be written to {self.path} ({reason})"
            say_above_bars(f"disk: {place}; training goes on in memory and tries again every minute")

    def _report_success(self, what):
        with self._lock:
            mended = self._failed.pop(what, None) is not None and not self._failed
        if mended:
            say_above_bars(f"disk: {self.path} works again")


def rescue_folder(path):
    """Where the checkpoints of a run at `path` go if they cannot be written there, on this machine's own disk."""
    path = Path(os.path.abspath(path))
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:6]  # runs of one name may lie in several folders
    return home() / "rescued" / f"{path.name}-{digest}" / "checkpoints"


@contextlib.contextmanager
def rescuing(path):
    """Makes the run's folder in the rescue folder; UserError, one line, if a checkpoint cannot be written there."""
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise cannot_write(path, error, "nor could it be to the run's own folder: this step is lost") from None


def bring_back_rescued(run):
    """Moves the newest checkpoint that was rescued from a RunFolder to it, if it is newer than the newest one there."""
    rescued = rescue_folder(run.path)
    newest = newest_checkpoint(rescued)
    if newest is None:
        return
    here = newest_checkpoint(run.checkpoints)
    if here is None or here.name < newest.name:
        part = run.checkpoints / f".{newest.name}.download"
        with reporting_full_disk(run.checkpoints):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(newest, part)
            for copied in [*part.iterdir(), part]:
                fsync_path(copied)
            rename_to_disk(part, run.checkpoints / newest.name)
        say(f"checkpoint: {newest.name} came from {rescued}, where it was while {run.path} could not be written to")
    shutil.rmtree(rescued.parent)  # all of them are on their disk again, or older than what is
