"""A trace of a few training steps, for XProf."""

import contextlib
import sys
import types
from pathlib import Path

import jax

from onechip.errors import first_line, say_above_bars
from onechip.hosts import is_first


@contextlib.contextmanager
def without_tensorflow():
    """Puts an empty module in TensorFlow's place: jaxlib 0.7's profiler complains on stderr where there is none."""
    names = {"tensorflow", "tensorflow.python.profiler.trace"} - set(sys.modules)
    sys.modules |= {name: types.ModuleType(name) for name in names}
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class ProfileWindow:
    """Traces `count` steps, from step `first` on, into `folder`; a run too short for that has its last steps traced.

    A disk that does not take the trace costs the trace: a line says so, and training goes on.

    Five steps by default: a longer trace loses its device rows (jax#23446) or comes out empty.
    """

    def __init__(self, folder, num_steps, first=15, count=5):
        """num_steps: the steps that this process will run; steps are counted from 0 here."""
        self._folder = Path(folder)
        self._first = max(0, min(first, num_steps - count))
        self._last = min(num_steps, self._first + count) - 1
        self._on = False

    def before(self, step):
        """Starts the trace if `step` is its first; returns the context manager that annotates the step."""
        if step == self._first and is_first():
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's frames would be most of the file
            self._on = self._try(jax.profiler.start_trace, self._folder, profiler_options=options)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step, result):
        """Stops the trace if `step` is its last, after waiting for `result`, what the step computes on the device."""
        if self._on and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self):
        """Stops the trace if it is on."""
        if self._on:
            self._on = False
            self._try(jax.profiler.stop_trace)

    def _try(self, action, *args, **options):
        try:
            with without_tensorflow():
                action(*args, **options)
        except (OSError, RuntimeError) as error:  # jaxlib's own are RuntimeErrors
            say_above_bars(f"profile: none in {self._folder} ({first_line(error)})")
            return False
        return True
