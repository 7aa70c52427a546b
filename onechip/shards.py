"""Shards of a dataset on the Hub: fetched as their reader comes near them, and removed after use if need be."""

import collections.abc
import concurrent.futures
import contextlib
import shutil
import threading
import time
from pathlib import Path

from onechip.download import download_file, look_up_files
from onechip.errors import UserError, say
from onechip.files import clear_abandoned, is_full
from onechip.hubclient import chain, describe_error, status_of, without_bars
from onechip.loader import is_closing
from onechip.runlog import progress_bar, say_above_bars

AT_ONCE = 8  # downloads before training
AT_ONCE_BEHIND = 4  # and while it runs: hashing and writing take cores from the loader
AHEAD = 8  # shards that are fetched before their reader needs them
RESERVE = 20e9  # bytes of the disk, or a fifth of it, that shards leave to checkpoints
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds before a shard that failed is tried again
SAID_AFTER = 2.0  # seconds that a reader waits in silence


class DamagedShard(UserError):
    """A shard that is missing, or is not what its name says; `path` is its file."""

    def __init__(self, path, what):
        super().__init__(f"{path}: {what}")
        self.path = Path(path)


# ----------------------------------------------------------------------------------------------------------------------
# The shards of a dataset


class HubShards(collections.abc.Sequence):
    """The paths of a dataset's shards, in order. `shards[s]` downloads what is not here; UserError if that fails.

    `paths` are the same without waiting for any. Whoever reads them in order, while something else works, takes
    `following`.
    """

    def __init__(self, repo, revision, names, folder, check):
        self.repo, self.revision, self.folder, self.check = repo, revision, Path(folder), check
        self.paths = tuple(self.folder / name for name in names)
        self.removes, self.ahead = False, AHEAD
        self._listed, self._listing = {}, threading.Lock()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, s):
        self.fetch([self.paths[s]])
        return self.paths[s]

    def listed(self, path):
        """What the Hub says of a file in the folder; the first call asks for all shards."""
        with self._listing:
            if path.name not in self._listed:
                names = dict.fromkeys([path.name, *(shard.name for shard in self.paths)])
                self._listed |= look_up_files(self.repo, list(names), self.revision)
            return self._listed[path.name]

    def download(self, path, **options):
        """Downloads one file to the folder; returns its bytes. options: download_file's."""
        return download_file(path, self.listed(path), self.repo, self.revision, self.check, **options)

    def fetch(self, paths):
        """Downloads those of `paths` that are not here, several at a time; the first that fails stops the rest."""
        missing = [path for path in paths if not path.exists()]
        if not missing:
            return
        size = sum(self.listed(path).size for path in missing)
        clear_abandoned(self.folder)
        count = f"{len(missing)} shard{'s' if len(missing) > 1 else ''}"
        say(f"download: {count}, {size / 1e6:,.0f} MB, of {self.repo} at {self.revision[:12]} to {self.folder}")
        pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
        with without_bars():  # one bar for all instead of one for each
            try:
                jobs = [pool.submit(self.download, path) for path in missing]
                with progress_bar(total=size, unit="B", unit_scale=True, desc="shards") as bar:
                    for job in concurrent.futures.as_completed(jobs):
                        bar.update(job.result())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def plan(self, size):
        """Decides whether shards of `size` bytes stay once they are read, by what is free on the disk; says so."""
        missing = sum(not path.exists() for path in self.paths)
        if not missing:
            return
        usage = shutil.disk_usage(self.folder)
        reserve = min(RESERVE, usage.total / 5)
        fit = int((usage.free - reserve) // size)
        self.removes = missing > fit
        if self.removes:
            self.ahead = max(1, min(AHEAD, fit - 1))
        fate = f"each is deleted once it is read, {self.ahead} are fetched ahead" if self.removes else "they are kept"
        gigabytes = [f"{amount / 1e9:,.1f} GB" for amount in (missing * size, usage.free, reserve)]
        say("disk: {} of shards are not here yet, {} are free, {} of them for checkpoints: {}".format(*gigabytes, fate))


def local_paths(paths):
    """Where shards are, or will be; waits for none."""
    return paths.paths if isinstance(paths, HubShards) else paths


@contextlib.contextmanager
def following(paths, first):
    """Yields `paths` for a reader that takes them in order from shard `first` on: a HubShards as Arrivals."""
    if not isinstance(paths, HubShards):
        yield paths
        return
    arrivals = Arrivals(paths, first)
    try:
        yield arrivals
    finally:
        arrivals.close()


# ----------------------------------------------------------------------------------------------------------------------
# Fetching ahead


class Arrivals:
    """The shards of a HubShards for one reader: `arrivals[s]` waits for shard s while those after it are fetched.

    The first shard that is asked for is the start: UserError if it cannot be had. From then on a failure is reported
    in one line and repeated with pauses until it works. Threads start with the first download; close() ends them, and
    the loader's closing any wait. A download within its transfer ends with that, in a thread that nobody waits for.
    """

    def __init__(self, shards, first):
        self._shards, self._at, self._begun = shards, first % len(shards), False
        self._change, self._closed, self._threads = threading.Condition(), False, []
        self._busy, self._failed, self._told, self._recovered = set(), {}, set(), set()
        self._tries, self._not_before = collections.Counter(), {}
        self._closing = contextlib.ExitStack()

    def __len__(self):
        return len(self._shards)

    def __getitem__(self, s):
        path, began, told = self._shards.paths[s], time.monotonic(), False
        with self._change:
            if s != self._at:
                self._leave(s)
            while True:
                self._start()
                if path.exists():
                    self._begun = True
                    return path
                if self._closed or is_closing():
                    raise UserError(f"{path.name}: no longer waited for")
                if not self._begun and s in self._failed:
                    raise self._failed[s]
                if not told and time.monotonic() - began > SAID_AFTER:
                    told = True
                    say_above_bars(f"shards: training waits for {path.name}, which has not come yet")
                self._change.wait(0.1)

    def _leave(self, s):
        if self._shards.removes and self._begun and s == (self._at + 1) % len(self):
            path = self._shards.paths[self._at]
            with contextlib.suppress(OSError):
                if not path.is_symlink():  # a link was not downloaded
                    path.unlink()
        self._at = s
        self._change.notify_all()

    def _choose(self):
        """The next shard to download, by number; None if there is none now."""
        for ahead in range(min(self._shards.ahead + 1, len(self))):
            s = (self._at + ahead) % len(self)
            due = s not in self._busy and time.monotonic() >= self._not_before.get(s, 0)
            if due and not self._shards.paths[s].exists():
                return s
        return None

    def _start(self):
        if not self._threads and self._choose() is not None:
            clear_abandoned(self._shards.folder)
            self._closing.enter_context(without_bars())
            for _ in range(AT_ONCE_BEHIND):  # daemons: a transfer that stalls must not keep the process
                self._threads.append(threading.Thread(target=self._work, name="shards", daemon=True))
                self._threads[-1].start()

    def _work(self):
        while True:
            with self._change:
                while not self._closed and (s := self._choose()) is None:
                    self._change.wait(0.25)  # a pause may be over, or another process have removed one
                if self._closed:
                    return
                self._busy.add(s)
            error = None
            try:
                self._shards.download(
                    self._shards.paths[s], remedy="check the network", is_wanted=lambda: not self._closed
                )
            except Exception as failure:  # whatever it is, training goes on
                error = failure
            with self._change:
                self._busy.remove(s)
                if not self._closed:
                    self._note(s, error)
                self._change.notify_all()

    def _note(self, s, error):
        """Says what has changed, and when to try again: a failure once for each kind of it, and when all is well."""
        name = self._shards.paths[s].name
        if error is None:
            self._tries.pop(s, None)
            if self._failed.pop(s, None) and not self._failed:
                self._told.clear()
                say_above_bars(f"shards: downloads work again, {name} is here")
            return
        self._not_before[s] = time.monotonic() + min(FIRST_PAUSE * 2 ** self._tries[s], LONGEST_PAUSE)
        self._tries[s] += 1
        self._failed[s] = error
        links = list(chain(error))
        kind = any(map(is_full, links)), type(links[-1]), next(filter(None, map(status_of, links)), None)
        if kind not in self._told and (self._begun or s != self._at):
            self._told.add(kind)
            say_above_bars(f"shards: {describe_error(error)}; tried again until it works, training goes on")

    def recover(self, error):
        """Has a DamagedShard downloaded again; raises it if the file was damaged once before."""
        if error.path.exists():
            if error.path in self._recovered:
                raise error
            self._recovered.add(error.path)
            with contextlib.suppress(OSError):
                error.path.unlink()
        say_above_bars(f"shards: {error}; downloading it again")

    def close(self):
        """Ends the threads, except within a transfer."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        deadline = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._closing.close()
