"""Runs a notebook as a process to which something happens before a step: notebook "STEP:WHAT" or "", then flags.

WHAT: a signal, "LATE" for the end of its hours, or the words of an error.

A test that sends it from outside would not know the step.
"""

import os
import runpy
import signal
import sys

from onechip.deadline import Deadline
from onechip.session import Session


def act_at(step, what):
    """Has the process send itself a signal, run out of hours, or raise an error, when it is to train after `step`."""
    real = Session.advance

    def advance(run, train_step):
        if run.step == step:
            run.log.flush()  # all hosts have come as far
            if what == "LATE":
                run._deadline = Deadline(1e-3)
            elif isinstance(what, str):
                raise RuntimeError(what)
            else:
                os.kill(os.getpid(), what)
        real(run, train_step)

    Session.advance = advance


if __name__ == "__main__":
    path, when = sys.argv[1:3]
    sys.argv = [path, *sys.argv[3:]]
    if when:
        step, _, name = when.partition(":")
        act_at(int(step), getattr(signal, f"SIG{name}", name))
    runpy.run_path(path, run_name="__main__")
