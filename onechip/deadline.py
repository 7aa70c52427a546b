"""A process whose hours are counted, such as a Colab session's: when a run has to end so that its state is saved."""

import time

from onechip.machine import process_age
from onechip.weights import bytes_of
from onechip.writer import DISK_SPEED, pause_seconds

UPLOAD_SPEED = 30e6  # bytes/s to the Hub, where no upload has been measured yet
SLACK = 120.0  # seconds for the step in hand and what follows training


class Deadline:
    """When a run has to end for its last checkpoint to be written, and be on the Hub, within the process's hours."""

    def __init__(self, hours):
        """hours: since the process was started; 0 for no limit."""
        self._hours, self.passed = hours, False
        self._end = time.monotonic() - process_age() + 3600 * hours  # s

    def has_come(self, state, mirror=None):
        """Whether this was the last step: a state of that size can be saved now, later perhaps not any more."""
        if self._hours and not self.passed:
            self.passed = time.monotonic() > self._end - time_to_save(state, mirror)
        return self.passed

    def describe(self):
        """Why the run ends."""
        return f"ended for session_hours={self._hours:g}"


def time_to_save(state, mirror=None):
    """Seconds to plan for the last checkpoint of a state, a pytree of arrays: pause, writing, upload if any."""
    size = bytes_of(state)
    upload = (mirror.seconds or size / UPLOAD_SPEED) if mirror else 0.0
    return SLACK + pause_seconds(size) + size / DISK_SPEED + 1.25 * upload
