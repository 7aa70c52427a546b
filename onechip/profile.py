"""A trace of a few steps, for XProf."""

import contextlib
import sys
import types
from pathlib import Path


@contextlib.contextmanager
def without_tensorflow():
    """Gives jaxlib 0.7's profiler an empty module in place of TensorFlow's, whose absence it complains of on stderr."""
    names = {"tensorflow", "tensorflow.python.profiler.trace"} - set(sys.modules)
    sys.modules |= {name: types.ModuleType(name) for name in names}
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class ProfileWindow:
    """Traces `count` steps from `first` into `folder`, for XProf; a run too short for that traces its last ones.

    Five steps: a long trace loses its device rows (jax#23446) or comes out empty.
    """

    def __init__(self, folder, num_steps, first=15, count=5):
        self._folder = Path(folder)
        self._first = max(0, min(first, num_steps - count))
        self._last = min(num_steps, self._first + count) - 1
        self._on = False

    def before(self, step):
        """Starts the trace if `step`, counted from 0 in this process, opens the window; annotates the step."""
        import jax

        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's frames would be most of the file
            with without_tensorflow():
                jax.profiler.start_trace(self._folder, profiler_options=options)
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step, result):
        """Stops the trace, once `result` is computed, if `step` closes the window."""
        import jax

        if self._on and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self):
        import jax

        if self._on:
            with without_tensorflow():
                jax.profiler.stop_trace()
            self._on = False
