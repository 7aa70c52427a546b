"""Checkpoints written in a thread next to training, through a buffer of bounded size."""

import contextlib
import shutil
import threading
from pathlib import Path

from onechip.checkpoints import arrays_in, write_checkpoint
from onechip.disk import Disk
from onechip.runfolder import checkpoint_name, find_checkpoints
from onechip.statefile import BUFFER, Abandoned, HostBuffer
from onechip.together import ALONE, is_written, sit_out
from onechip.weights import bytes_of

CHECKPOINTS = "checkpoints"  # what Disk calls them
DISK_SPEED = 250e6  # bytes/s that are hashed and written, to be expected of a cloud machine's disk
COPY_SPEED = 2e9  # bytes/s from a device to the host
LONG_PAUSE = 5.0  # seconds that training waits for a checkpoint, from which on it is said


def pause_seconds(size, disk_speed=DISK_SPEED):
    """Seconds for which training stands still while a state of `size` bytes leaves the device for a disk, bytes/s.

    What fits the buffer is copied; the rest waits for the disk.
    """
    return max(size / COPY_SPEED, (size - BUFFER) / disk_speed)


def write_apart(path, files, disk):
    """Writes files, as CheckpointWriter.save takes them, in this thread, unless they are there; `disk` is path's."""
    if files is None:  # another host writes all of it
        return
    hosts = getattr(files, "hosts", ALONE)

    def write():
        if hosts.count > 1 or not is_written(path):
            write_checkpoint(path, files)

    disk.attempt(path.name, write, away=lambda error: sit_out(path, hosts, error))


def describe_pause(seconds, step, state):
    """A line about a long pause for the checkpoint of a state, a pytree of arrays."""
    return f"checkpoint: training waits {seconds:.0f} s for each, as for step {step:,}: {bytes_of(state) / 1e9:.1f} GB"


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread, and keeps the last `keep` and the best.

    `save` waits for the write before it, and returns when the thread needs the arrays no more. A disk that fails is
    reported, and `failed` until a checkpoint is written; any other error in the thread is raised by the next `save`,
    `check` or `wait`. `after(path)` is called in the thread when a checkpoint is in place; old ones are removed unless
    they are among those of held(), paths.
    """

    def __init__(self, folder, keep=2, after=None, held=frozenset, disk=None):
        self._folder, self._keep, self._after, self._held = Path(folder), keep, after, held
        self._disk = disk or Disk(self._folder.parent)
        self._thread, self._error = None, None

    @property
    def failed(self):
        """Whether the disk refused the last checkpoint."""
        return self._disk.fails(CHECKPOINTS)

    def save(self, step, files, best=None):
        """Hands over step_NNNNNNNN, unless it exists; `best` is the step whose checkpoint must be kept.

        files: as pack_state gives them, or what parts.share makes of that on each host, all at the same step; their
        arrays may be donated when this returns.
        """
        self.wait()
        if files is None:  # another host writes all of it
            return
        path, buffer = self._folder / checkpoint_name(step), HostBuffer()
        self._thread = threading.Thread(target=self._work, args=(path, files, best, buffer), name="checkpoint")
        self._thread.start()
        try:
            buffer.fill(arrays_in(files))
        except BaseException:  # interrupted: the thread removes what it has written
            buffer.end()
            self._thread.join()
            raise

    def _work(self, path, files, best, buffer):
        try:
            hosts = getattr(files, "hosts", ALONE)
            task = CHECKPOINTS, self._write, path, files, best, buffer, hosts
            self._disk.attempt(*task, away=lambda error: sit_out(path, hosts, error))
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            buffer.end()

    def _write(self, path, files, best, buffer, hosts):
        if hosts.count == 1 and is_written(path):  # of several hosts, the first one looks
            return
        write_checkpoint(path, files, buffer.take)
        if hosts.index > 0:  # host 0 clears and uploads
            return
        with contextlib.suppress(OSError):  # the next checkpoint clears what is left
            self._clear(best)
        if self._after:
            self._after(path)

    def _clear(self, best):
        ours = {step: path for step, path in find_checkpoints(self._folder).items() if not path.is_symlink()}
        held = self._held()
        for step in sorted(ours)[: -self._keep]:
            if step != best and ours[step] not in held:
                shutil.rmtree(ours[step])

    def check(self):
        """Raises what went wrong in the thread, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self):
        """Waits for the write in progress, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
