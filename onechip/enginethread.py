"""An engine in a thread of its own: requests come from any other, and answers are read there as they are written."""

import dataclasses
import queue
import threading

from onechip.errors import UserError


class EngineThread:
    """Owns an Engine: nothing else may call its `step` until `close`.

    with EngineThread(engine) as writer:
        answer = writer.submit(Request(...))  # answer.cancel() ends it
        for tokens in writer.stream(Request(...)):  # lists of ids, until the answer has ended
            ...

    If a dispatch fails, all answers end with the reason "error", and no request is taken any more.
    """

    def __init__(self, engine):
        self._engine, self._closing, self._error = engine, False, None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def submit(self, request):
        """The Answer to a Request. UserError for one that cannot be served, and where the engine has stopped."""
        with self._engine.changed:  # so that no request gets in after the last one has been ended
            if self._closing:
                raise UserError(f"the engine has stopped: {self._error or 'it was closed'}")
            return self._engine.submit(request)

    def stream(self, request):
        """Yields lists of new ids as they are written. Leaving early cancels the answer.

        The request's on_tokens must be free. An error of its hook, and of the engine, is raised here.
        """
        arrived = queue.SimpleQueue()

        def listen(answer, tokens):
            arrived.put((tokens, answer.reason))

        answer = self.submit(dataclasses.replace(request, on_tokens=listen))
        try:
            reason = None
            while reason is None:
                tokens, reason = arrived.get()
                if tokens:
                    yield tokens
        finally:
            answer.cancel()
        if answer.error:
            raise answer.error

    def close(self):
        """Cancels what is being written and ends the thread."""
        with self._engine.changed:
            self._closing = True
            self._engine.changed.notify_all()
        self._thread.join()

    def _run(self):
        engine = self._engine
        try:
            while True:
                with engine.changed:
                    engine.changed.wait_for(lambda: self._closing or engine.runnable())
                    if self._closing:
                        break
                engine.step()
        except BaseException as error:
            self._error = error
        with engine.changed:
            self._closing = True
        engine.end_all(self._error)
