"""What is asked of the engine, and what comes back: a Request and its Answer."""

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable

from onechip.errors import require

MOST_STOPS = 8  # tokens of a request that its row rests after: an array's width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A text to be continued.

    tokens: its ids; max_new_tokens: forced ones included; temperature: 0 for the likeliest token; top_k: 0 for all;
    top_p: 1 for all, else the fewest likeliest tokens that have this probability together, of those that top_k leaves;
    seed: what is drawn depends on it and on the text alone. stop: ids that end the answer, which has them too.
    pause: ids after which nothing is written until `hook` has seen them. hook(answer, new): called by the engine with
    the ids that are new; it may call the answer's force, hold and stop. on_tokens(answer, new): the same, after it;
    also called when the answer ends: answer.reason is set then. An error in either ends this answer, and no other.
    """

    tokens: list
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple = ()
    pause: tuple = ()
    hook: Callable | None = None
    on_tokens: Callable | None = None


def check_request(request, vocab_size, length):
    """UserError unless a vocabulary and an engine for texts of `length` tokens can serve a Request."""
    r, room = request, length - len(request.tokens)
    require(len(r.tokens) > 0, "tokens", r.tokens, "give at least one token, such as <|bos|>")
    require(room > 0, "tokens", len(r.tokens), f"a text has at most {length} tokens, the new ones included")
    require(0 < r.max_new_tokens <= room, "max_new_tokens", r.max_new_tokens, f"there is room for 1 to {room}")
    require(0 <= r.temperature < math.inf, "temperature", r.temperature, "use 0 (greedy) or more")
    require(0 <= r.top_k <= vocab_size, "top_k", r.top_k, f"use 0 (all) to vocab_size={vocab_size}")
    require(0 < r.top_p <= 1, "top_p", r.top_p, "use a probability above 0, at most 1 (all)")
    require(0 <= r.seed < 2**32, "seed", r.seed, "use a whole number from 0 to 2**32 - 1")
    require(len(r.stop) + len(r.pause) <= MOST_STOPS, "stop", r.stop, f"use at most {MOST_STOPS}, with those of pause")
    for name in ("tokens", "stop", "pause"):
        outside = [i for i in getattr(r, name) if not 0 <= i < vocab_size]
        require(not outside, name, outside[:1], f"ids go from 0 to {vocab_size - 1}")


class Answer:
    """How far a Request has come. Its methods may be called from any thread.

    tokens: the new ids; log_probabilities: of each, at temperature 1 and among all tokens; mask: 1 where the model
    chose, 0 where the token was forced: three lists of one length. reason: None while it is being written, then
    "stop", "length", "cancelled" or "error"; error: what was raised, for the last one.
    """

    def __init__(self, request, changed):
        """changed: the engine's threading.Condition, which is notified when a row can be written again."""
        self.request, self.tokens, self.log_probabilities, self.mask = request, [], [], []
        self.reason, self.error = None, None
        self.forced, self.held, self.ending = deque(), False, None
        self._changed, self._done = changed, threading.Event()

    def force(self, tokens):
        """The next tokens are these ids; a row that was held is written again."""
        with self._changed:
            self.forced.extend(tokens)
            self.held = False
            self._changed.notify_all()

    def hold(self):
        """Nothing is written until `force` is called, while other rows go their way."""
        with self._changed:
            self.held = True

    def stop(self, reason="stop"):
        """Ends the answer with what it has; its row is free at the engine's next step."""
        with self._changed:
            self.ending = self.ending or reason
            self._changed.notify_all()

    def cancel(self):
        """Ends the answer as "cancelled"."""
        self.stop("cancelled")

    def wait(self, timeout=None):
        """Waits for the end, at most `timeout` seconds; whether it has come. Something else must run the engine."""
        return self._done.wait(timeout)

    def take(self, tokens, log_probabilities):
        """Adds what a dispatch wrote, calls the hook, and finds out whether this is the end."""
        forced = min(len(self.forced), len(tokens))
        for _ in range(forced):
            self.forced.popleft()
        self.tokens += tokens
        self.log_probabilities += log_probabilities
        self.mask += [0] * forced + [1] * (len(tokens) - forced)
        chosen = len(tokens) > forced
        try:
            if self.request.hook:
                self.request.hook(self, tokens)
        except Exception as error:
            self.error, self.ending = error, "error"
        if not self.ending and chosen and tokens[-1] in self.request.stop:
            self.ending = "stop"
        if not self.ending and len(self.tokens) >= self.request.max_new_tokens:
            self.ending = "length"
        self.tell(tokens)

    def tell(self, tokens):
        """Calls on_tokens with new tokens; sets the reason first if this is the end."""
        self.reason = self.ending
        try:
            if self.request.on_tokens:
                self.request.on_tokens(self, tokens)
        except Exception as error:
            self.error, self.ending, self.reason = error, "error", "error"
        if self.reason:
            self._done.set()
