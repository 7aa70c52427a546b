"""Answers from the threads that write them to the event loop that sends them; and how many there may be at once."""

import asyncio
import collections
import contextlib
import itertools
import threading

from onechip.talker import TalkDone, TextPiece

MOST_EVENTS = 256  # that are sent at once, to a reader who was slow


class NoPlace(Exception):
    """No answer can be started: too many wait already, or one has waited too long."""


class Places:
    """`total` answers at once, `waiting` requests in line for them, served in the order in which they came."""

    def __init__(self, total, waiting):
        self._free, self._line, self._waiting = total, collections.deque(), waiting

    async def take(self, seconds):
        """Takes a place, which `free` gives back; NoPlace at once if the line is full, or after `seconds` in it."""
        if self._free and not self._line:
            self._free -= 1
            return
        if len(self._line) >= self._waiting:
            raise NoPlace("all places are taken, and so is every place in the line for them")
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the turn had come in the same moment
                self.free()
            elif turn in self._line:
                self._line.remove(turn)
            if isinstance(error, TimeoutError):
                raise NoPlace(f"no place became free within {seconds:g} s") from None
            raise

    def free(self):
        """Gives a place back: to the first in the line if there is one."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Relay:
    """One answer: its thread starts a Talk and reads it, an event loop takes its events.

    The thread never waits for the loop, so a client that reads slowly keeps no model waiting. on_end() is called in
    the loop when the thread has ended, whatever ended it.
    """

    def __init__(self, talker, prompt, settings, on_end):
        self._loop, self._on_end = asyncio.get_running_loop(), on_end
        self._events, self._wake, self._lock = collections.deque(), asyncio.Event(), threading.Lock()
        self._talk, self._cancelled = None, False
        self.thread = threading.Thread(target=self._read, args=(talker, prompt, settings), daemon=True, name="answer")
        self.thread.start()

    def _read(self, talker, prompt, settings):
        try:
            talk = talker.start(prompt, settings)
            with self._lock:
                self._talk = talk
            if self._cancelled:
                talk.cancel()
            last = None
            for last in talk:
                self._put(last)
            if not isinstance(last, TalkDone):
                self._put(RuntimeError("the answer ended before its end"))
        except Exception as error:
            self._put(error)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._on_end)

    def _put(self, event):
        self._events.append(event)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake.set)

    def cancel(self):
        """Has the answer end soon; more than once is no error."""
        with self._lock:
            self._cancelled, talk = True, self._talk
        if talk is not None:
            talk.cancel()

    async def take(self):
        """Waits for events and returns those there are, text in a row as one piece. Raises what the Talk raised."""
        while not self._events:
            self._wake.clear()
            await self._wake.wait()
        if isinstance(self._events[0], Exception):
            raise self._events.popleft()
        taken = []
        while self._events and len(taken) < MOST_EVENTS and not isinstance(self._events[0], Exception):
            taken.append(self._events.popleft())
        return join_text(taken)


def join_text(events):
    """Events with pieces of text in a row as one."""
    joined = []
    for is_text, group in itertools.groupby(events, lambda event: isinstance(event, TextPiece)):
        run = list(group)
        joined += [TextPiece("".join(piece.text for piece in run))] if is_text else run
    return joined
