"""The data loader: a thread that prepares the next batches while training works on the current one."""

import contextlib
import queue
import threading


class PrefetchDataLoader:
    """Iterates over (place(item), state) for the (item, state) pairs of `batches`, prepared ahead in a thread.

    `depth` batches wait on the device while one more is prepared. `close()` (or leaving a `with` block) ends the thread
    and frees the waiting batches. An error in the thread is raised here by the next `next()`, before any of them.
    """

    def __init__(self, batches, place=lambda item: item, depth=2):
        self._batches, self._place = batches, place
        self._ready = queue.Queue(depth)
        self._stop = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
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
