"""onechip/deadline.py: a run ends within its process's hours, its checkpoint written and on the Hub."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from corpus import assert_same_end, newest, read_rows
from test_session import acting_at, add_batch, drawn, drive, straight

from onechip import deadline, machine
from onechip.deadline import SLACK, Deadline, time_to_save

pytestmark = pytest.mark.usefixtures("interruptible", "drawn")
__all__ = ["drawn", "straight"]  # fixtures


def test_the_time_to_save_has_the_pause_the_writing_and_the_upload():
    """14 GB: 48 s of pause, 56 of writing, 10 minutes of upload at 30 MB/s, or what the last one took."""
    state = {"params": jax.ShapeDtypeStruct((14, 1000, 250_000), jnp.float32)}
    assert time_to_save(state) == pytest.approx(SLACK + (14e9 - (2 << 30)) / 250e6 + 56)
    slow, unknown = SimpleNamespace(seconds=1000.0), SimpleNamespace(seconds=0.0)
    assert time_to_save(state, slow) - time_to_save(state) == pytest.approx(1250)
    assert time_to_save(state, unknown) - time_to_save(state) == pytest.approx(1.25 * 14e9 / 30e6)


def test_a_run_ends_before_its_hours_are_up_and_resumes(straight, tmp_path, monkeypatch, capsys):
    """The process is 50 minutes old; of the hour's rest all but the time to save is trained on, 60 s a step."""
    now = [5000.0]
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(deadline, "process_age", lambda: 3000.0)

    def train_step(state, batch):
        now[0] += 60
        return add_batch(state, batch)

    run = drive(tmp_path, train_step, hours=1.0)
    assert run.step == 8, "of 600 s the slack of 120 is left"
    assert newest(tmp_path).name == "step_00000008"
    assert "ended for session_hours=1 after step 8; the same command resumes" in capsys.readouterr().out
    now[0], _ = 5000.0, monkeypatch.setattr(deadline, "process_age", lambda: 0.0)
    assert drive(tmp_path, train_step, hours=1.0).step == 20
    assert_same_end(tmp_path, straight)


def test_without_hours_there_is_no_end(monkeypatch):
    """0 is no limit, however old the process."""
    monkeypatch.setattr(deadline, "process_age", lambda: 1e9)
    assert not Deadline(0.0).has_come({"w": jnp.ones(1)})
    assert Deadline(24.0).has_come({"w": jnp.ones(1)})


def test_an_interrupt_is_told_as_one(tmp_path, capsys):
    """With hours left, the line is about the interrupt."""
    drive(tmp_path, acting_at(5, lambda: signal.raise_signal(signal.SIGTERM)), hours=100.0)
    assert "interrupted after step 5; the same command resumes" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/proc/uptime"), reason="Linux")
def test_the_age_of_a_process_counts_from_its_start(monkeypatch):
    """Not from when the room was imported; elsewhere than on Linux from then."""
    code = "import time; time.sleep(1.2); from onechip.machine import process_age; print(process_age())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1.2 <= float(done.stdout) <= time.monotonic() - began + 0.1
    monkeypatch.setattr(machine, "process_start", lambda pid: "")
    assert 0 < machine.process_age() < 3600 and machine.process_age() <= time.monotonic() - machine.IMPORTED


@pytest.mark.slow
def test_a_real_process_ends_in_time(tmp_path):
    """Steps without end and 12 s: status 0, a line, and the last step's checkpoint."""
    code = "import conftest, pathlib, sys, test_session as t; from onechip import deadline; deadline.SLACK = 0.5; "
    code += "t.session.ProfileWindow = t.NoProfile; "
    code += f"t.drive(pathlib.Path({str(tmp_path)!r}), num_iterations=10**9, eval_every=0, hours=12 / 3600)"
    paths = os.pathsep.join(map(str, [ROOT / "tests", ROOT / "tests" / "onechip", ROOT]))
    environment, began = os.environ | {"PYTHONPATH": paths}, time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 10 < time.monotonic() - began < 20
    step = read_rows(tmp_path)[-1]["step"]
    assert newest(tmp_path).name == f"step_{step:08d}" and step > 10
    assert f"after step {step:,}; the same command resumes" in done.stdout
