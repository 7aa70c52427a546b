"""The data loader: a thread that prepares the next batches while training works on the current one."""

import contextlib
import queue
import threading

from onechip.hosts import host_count
from onechip.machine import is_interrupted


def is_closing():
    """Whether this thread is that of a loader which is being closed: what waits for something in it gives up then."""
    closing = getattr(threading.current_thread(), "closing", None)
    return closing is not None and closing.is_set()


class PrefetchDataLoader:
    """Iterates over (place(item), state) for the (item, state) pairs of `batches`, prepared ahead in a thread.

    `depth` batches wait on the device while one more is prepared. `close()` (or leaving a `with` block) ends the thread
    and frees the waiting batches; what waits in the thread for longer asks `is_closing`. An error in the thread is
    raised here by the next `next()`, before any of them. Where a batch is not ready, an interrupt that a
    deferred_interrupt has noted is raised as KeyboardInterrupt: the batch may be hours away. Not on one of several
    hosts: the others are in the step, and wait for it.
    """

    def __init__(self, batches, place=lambda item: item, depth=2):
        self._batches, self._place = batches, place
        self._ready = queue.Queue(depth)
        self._stop = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.closing = self._stop
        self._thread.start()

    def _work(self):
        try:
            for item, state in self._batches:
                self._offer((self._place(item), state))
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._error = error
        finally:
            if hasattr(self._batches, "close"):  # a generator
                self._batches.close()

    def _offer(self, pair):
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(pair, timeout=0.05)

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            if self._error is not None:
                raise self._error
            ended = self._stop.is_set() or not self._thread.is_alive()
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=0 if ended else 0.05)
            if ended and self._error is None:
                raise StopIteration
            if is_interrupted() and host_count() == 1:
                raise KeyboardInterrupt

    def close(self):
        """Ends the thread and frees what it has prepared."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
