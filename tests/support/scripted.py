"""A Talker without a model: what it says is written down, or follows from the question; for tests and bench/."""

import re
import threading
import time

from onechip.talker import PromptTooLong, StopStrings, TalkDone, Talker, TextPiece, ToolCall, ToolOutput


class ScriptedTalk:
    """A Talk of given events, one every `pause` seconds, which ends at its settings' limits or when it is cancelled."""

    def __init__(self, model, events, settings, prompt_tokens):
        self._model, self._events, self._settings, self._prompt_tokens = model, events, settings, prompt_tokens
        self._cancelled = threading.Event()

    def cancel(self):
        self._cancelled.set()

    def __iter__(self):
        try:
            yield from self._answer()
        finally:
            self._model.leave(self)

    def _answer(self):
        stops, count = StopStrings(self._settings.stop), 0
        most = self._model.context if self._settings.max_tokens is None else self._settings.max_tokens
        for event in self._events:
            if self._cancelled.wait(self._model.pause) if self._model.pause else self._cancelled.is_set():
                break
            if isinstance(event, Exception):
                raise event
            count += 1
            yield TextPiece(stops.add(event.text)) if isinstance(event, TextPiece) else event
            if stops.found or count == most:
                break
        yield TextPiece(stops.rest())
        reason = "cancelled" if self._cancelled.is_set() else "length" if count == most and not stops.found else "stop"
        yield TalkDone(reason, self._prompt_tokens, count)


class ScriptedModel:
    """Answers by `script(prompt) -> events`, each `pause` seconds after the last; context: in tokens, a word being one.

    asked: (prompt, settings) of all talks so far; active, most: how many run now, and ran at most.
    """

    def __init__(self, script=None, pause=0.0, places=4, context=200, name="scripted"):
        self.script, self.pause, self.places, self.context, self.name = script or say_back, pause, places, context, name
        self.asked, self._talks, self.most, self._lock = [], set(), 0, threading.Lock()

    @property
    def active(self):
        return len(self._talks)

    def talker(self):
        return Talker(self.name, self.context, self.places, self.start)

    def start(self, prompt, settings):
        words = prompt.split() if isinstance(prompt, str) else [word for m in prompt for word in str(m).split()]
        if len(words) >= self.context:
            raise PromptTooLong(f"prompt: {len(words)} tokens; must leave room for an answer within {self.context}")
        talk = ScriptedTalk(self, self.script(prompt), settings, len(words))
        with self._lock:
            self.asked.append((prompt, settings))
            self._talks.add(talk)
            self.most = max(self.most, len(self._talks))
        return talk

    def leave(self, talk):
        with self._lock:
            self._talks.discard(talk)

    def wait_until_idle(self, seconds=10.0):
        """Waits until no talk runs; AssertionError if one still does after `seconds`."""
        end = time.monotonic() + seconds
        while self.active:
            assert time.monotonic() < end, f"{self.active} talks still run"
            time.sleep(0.01)


def pieces(text):
    """A text as TextPieces, a word each with the blanks after it."""
    return [TextPiece(word) for word in re.findall(r"\S+\s*|^\s+", text)]


def last_text(prompt):
    """The text that is to be answered or continued."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def say_back(prompt):
    """Says the question back; one with a product is computed with a tool first."""
    text = last_text(prompt)
    product = re.search(r"(\d+) ?\* ?(\d+)", text)
    if not product:
        return pieces(f"You said: {text}")
    code, result = product[0], int(product[1]) * int(product[2])
    return [*pieces("Let me see. "), ToolCall(code), ToolOutput(str(result)), *pieces(f"It is {result}.")]


def endless(prompt):
    """Never ends of itself."""
    i = 0
    while True:
        yield TextPiece(f"word{i} ")
        i += 1
