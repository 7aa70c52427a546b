"""02 in processes that are stopped and continued, on a terminal that knows ASCII only, and with a clock that jumps."""

import importlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from corpus import assert_same_end, train_tiny, write_documents
from test_02_hosts import finish, start

from onechip import lock
from onechip.runfolder import RunFolder

tok = importlib.import_module("01_tokenizer")
pytestmark = [pytest.mark.usefixtures("compiled_once", "interruptible")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of two shards."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(2):
        tok.write_shard(folder / f"shard_{i:05d}.parquet", write_documents(60, i, 30), 7)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory, compiled_once):
    """The folder of the run of a process that nobody stops; its terminal cannot show all of its text."""
    out = tmp_path_factory.mktemp("undisturbed")
    (said,) = finish(start(shards, out, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}))
    assert said.rc == 0 and (out / "run" / "model" / "README.md").exists(), said.err
    return out / "run"


def wait_until_stopped(process):
    """Waits until a process has stopped itself, as one that somebody suspends with Ctrl-Z."""
    deadline = time.monotonic() + 120
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def contents(folder):
    """{path: bytes} of all files of a run."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_process_that_was_stopped_and_continues_is_the_run_left_alone(shards, tmp_path, undisturbed):
    """Stopped before step 14, for longer than some signs of life; nobody else gets its run meanwhile."""
    first = start(shards, tmp_path, when="13:STOP")
    wait_until_stopped(first)
    (second,) = finish(start(shards, tmp_path))
    assert second.rc == 1 and f"process {first.pid} on " in second.err and "Traceback" not in second.err
    first.send_signal(signal.SIGCONT)
    (said,) = finish(first)
    assert said.rc == 0, said.err
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_process_that_continues_after_its_run_was_taken_changes_nothing(shards, tmp_path, undisturbed):
    """Another has taken the run from the stopped one and has ended it: one line, exit status 1, each file as it was.

    All that may come is a trace of the steps that it made before it looked.
    """
    first = start(shards, tmp_path, when="13:STOP")
    wait_until_stopped(first)
    (second,) = finish(start(shards, tmp_path, "--take_over", "true"))
    assert second.rc == 0, second.err
    before = contents(tmp_path / "run")
    first.send_signal(signal.SIGCONT)
    (said,) = finish(first)
    assert said.rc == 1 and re.search(r"^error: .*another process has had this run in between", said.err, re.M)
    after = contents(tmp_path / "run")
    assert "Traceback" not in said.err and {path: after[path] for path in before} == before
    assert all(path.is_relative_to(tmp_path / "run" / "profile") for path in set(after) - set(before))
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_clock_that_jumps_changes_nothing(corpus, tokenizer, straight, tmp_path, monkeypatch):
    """By days, both ways, between any two looks at it, in a run that is interrupted and resumed: the same files."""
    draw, real = random.Random(0), time.time
    jumping = lambda: real() + draw.choice((-1, 1)) * draw.uniform(0, 5 * 86400)
    monkeypatch.setattr(lock, "BEAT", 0.01)
    run_dir, interrupt = tmp_path / "run", lambda row: row["step"] == 9 and signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        patch.setattr(time, "time_ns", lambda: int(1e9 * jumping()))
        assert train_tiny(corpus, tokenizer, run_dir, on_log=interrupt).step < 26
        for path in (run_dir, RunFolder(run_dir).checkpoints, *RunFolder(run_dir).checkpoints.iterdir()):
            when = jumping()
            os.utime(path, (when, when))
        assert train_tiny(corpus, tokenizer, run_dir).step == 26
    assert_same_end(run_dir, straight[0].run_dir)
    assert len(list(run_dir.glob("events.*"))) == 1 and not RunFolder(run_dir).lock.exists()
