"""What one host alone sees between two steps, and all have to obey after the same one: to stop, to save by the clock.

Host 0 decides. At the step where its last order ends, it sets the next in jax's store, "stop", "save" or neither, and
for how many steps that holds; the other hosts wait for it there, and tell it of interrupts of their own by a key each.
An order holds for about two seconds of training, so it costs a third of a millisecond in two seconds, and no
collective: an all-reduce of a flag would have each host wait for the device, which must always have a step queued. No
host can miss an order, however far it has run ahead; "stop after step N", set once, would need N far enough for that.
"""

import collections
import time

from onechip.hosts import agree, host_count, host_index, is_first, list_keys, set_key

SECONDS = 2.0  # of training that an order holds for
MOST_STEPS = 1000
KNOWN = 12  # steps after which their pace is known: the log waits for the device every ten


class Orders:
    """What a run on one or several hosts does after a step. All hosts ask of the same steps in the same order."""

    def __init__(self, stop, save):
        """stop() -> why this host has to stop, in words, or ""; save() -> whether a save is due by host 0's clock."""
        self._stop, self._save, self.why = stop, save, ""
        self._step, self._until, self._saves, self._told = None, -1, False, False
        self._renewals = collections.deque(maxlen=KNOWN + 4)  # (step, s)

    def stops(self, step):
        """Whether the run ends after `step` steps; `why` says the reason."""
        if host_count() == 1:
            self.why = self._stop() or self.why
            return bool(self.why)
        self._look(step)
        return bool(self.why)

    def describe(self):
        """Why the run ends, in words."""
        return self.why or "interrupted"

    def saves(self, step):
        """Whether a checkpoint is due after `step` steps, whatever their number."""
        if host_count() == 1:
            return self._save()
        self._look(step)
        return self._saves and self._step == step

    def _look(self, step):
        if not is_first() and not self._told and (why := self._stop()):
            self._told = True
            set_key(f"onechip/wish/{host_index()}", why)
        if step >= self._until:
            self._renew(step)

    def _renew(self, step):
        order = agree(self._decide(step) if is_first() else None)
        self._step, self._until = step, step + order["steps"]
        self.why, self._saves = order["stop"], order["save"]

    def _decide(self, step):
        """Host 0's order for the steps from `step` on."""
        self._renewals.append((step, time.monotonic()))
        wishes = [f"{why} on host {key.rpartition('/')[2]}" for key, why in list_keys("onechip/wish")]
        return {"stop": self._stop() or "".join(wishes[:1]), "save": self._save(), "steps": self._pace()}

    def _pace(self):
        """Steps that take about SECONDS; one as long as that is not known."""
        (first, then), (last, now) = self._renewals[0], self._renewals[-1]
        if last - first < KNOWN:
            return 1
        return max(1, min(MOST_STEPS, int(SECONDS * (last - first) / max(now - then, 1e-6))))
