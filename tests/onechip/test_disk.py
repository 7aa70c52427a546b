"""onechip/disk.py and what trains on it: a disk that is full or away for a while costs nothing, and a line each way."""

import builtins
import contextlib
import errno
import functools
import io
import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from corpus import assert_same_end, is_one_line, list_checkpoints, newest, read_rows
from test_runlog import charts_of, read_charts
from test_runlog import read_rows as all_rows
from test_session import (
    ORIGIN,
    STATE,
    Config,
    NotingMirror,
    acting_at,
    add_batch,
    count_up,
    crash,
    drawn,
    drive,
    straight,
    threads,
)

from onechip import disk, lock, statefile, writer
from onechip.checkpoints import write_checkpoint
from onechip.disk import Disk, rescue_folder
from onechip.errors import UserError
from onechip.files import FullDisk
from onechip.session import Session

pytestmark = pytest.mark.usefixtures("interruptible", "drawn")
__all__ = ["drawn", "straight"]  # fixtures


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: the clock by which a disk is tried again."""
    now = [0.0]
    monkeypatch.setattr(disk, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def acting(clock, **acts):
    """The train step that takes 20 s and calls acts["at_N"] in step N."""

    def train_step(state, batch):
        clock[0] += 20
        number = int(state["step"]) + 1
        result = add_batch(state, batch)
        acts.get(f"at_{number}", lambda: None)()
        return result

    return train_step


def said_of_the_disk(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("disk: ", "checkpoint: "))]


class Away:
    """A file system below `folder` that fails with `code` between leave() and come_back(), as a mount that is gone."""

    NAMES = "stat lstat open mkdir rename replace scandir listdir unlink rmdir utime link".split()

    def __init__(self, monkeypatch, folder, code):
        self.folder, self.error, self.is_away = str(folder), OSError(code, os.strerror(code)), False
        for owner, name in [(builtins, "open"), (io, "open"), *((os, name) for name in self.NAMES)]:
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))

    def around(self, real):
        @functools.wraps(real)
        def call(path, *args, **options):
            if self.is_away and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
                raise OSError(*self.error.args)
            return real(path, *args, **options)

        return call

    def leave(self):
        self.is_away = True

    def come_back(self):
        self.is_away = False


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own at `folder`; skips where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    """A file that takes all that is left."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def free(path):
    """Removes a file, after the attempt to write a checkpoint that began while it filled the disk has failed."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    path.unlink()


@pytest.mark.parametrize("limit", [8, 2 << 30])
def test_a_disk_that_is_full_for_a_while_costs_nothing(straight, tmp_path, clock, monkeypatch, capsys, limit):
    """A real one, filled up and freed while training runs: at the end all is as if it had not been.

    Two lines; checkpoints are tried once a minute, whether the state fits the buffer or training waits for the disk.
    """
    monkeypatch.setattr(statefile, "BUFFER", limit)
    with small_disk(tmp_path / "disk", "600k") as mount:
        step = acting(clock, at_5=lambda: fill(mount / "rest"), at_13=lambda: free(mount / "rest"))
        drive(mount / "run", step, save_every=1)
        assert_same_end(mount / "run", straight)
        assert read_charts(mount / "run") == charts_of(all_rows(mount / "run"))
        steps = {int(name[5:]) for name in list_checkpoints(mount / "run")}
        assert {3, 20} <= steps and steps & set(range(13, 18)) and not steps & {5, 6, 7, 8, 9, 10}
        begins, ends = said_of_the_disk(capsys)
    assert "cannot be written to" in begins and "the disk is full" in begins and is_one_line(begins)
    assert ends.startswith(f"disk: {mount / 'run'} works again") and threads() == []


@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.EIO, errno.ENOENT, errno.EDQUOT])
def test_a_drive_that_vanishes_for_a_while_costs_nothing(straight, tmp_path, clock, monkeypatch, capsys, code):
    """Every access fails, the lock's too, from step 5 to 13: no error, two lines, nothing made where the mount was."""
    monkeypatch.setattr(lock, "BEAT", 0.001)
    folder = tmp_path / "drive" / "run"
    away = Away(monkeypatch, tmp_path / "drive", code)
    drive(folder, acting(clock, at_5=away.leave, at_13=away.come_back), save_every=1)
    assert_same_end(folder, straight)
    assert read_charts(folder) == charts_of(all_rows(folder))
    begins, ends = said_of_the_disk(capsys)
    assert "training goes on in memory" in begins and "works again" in ends and is_one_line(begins)
    assert not (folder / ".owner.json").exists() and not rescue_folder(folder).exists()


def test_a_folder_that_is_gone_is_not_made_anew(straight, tmp_path, clock):
    """What is mounted there later would find a folder in its way; it is used again when it is there again."""
    folder = tmp_path / "drive" / "run"
    there, elsewhere, seen = folder.parent, tmp_path / "x", []
    acts = {"at_5": lambda: there.rename(elsewhere), "at_13": lambda: elsewhere.rename(there)}
    acts["at_12"] = lambda: seen.append(there.exists())
    drive(folder, acting(clock, **acts), save_every=1)
    assert seen == [False]
    assert_same_end(folder, straight)


def test_a_checkpoint_that_failed_is_tried_again_once_a_minute(tmp_path, clock, monkeypatch):
    """By the clock, with the newest state: steps of 20 s, so every third step, though a save is due at each."""
    tried = []

    def refuse(path, files, take):
        tried.append(int(path.name[5:]))
        if len(tried) < 5:
            raise OSError(errno.EIO, "Input/output error")
        write_checkpoint(path, files, take)

    monkeypatch.setattr(writer, "write_checkpoint", refuse)
    with Session(tmp_path, Config(), ORIGIN) as run:
        run.begin(jax.tree.map(jnp.copy, STATE), count_up, jax.device_put)
        step = acting(clock)
        while run.step < 16:
            run.advance(step)
            if run.step == 2 or run.due("save"):
                run.save()
                run._writer.wait()
    assert tried == [2, 5, 8, 11, 14]


# ----------------------------------------------------------------------------------------------------------------------
# The end on a disk that is away


@pytest.mark.parametrize("how", ["complete", "interrupted", "failed"])
def test_what_cannot_be_written_at_the_end_is_rescued(straight, tmp_path, clock, monkeypatch, capsys, how):
    """To this machine's own disk, with a line that says where; the same command brings it back, and ends the same."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    folder, mirror = tmp_path / "drive" / "run", NotingMirror()
    away, ends = Away(monkeypatch, tmp_path / "drive", errno.ENOTCONN), {}
    if how == "interrupted":
        ends = {"at_17": lambda: signal.raise_signal(signal.SIGTERM)}

    def batches(start):
        for batch, position in count_up(start):
            if how == "failed" and position["next"] == 18 and away.is_away:
                raise ConnectionError("no more text")
            yield batch, position

    fails = pytest.raises(ConnectionError) if how == "failed" else contextlib.nullcontext()
    with fails:
        drive(folder, acting(clock, at_13=away.leave, **ends), batches=batches, save_every=1, mirror=mirror)
    steps = {"complete": {20}, "interrupted": {17}, "failed": set(range(14, 18))}[how]
    [rescued] = rescue_folder(folder).iterdir()
    step = int(rescued.name[5:])
    [line] = [line for line in said_of_the_disk(capsys) if "rescued" in line]
    assert (
        step in steps and str(rescued) in line and "the same command brings it back" in line and is_one_line(line, 600)
    )
    assert mirror.steps[-1] == step, "it goes up from there"
    away.come_back()
    assert newest(folder).name in ("step_00000011", "step_00000012")
    drive(folder, save_every=1)
    assert_same_end(folder, straight)
    assert f"step_{step:08d} came from" in capsys.readouterr().out and not rescued.parent.exists()


def test_a_rescued_checkpoint_is_that_runs_own(tmp_path, monkeypatch, capsys):
    """Two runs of one name in two folders: each finds its own; an older one than the run has is not brought back."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    for name, step in (("a", 3), ("b", 5)):
        drive(tmp_path / name / "run", num_iterations=step, eval_every=0)
        os.renames(newest(tmp_path / name / "run"), rescue_folder(tmp_path / name / "run") / f"step_{step:08d}")
    drive(tmp_path / "a" / "run", num_iterations=4, eval_every=0)
    assert "continues after step 3 of 4" in capsys.readouterr().out and newest(tmp_path / "a" / "run").name[-1] == "4"
    drive(tmp_path / "c" / "run", num_iterations=7, eval_every=0)
    os.renames(tmp_path / "c", tmp_path / "c2")
    os.renames(tmp_path / "b", tmp_path / "b2")
    os.renames(tmp_path / "c2", tmp_path / "b")
    drive(tmp_path / "b" / "run", num_iterations=8, eval_every=0)
    assert "continues after step 7 of 8" in capsys.readouterr().out
    assert list((tmp_path / "home" / "rescued").iterdir()) == []


NOWHERE = [
    (FullDisk("step: the disk is full"), "^step: the disk is full$"),
    (
        OSError(errno.EFBIG, "File too large"),
        r"step_00000020: cannot be written to \(File too large\); nor .* lost$",
    ),
]


@pytest.mark.parametrize("error, said", NOWHERE, ids=["full", "limited"])
def test_where_nothing_can_be_written_the_end_is_an_error(tmp_path, monkeypatch, error, said):
    """This machine's own disk is full as well, or files are limited in size: one line, after the last step."""

    def refuse(path, files, take=None):
        raise error

    monkeypatch.setattr(writer, "write_checkpoint", refuse)
    monkeypatch.setattr("onechip.session.write_checkpoint", refuse)
    with pytest.raises(UserError, match=said) as raised:
        drive(tmp_path)
    assert is_one_line(raised.value) and len(read_rows(tmp_path)) == 23 and threads() == []


# ----------------------------------------------------------------------------------------------------------------------
# Errors and interrupts


@pytest.mark.parametrize("error", [UserError("too few documents"), ConnectionError("gone"), MemoryError()])
def test_an_error_between_two_steps_finds_them_saved(straight, tmp_path, error):
    """A loader that fails after step 13: the error is raised as it is, and what was trained is not lost."""

    def batches(start):
        for batch, position in count_up(start):
            if position["next"] == 14:
                raise error
            yield batch, position

    with pytest.raises(type(error)) as raised:
        drive(tmp_path, batches=batches)
    assert raised.value is error
    reached = int(newest(tmp_path).name[5:])
    assert 10 <= reached <= 13, "batches that wait when the loader fails are not trained on"
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, reached + 1))
    drive(tmp_path)
    assert_same_end(tmp_path, straight)


def test_a_listener_that_fails_finds_its_steps_saved(straight, tmp_path):
    """on_log is not asked again for the rows that are still to be written."""
    heard = []

    def listen(row):
        heard.append(row["step"])
        if row["step"] == 4:
            raise ConnectionError("no network")

    with pytest.raises(ConnectionError):
        drive(tmp_path, on_log=listen)
    assert heard == [1, 2, 3, 4] and newest(tmp_path).name in ("step_00000008", "step_00000011")
    drive(tmp_path)
    assert_same_end(tmp_path, straight)


def test_an_error_within_a_step_saves_nothing_of_it(tmp_path):
    """The old state is donated by then."""
    with pytest.raises(ConnectionError):
        drive(tmp_path, acting_at(15, crash))
    assert newest(tmp_path).name == "step_00000008"


def test_a_second_interrupt_during_the_pause_leaves_nothing_half_written(straight, tmp_path, monkeypatch):
    """Training waits for room in the buffer: it is let go, the thread removes what it has, the next start goes on."""
    monkeypatch.setattr(statefile, "BUFFER", 8)

    def write(path, files, take):
        if path.name == "step_00000013":
            for _ in range(2):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.2)
        write_checkpoint(path, files, take)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "write_checkpoint", write)
        drive(tmp_path, save_every=13)
    assert list_checkpoints(tmp_path) == ["step_00000008"] and threads() == []
    drive(tmp_path)
    assert_same_end(tmp_path, straight)


def test_a_long_pause_is_said_once(tmp_path, monkeypatch, capsys):
    """How long, and for how much; not at every checkpoint."""
    monkeypatch.setattr("onechip.session.LONG_PAUSE", -1.0)
    drive(tmp_path, save_every=4)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "training waits" in line]
    assert line.startswith("checkpoint: training waits 0 s for each") and line.endswith("GB")


def test_the_pause_is_estimated():
    """What fits the buffer is copied; of 14 GB all but that waits for the disk."""
    assert writer.pause_seconds(1e9) == 0.5
    assert writer.pause_seconds(13.9e9) == pytest.approx(47, abs=0.1)
    assert writer.pause_seconds(13.9e9, 500e6) == pytest.approx(23.5, abs=0.1)


def test_a_disk_says_when_it_fails_and_when_it_works(tmp_path, clock, capsys):
    """Two things that fail are one line, and the other comes when both work."""
    watched, missing = Disk(tmp_path), tmp_path / "nowhere" / "file"
    assert not watched.attempt("a", missing.write_text, "") and not watched.attempt("b", missing.write_text, "")
    assert watched.fails("a") and watched.waits("a") and not watched.fails("c") and not watched.waits("c")
    clock[0] = disk.RETRY
    assert watched.fails("a") and not watched.waits("a")
    assert watched.attempt("a", list) and watched.attempt("b", list) and not watched.fails("b")
    with pytest.raises(RuntimeError):  # not the disk's
        watched.attempt("a", fail_otherwise)
    begins, ends = capsys.readouterr().out.splitlines()
    assert begins.startswith("disk: a cannot be written") and ends == f"disk: {tmp_path} works again"


def fail_otherwise():
    raise RuntimeError
