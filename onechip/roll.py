"""A host's side of the roll call: it waits for all to be there, and watches from then on whether they still are."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from onechip.errors import UserError
from onechip.keeper import DEAD_AFTER, PULSE, Peer, address_of

GRACE = 10.0  # seconds that a host has to end by itself when another has failed: with the same error, as a rule
ROOT = Path(__file__).resolve().parent.parent


def count_off(indexes):
    """ "host 1", "hosts 1, 3" """
    return f"host{'s' * (len(indexes) > 1)} {', '.join(map(str, sorted(indexes)))}"


class HostLine:
    """A host's connection to the keeper; `answer` waits until all are there, `watch` ends the process with the run."""

    def __init__(self, coordinator, count, index, seconds, keeper=None):
        """UserError if nobody answers within `seconds`. keeper: its process, on host 0."""
        self._keeper, self._seconds, self._left = keeper, seconds, False
        self.lost, self.why = threading.Event(), ""
        self._socket = knock(coordinator, seconds)
        self._peer = Peer(self._socket)
        self.say(f"here {index} {count}")

    def say(self, line):
        """Sends a line to the keeper."""
        self._peer.send(line)

    def answer(self):
        """Waits for "go"; UserError names the hosts that have not come, or says why this one is refused."""
        end = time.monotonic() + self._seconds + DEAD_AFTER  # the keeper's time is over before
        self._socket.settimeout(1.0)
        while time.monotonic() < end:
            for line in self._lines():
                word, _, rest = line.partition(" ")
                if word == "go":
                    return
                raise UserError(rest if word == "refused" else self._name(rest.split(",")))
        raise UserError("host 0 has not been heard of since this host joined: look at its output")

    def _name(self, missing):
        host = missing[0]
        remedy = f"start the same command there with --host {host}, or look at its output"
        return f"{count_off(missing)} did not come within {self._seconds / 60:g} minutes: {remedy}"

    def _lines(self):
        lines = self._peer.read()
        if lines is None:
            raise UserError("host 0 has ended before all hosts had come: look at its output")
        return lines

    def watch(self, end):
        """Starts a thread that calls end(line), which ends this process, when another host is gone."""
        threading.Thread(target=self._watch, args=(end,), name="hosts", daemon=True).start()

    def _watch(self, end):
        self._socket.settimeout(PULSE / 5)
        beat = heard = time.monotonic()
        while True:
            try:
                for line in self._lines():
                    heard = time.monotonic()
                    self._follow(line, end)
            except UserError:
                return self._left or end("host 0 has ended without a word, as if its machine were gone")
            if time.monotonic() - heard > DEAD_AFTER:
                return end(f"host 0 has not been heard of for {DEAD_AFTER:.0f} s")
            if time.monotonic() - beat > PULSE:
                beat = time.monotonic()
                self.say("alive")

    def _follow(self, line, end):
        word, _, rest = line.partition(" ")
        if word == "lost":
            self.why = f"host {rest}"
            self.lost.set()
            if " has ended: " in rest:
                time.sleep(GRACE)
            end(self.why)

    def leave(self, line="bye"):
        """Tells the keeper that this process ends, and on host 0 waits for it."""
        self._left = True
        self.say(line)
        if self._keeper is not None and line == "bye":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(DEAD_AFTER)


def knock(coordinator, seconds):
    """A connection to the keeper; UserError if there is none within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address_of(coordinator), timeout=min(5.0, max(0.1, end - time.monotonic())))
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or "no answer"
                remedy = "start the same command there with --host 0, or look at its output, and at the port"
                what = f"host 0 did not come within {seconds / 60:g} minutes: nobody answers at {coordinator}"
                raise UserError(f"{what} ({reason}): {remedy}") from None
            time.sleep(0.2)


def start_keeper(coordinator, count, seconds):
    """The keeper's process; UserError if it cannot have the port."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from onechip.keeper import keep; "
    command = [sys.executable, "-c", f"{code}keep({coordinator!r}, {count}, {seconds})"]
    away = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "start_new_session": True,  # no Ctrl-C reaches it
    }
    process = subprocess.Popen(command, text=True, **away)
    said = process.stdout.readline().split(maxsplit=1)
    if said != ["open"]:
        reason = said[1].strip() if len(said) > 1 else "it has ended"
        raise UserError(f"coordinator={coordinator!r}: its port cannot be opened here ({reason}): choose another one")
    return process
