"""Uploads of a run's checkpoints: how often they are due, and what is said about them."""

import collections
import math
import time

from onechip.errors import say, say_above_bars
from onechip.hubclient import describe_error, status_of

LATER = "training continues and tries it with the next checkpoint"  # what follows a failure

PROMISE = 75.0  # minutes of work at most that are lost with a machine


class Pace:
    """When an upload is due, by the clock and by how often checkpoints come and how long an upload takes; seconds."""

    def __init__(self, weights, state):
        self._limits = (weights, state)
        self._there = [-math.inf, -math.inf]  # when the newest weights and whole checkpoint on the Hub were offered
        self._offered, self._intervals = None, collections.deque(maxlen=10)
        self._whole = math.inf  # when the one that is there whole was offered, whatever failed since
        self.upload = 0.0  # of the last whole one

    def note_offer(self):
        """A checkpoint has come; returns the time."""
        now = time.monotonic()
        if self._offered is not None:
            self._intervals.append(now - self._offered)
        self._offered = now
        return now

    def due(self):
        """Whether (weights, a whole checkpoint) must go up now, as with the next checkpoint it would be late."""
        now, interval = time.monotonic(), max(self._intervals, default=0.0)
        ends = (now + interval, now + interval + self.upload)
        return [end - at > limit for end, at, limit in zip(ends, self._there, self._limits, strict=True)]

    def note_upload(self, offered, began, whole):
        """What was offered then is on the Hub; returns minutes of work that were not, if more than PROMISE, or None."""
        self._there[0] = offered
        if not whole:
            return None
        now = time.monotonic()
        at_stake = (now - self._whole) / 60  # until a moment ago
        self._there[1], self._whole, self.upload = offered, offered, now - began
        return at_stake if at_stake > PROMISE else None

    def note_failure(self):
        """What failed is due with the next checkpoint."""
        self._there = [-math.inf, -math.inf]


class UploadReport:
    """What is printed about the uploads to a place: a failure when it happens, a recovery, and a sum at the end.

    Failures of the same kind in a row, as each checkpoint has while the network is down, are one line.
    """

    def __init__(self, repo, token):
        self._repo, self._token = repo, token
        self._failures, self._last_failure, self._kind, self._last_good = 0, "", None, "none"
        self._warned = False

    def failed(self, name, error, text):
        """name: the checkpoint's; error: what its upload ended with; text: the line about it."""
        cause = error.__cause__ or error
        kind = type(cause), status_of(cause)
        if kind != self._kind:
            say_above_bars(f"upload: {text}")
        self._failures += 1
        self._last_failure, self._kind = f"{name} ({describe_error(cause, self._token)})", kind

    def worked(self, name):
        """name: that of the checkpoint that is on the Hub now."""
        if self._kind:
            say_above_bars(f"upload: works again, {name} is on {self._repo}")
        self._last_good, self._kind = f"{name} at {time.strftime('%Y-%m-%d %H:%M')}", None

    def warn(self, minutes):
        """minutes: of work that would have been lost with this machine; said once."""
        if not self._warned:
            self._warned = True
            rest = f"so much may be lost with this machine; the promise is {PROMISE:.0f}"
            say_above_bars(f"upload: {minutes:.0f} minutes of work were not on {self._repo}; {rest}")

    def sum_up(self):
        """Prints one line if any upload failed."""
        if self._failures:
            last = f"the last of them {self._last_failure}; the last one that worked: {self._last_good}"
            say(f"upload: {self._failures} to {self._repo} failed, {last}")
