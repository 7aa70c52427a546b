"""onechip/profile.py: the trace holds the steps that it should."""

import glob

import jax
import jax.numpy as jnp
import pytest

from onechip.profile import ProfileWindow


def trace_files(folder):
    return glob.glob(f"{folder}/profile/**/*.xplane.pb", recursive=True)


def traced_steps(path):
    """step_num of every step annotation in a trace."""
    data, found = jax.profiler.ProfileData.from_file(path), []
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found += [value for name, value in event.stats if name == "step_num"]
    return sorted({int(number) for number in found})


@pytest.mark.parametrize(
    "steps, traced",
    [(1, [0]), (3, [0, 1, 2]), (5, range(5)), (12, range(7, 12)), (20, range(15, 20)), (30, range(15, 20))],
)
def test_the_profile_adapts_to_short_runs(tmp_path, steps, traced):
    """A run too short for steps 15 to 20 has its last five traced, or all; something ran in each."""
    window = ProfileWindow(tmp_path / "profile", steps)
    double = jax.jit(lambda x: 2 * x)
    x = double(jnp.ones(()))
    for step in range(steps):
        with window.before(step):
            x = double(x)
        window.after(step, x)
    window.close()
    [path] = trace_files(tmp_path)
    assert traced_steps(path) == list(traced)


def test_no_steps_leave_no_profile(tmp_path):
    """A finished run that is started again opens no trace and closes without one."""
    window = ProfileWindow(tmp_path / "profile", 0)
    window.close()
    assert trace_files(tmp_path) == []


def test_the_profile_waits_for_its_last_step(tmp_path, monkeypatch):
    """A trace stopped before the device is done lacks its last steps: the result is waited for, then it stops."""
    order = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: order.append(("wait", x)))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: order.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: order.append("stop"))
    window = ProfileWindow(tmp_path, 7)
    for step in range(7):
        with window.before(step):
            order.append(step)
        window.after(step, f"result {step}")
    assert order == [0, 1, "start", 2, 3, 4, 5, 6, ("wait", "result 6"), "stop"]
    window.close()
    assert order[-1] == "stop" and order.count("stop") == 1


def test_a_run_that_ends_within_its_profile_stops_it(tmp_path):
    """An interrupt or an error between two traced steps: the trace is written, and another one can begin."""
    for name in ("a", "b"):
        window = ProfileWindow(tmp_path / name / "profile", 30, first=0)
        with window.before(0):
            pass
        window.after(0, None)
        window.close()
        assert len(trace_files(tmp_path / name)) == 1


@pytest.mark.parametrize("name", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys, name):
    """A full disk costs the profile: one line, and the steps go on."""

    def refuse(*args, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    for function in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, function, refuse if function == name else lambda *args, **options: None)
    window = ProfileWindow(tmp_path / "profile", 6)
    for step in range(6):
        with window.before(step):
            pass
        window.after(step, None)
    window.close()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"profile: none in {tmp_path / 'profile'} (RESOURCE_EXHAUSTED")
