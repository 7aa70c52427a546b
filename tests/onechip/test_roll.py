"""onechip/keeper.py and onechip/roll.py: who is missing, refused, silent or gone is named, on every host."""

import socket
import threading
import time

import pytest

from onechip import keeper, roll
from onechip.errors import UserError
from onechip.keeper import Keeper
from onechip.roll import HostLine, count_off, knock, start_keeper


@pytest.fixture(autouse=True)
def quick(monkeypatch, in_time):
    """Signs of life every 0.1 s, and 1 s until a host is taken for dead."""
    for module in (keeper, roll):
        monkeypatch.setattr(module, "PULSE", 0.1)
        monkeypatch.setattr(module, "DEAD_AFTER", 1.0)
    monkeypatch.setattr(roll, "GRACE", 0.1)


@pytest.fixture
def place():
    """An address whose port is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Hosts:
    """A keeper in a thread, and lines to it; `started` counts its services."""

    def __init__(self, place, count, seconds=5.0):
        self.place, self.count, self.seconds, self.started = place, count, seconds, []
        host, port = keeper.address_of(place)
        self.keeper = Keeper((host, port), count, seconds, lambda: self.started.append(1))
        self.thread = threading.Thread(target=self.keeper.run, daemon=True)
        self.thread.start()

    def line(self, index, count=None):
        return HostLine(self.place, count or self.count, index, self.seconds)

    def all(self):
        """A line for each, when the roll has been called."""
        lines = [self.line(i) for i in range(self.count)]
        for line in lines:
            line.answer()
        return lines


def watch(line):
    """A list that gets what the line has to say when the process would end."""
    said = []
    line.watch(said.append)
    return said


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_all_go_when_the_last_has_come(place, capsys):
    """The service starts once, and before anybody is told to go; who leaves is no loss, and the keeper ends."""
    hosts = Hosts(place, 3)
    lines = hosts.all()
    said = [watch(line) for line in lines]
    assert hosts.started == [1]
    time.sleep(0.5)
    for line in lines:
        line.leave()
    hosts.thread.join(5)
    assert not hosts.thread.is_alive() and said == [[], [], []]


def test_the_missing_are_named(place):
    """Hosts 1 and 3 of four: on host 0 and on host 2."""
    hosts = Hosts(place, 4, seconds=0.6)
    for line in [hosts.line(0), hosts.line(2)]:
        with pytest.raises(UserError, match=r"^hosts 1, 3 did not come within 0.01 minutes: .* --host 1, or"):
            line.answer()
    assert hosts.started == [] and (count_off([2]), count_off([3, 0])) == ("host 2", "hosts 0, 3")


def test_nobody_answers(place):
    """Host 0 is named where there is no keeper, and the address too."""
    with pytest.raises(UserError, match=f"^host 0 did not come within 0.005 minutes: nobody answers at {place} "):
        knock(place, 0.3)


def test_a_host_that_dies_in_the_roll_call_may_come_again(place):
    """Its first connection does not count."""
    hosts = Hosts(place, 3)
    first, early = hosts.line(0), hosts.line(1)
    wait_for(lambda: 1 in hosts.keeper._there)
    early._socket.close()
    wait_for(lambda: 1 not in hosts.keeper._there)
    last = hosts.line(2)
    time.sleep(0.3)
    assert hosts.started == []
    again = hosts.line(1)
    for line in (first, last, again):
        line.answer()
    assert hosts.started == [1]


@pytest.mark.parametrize(
    "index, count, why",
    [(1, 3, "hosts=3: host 0 was started with --hosts 2"), (0, 2, "host=0: another process is host 0"),
     (2, 2, "host=2: another process is host 2")],
)  # fmt: skip
def test_who_does_not_fit_is_refused(place, index, count, why):
    """Another number of hosts, an index that is taken or too high: said to that host, and the roll goes on."""
    hosts = Hosts(place, 2)
    first = hosts.line(0)
    time.sleep(0.2)
    with pytest.raises(UserError, match=f"^{why}"):
        hosts.line(index, count).answer()
    hosts.line(1).answer()
    first.answer()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_host_is_named(place, victim):
    """Its connection ends without a word: all others hear of it."""
    hosts = Hosts(place, 3)
    lines = hosts.all()
    said = {i: watch(line) for i, line in enumerate(lines) if i != victim}
    lines[victim]._socket.close()
    wait_for(lambda: all(said.values()))
    assert {text for one in said.values() for text in one} == {f"host {victim} has ended without a word, as if killed"}


def test_a_silent_host_is_named(place):
    """Its connection stays, and nothing comes: a process that is stopped, a machine that is gone."""
    hosts = Hosts(place, 2)
    first, silent = hosts.all()
    said = watch(first)
    wait_for(lambda: said)
    assert said == ["host 1 has not been heard of for 1 s"] and silent._socket.fileno() > 0


def test_a_host_that_fails_says_why(place):
    """The others have a moment to end by themselves, as they do when the same error is theirs."""
    lines = Hosts(place, 2).all()
    said = watch(lines[0])
    lines[1].leave("failed vocab_size=0: must be a positive integer")
    wait_for(lambda: said)
    assert said == ["host 1 has ended: vocab_size=0: must be a positive integer"] and lines[0].lost.is_set()


def test_a_keeper_that_is_gone_is_host_0(place):
    """Its machine, then: the process outlives host 0's."""
    with socket.create_server(keeper.address_of(place)) as server:
        line = HostLine(place, 2, 1, 5.0)
        with server.accept()[0] as connection:
            connection.sendall(b"go\n")
            line.answer()
            said = watch(line)
    wait_for(lambda: said)
    assert said == ["host 0 has ended without a word, as if its machine were gone"]


def test_a_taken_port_is_one_line(place):
    """The keeper's process says why it cannot listen."""
    host, port = keeper.address_of(place)
    with pytest.raises(UserError, match=f"^coordinator='10.255.255.1:{port}': .*: choose another one$"):
        with socket.create_server(("", port)):
            start_keeper(f"10.255.255.1:{port}", 2, 0.3)
