"""onechip/hosts.py, join.py, orders.py: what needs no second process. Those that do are in the tests of training."""

import io

import jax
import numpy as np
import pytest

from onechip import join, lock, orders, resume
from onechip.errors import UserError
from onechip.hosts import (
    agree,
    first_alone,
    gathered,
    host_count,
    host_index,
    is_first,
    meet,
    name_difference,
    spread,
)
from onechip.join import HostStream, find_hosts
from onechip.orders import Orders
from onechip.runfolder import RunFolder
from onechip.settings import Run


def test_one_process_is_alone():
    """It is the first of one, agrees with itself, and meets nobody."""
    assert (host_count(), host_index(), is_first()) == (1, 0, True)
    meet("nobody")
    value = {"a": (1, 2)}
    assert agree(value) is value
    with first_alone() as first:
        assert first


def test_a_difference_names_field_values_and_host():
    """The first field that differs, in host 0's order; a field that one host lacks differs too."""
    found = [{"a": 1, "b": [2]}, {"a": 1, "b": [2]}, {"a": 1, "b": [3], "c": None}]
    assert name_difference(found, "start all alike") == "b=[2] on host 0, but [3] on host 2: start all alike"
    assert name_difference(found[:2], "") == ""
    assert name_difference([{"a": 1}, {}], "x") == "a=1 on host 0, but None on host 1: x"


def test_lines_begin_with_the_host():
    """Each line of a traceback, which Python writes piece by piece; empty lines stay empty."""
    stream = io.StringIO()
    prefixed = HostStream(stream, 3)
    for text in ("one\ntwo", " more\n", "\n", "    ", "indented\n"):
        assert prefixed.write(text) == len(text)
    assert stream.getvalue() == "host 3: one\nhost 3: two more\n\nhost 3:     indented\n"


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"hosts": 2}, "^coordinator='': give host 0's address and a free port"),
        ({"hosts": 2, "coordinator": "10.0.0.2"}, "^coordinator='10.0.0.2': give"),
        ({"hosts": 2, "coordinator": "10.0.0.2:x"}, "^coordinator='10.0.0.2:x': give"),
        ({"hosts": 2, "host": 2, "coordinator": "a:1"}, "^host=2: hosts are counted from 0: use 0 to 1$"),
        ({"coordinator": "a:1"}, "^hosts=0: with a coordinator, say how many"),
    ],
)
def test_settings_that_do_not_say_who_is_there(settings, line):
    """The field, its value, and what would be right."""
    with pytest.raises(UserError, match=line):
        find_hosts(Run(**settings))


def test_hosts_of_settings_and_of_slurm(monkeypatch):
    """As set; as Slurm says; nobody else where neither says anything."""
    assert find_hosts(Run(hosts=4, host=3, coordinator="a:8476")) == ("a:8476", 4, 3, None)
    monkeypatch.setattr(join, "has_tpu", lambda: False)
    assert find_hosts(Run())[1] == 1
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in {**slurm, "STEP_NUM_NODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    coordinator, count, index, _ = find_hosts(Run())
    assert (coordinator.partition(":")[0], count, index) == ("node3", 2, 1)


def test_arrays_of_one_host_go_to_its_devices():
    """spread places a pytree by a sharding; gathered leaves alone what can be read here."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = spread({"x": np.arange(3)}, where)
    assert tree["x"].sharding == where and gathered(tree)["x"] is tree["x"]


def follow(monkeypatch, module, host_0_says):
    """Has a room act as on host 1."""
    monkeypatch.setattr(module, "is_first", lambda: False)
    monkeypatch.setattr(module, "agree", lambda value: host_0_says)


def test_all_hosts_share_the_folder_of_the_run(monkeypatch, tmp_path):
    """Host 1 holds no lock of its own: it looks for host 0's, and says so where another disk is under that name."""
    path = tmp_path / "run" / ".owner.json"
    with lock.RunLock(path) as held:
        follow(monkeypatch, lock, held._me["token"])
        monkeypatch.setattr(lock, "SILENCE", 0.1)
        with lock.RunLock(path) as second:
            second.check()
        assert path.exists()
        with pytest.raises(UserError, match="of host 0 is not seen here: all hosts need one shared --out$"):
            with lock.RunLock(tmp_path / "elsewhere" / ".owner.json"):
                pass
        monkeypatch.undo()


def test_all_hosts_resume_from_host_0s_checkpoint(monkeypatch, tmp_path):
    """By its name, not the newest one that they see; one that is not here is one line."""
    follow(monkeypatch, resume, "step_00000007")
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="^out='.*step_00000007': host 0 resumes from it: --out must be"):
        resume.choose_checkpoint(folder)
    folder.checkpoint(7).mkdir(parents=True)
    folder.checkpoint(9).mkdir()
    assert resume.choose_checkpoint(folder) == folder.checkpoint(7)
    follow(monkeypatch, resume, None)
    assert resume.choose_checkpoint(folder) is None


class Clock:
    """A step's time, and two hosts' orders in one process: the follower reads what host 0 has decided."""

    now = 0.0


def drive_orders(monkeypatch, seconds, steps, stop_at):
    """(steps at which host 0 decided, step at which it stopped), for steps of that many seconds."""
    clock, asked = Clock(), []
    monkeypatch.setattr(orders, "host_count", lambda: 2)
    monkeypatch.setattr(orders, "is_first", lambda: True)
    monkeypatch.setattr(orders, "list_keys", lambda folder: [])
    monkeypatch.setattr(orders.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(orders, "agree", lambda order: order)
    mine = Orders(lambda: asked.append(step) or ("interrupted" if clock.now >= stop_at else ""), lambda: False)
    for step in range(steps):
        if mine.stops(step):
            return sorted(set(asked)), step
        clock.now += seconds
    return sorted(set(asked)), None


@pytest.mark.parametrize("seconds", [0.001, 0.1, 10.0])
def test_orders_hold_for_two_seconds(monkeypatch, seconds):
    """A stop is obeyed within two seconds, or with the next step; the store is asked once in that time at most."""
    asked, step = drive_orders(monkeypatch, seconds, 100_000, stop_at=40.0)
    assert 40.0 <= step * seconds <= 40.0 + max(seconds, 2.0) + 1e-6
    assert len(asked) <= 13 + 40.0 / min(2.0, 1000 * seconds) * max(1, 2.0 / max(seconds, 2.0)) + 1
