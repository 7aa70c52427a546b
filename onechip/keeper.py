"""The keeper: a process next to host 0's that has jax's coordination service, and a line to each host.

jax ends a process with a stack of C++ text where a host does not come, and every process as soon as host 0 dies, since
its coordination service lives in there (0.7.2 and 0.10 alike). So the service lives in a process of its own here, which
outlives host 0; and each host has one plain connection to it, open as long as the host lives, by which the roll is
called before jax is told of any host. What hosts compute and agree on does not go through here, but through jax.
"""

import contextlib
import importlib
import ipaddress
import os
import selectors
import socket
import threading
import time

from onechip.errors import first_line

PULSE = 5.0  # seconds between signs of life, both ways
DEAD_AFTER = 30.0  # seconds without one after which a host is taken for dead
JAX_SILENCE = 120  # seconds after which jax would end all processes: later than the above
BUSY = 40.0  # seconds for which the port may still be that of a run which is ending


def address_of(coordinator):
    """("host", port) of "host:port"."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host):
    """Whether a name or address is this machine's alone, which nobody else can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Peer:
    """A connection of the keeper: to a host that has said which one it is, or will."""

    def __init__(self, connection):
        self.connection, self.index, self.text, self.heard, self.gone = connection, None, b"", time.monotonic(), False

    def read(self):
        """The whole lines that have come, as words; None at the end of the connection."""
        try:
            got = self.connection.recv(4096)
        except TimeoutError:
            return []
        except OSError:
            got = b""
        if not got:
            return None
        self.heard = time.monotonic()
        *lines, self.text = (self.text + got).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def send(self, line):
        """Sends a line; a host that does not read is found out by its silence."""
        with contextlib.suppress(OSError):
            self.connection.send(f"{line}\n".encode())


class Keeper:
    """Calls the roll, starts jax's coordination service when all hosts are there, and says who is gone."""

    def __init__(self, address, count, seconds, start):
        """start() starts the service; seconds: for the hosts to come."""
        self._address, self._count, self._seconds, self._start = address, count, seconds, start
        self._select, self._there, self._called = selectors.DefaultSelector(), {}, False

    def run(self):
        """Returns when the last host has left, or a minute after host 0 has."""
        if not self._call():
            return
        self._called = True
        self._start()
        self._tell("go")
        beat = time.monotonic()
        while any(not peer.gone for peer in self._there.values()) and not self._is_abandoned():
            self._listen(PULSE / 5)
            if time.monotonic() - beat > PULSE:
                beat = time.monotonic()
                self._tell("alive")
            for index, peer in self._there.items():
                if not peer.gone and time.monotonic() - peer.heard > DEAD_AFTER:
                    self._lose(index, f"has not been heard of for {DEAD_AFTER:.0f} s")

    def _call(self):
        """Waits for all hosts; whether all have come."""
        end = time.monotonic() + self._seconds
        with open_port(self._address, self._seconds) as port:
            port.setblocking(False)
            self._select.register(port, selectors.EVENT_READ, None)
            print("open", flush=True)
            while len(self._there) < self._count and time.monotonic() < end:
                self._listen(0.2, port)
                if 0 in self._there and self._there[0].gone:
                    return False
            self._select.unregister(port)
        missing = set(range(self._count)) - set(self._there)
        if missing:
            self._tell("missing " + ",".join(map(str, sorted(missing))))
        return not missing

    def _listen(self, seconds, port=None):
        for key, _ in self._select.select(seconds):
            if key.data is None:
                connection, _ = port.accept()
                connection.settimeout(PULSE)
                self._select.register(connection, selectors.EVENT_READ, Peer(connection))
                continue
            lines = key.data.read()
            if lines is None:
                self._select.unregister(key.data.connection)
            for line in ["gone"] if lines is None else lines:
                self._take(key.data, line)

    def _take(self, peer, line):
        word, _, rest = line.partition(" ")
        if word == "here" and peer.index is None:
            self._greet(peer, *map(int, rest.split()))
        elif peer.index is None or peer.gone:
            pass
        elif word == "bye":
            peer.gone = True
        elif word == "failed":
            self._lose(peer.index, f"has ended: {rest}")
        elif word == "gone":
            self._lose(peer.index, "has ended without a word, as if killed")

    def _greet(self, peer, index, count):
        if count != self._count:
            peer.send(f"refused hosts={count}: host 0 was started with --hosts {self._count}: start all hosts alike")
        elif not 0 <= index < count or index in self._there and not self._there[index].gone:
            peer.send(f"refused host={index}: another process is host {index}: give each host its own --host")
        else:
            peer.index, self._there[index] = index, peer

    def _lose(self, index, why):
        self._there[index].gone = True
        if self._called:
            self._tell(f"lost {index} {why}")
        elif index:  # it may come again
            del self._there[index]

    def _tell(self, line):
        for peer in self._there.values():
            if not peer.gone:
                peer.send(line)

    def _is_abandoned(self):
        return self._there[0].gone and time.monotonic() - self._there[0].heard > 2 * DEAD_AFTER


def open_port(address, seconds):
    """A listening socket; OSError if the port stays taken for so long, or BUSY."""
    host, port = address
    family, where = (socket.AF_INET, "127.0.0.1") if is_loopback(host) else (socket.AF_INET6, "::")
    dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    end = time.monotonic() + min(BUSY, seconds)
    while True:
        try:
            return socket.create_server((where, port), family=family, dualstack_ipv6=dual, backlog=128)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def keep(coordinator, count, seconds):
    """What the keeper's process does."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when the hosts have: they ask it for help to end well
    host, port = address_of(coordinator)
    services = []
    threading.Thread(target=importlib.import_module, args=("jax._src.lib",), daemon=True).start()  # it takes a second

    def start():
        from jax._src.lib import _jax

        where = f"127.0.0.1:{port}" if is_loopback(host) else f"[::]:{port}"
        services.append(_jax.get_distributed_runtime_service(where, count, heartbeat_timeout=JAX_SILENCE))

    try:
        Keeper((host, port), count, seconds, start).run()
    except Exception as error:
        print(f"failed {first_line(error)}", flush=True)
    os._exit(0)  # the service is not asked to wait for a host that was killed
