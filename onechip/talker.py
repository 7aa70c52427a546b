"""What the web page, the API, the terminal and the notebook's chat box are handed: a Talker, whose answers are events.

A Talker hides the engine: it turns messages into tokens, runs tools, cuts an answer at its stop strings and returns
what happens as a stream. Whatever shows an answer knows nothing else of a model.
"""

from collections.abc import Callable
from typing import NamedTuple

from onechip.errors import UserError


class TalkSettings(NamedTuple):
    """How an answer is written.

    temperature: 0 takes the most likely token each time; top_k: of so many tokens, 0 for all; top_p: of the most likely
    ones with this sum, 0 < top_p <= 1; max_tokens: of the answer, None for as many as fit; seed: 0 to 2**32 - 1, None
    for another one each time; stop: strings, none empty, of which the first ends the answer and is not part of it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple = ()


class TextPiece(NamedTuple):
    """The next characters of an answer: whole ones, never half of a character's bytes."""

    text: str


class ToolCall(NamedTuple):
    """Python that the model wrote, which is run now."""

    code: str


class ToolOutput(NamedTuple):
    """What it printed."""

    text: str


class TalkDone(NamedTuple):
    """The last event. reason: "stop", "length" (of max_tokens or of what fits) or "cancelled"; tokens are counted."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


class Talker(NamedTuple):
    """A model that can be talked to.

    name: what the API calls it; context: how many tokens a prompt and its answer may have together; places: how many
    answers are written at once. start(prompt, settings) -> a Talk, from any thread; prompt is a list of messages as in
    onechip.conversations, or a text to be continued. UserError if it cannot be answered, PromptTooLong if it is long.

    A Talk is iterated over once, by one thread: TextPiece, ToolCall and ToolOutput as they come, at last one TalkDone.
    Its cancel() is for any thread, at any time and more than once: it returns at once, the answer's place is free soon
    after, and the events end with TalkDone("cancelled", ...). An answer whose reader is slow is written all the same:
    events wait for their reader, not the other way around.
    """

    name: str
    context: int
    places: int
    start: Callable


class PromptTooLong(UserError):
    """A prompt that leaves no room for an answer."""


class StopStrings:
    """Cuts a text that comes in pieces at the first of some strings, be it in one piece or in parts of several.

    The first is the one that ends first, or of several that end there the longest. found: whether it has come; what is
    added from then on is dropped.
    """

    def __init__(self, stop):
        """stop: the strings, none of them empty."""
        self._stop, self._held, self.found = stop, "", False

    def add(self, text):
        """The next piece; returns what certainly belongs to the answer by now, and holds back what may be a string."""
        if self.found:
            return ""
        text, self._held = self._held + text, ""
        starts = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if starts:
            self.found = True
            return text[: min(starts)[1]]
        sizes = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        kept = len(text) - max(sizes, default=0)
        self._held = text[kept:]
        return text[:kept]

    def rest(self):
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


PART_OF_EVENT = {TextPiece: "text", ToolCall: "python", ToolOutput: "python_output"}


def part_of(event):
    """A TextPiece, ToolCall or ToolOutput as a part of an assistant's message, {"type", "text"}; None for TalkDone."""
    kind = PART_OF_EVENT.get(type(event))
    return kind and {"type": kind, "text": event[0]}


def add_part(parts, event):
    """Adds what an event brought to `parts`, an assistant's message; text continues the text before it."""
    part = part_of(event)
    if part and part["type"] == "text" and parts and parts[-1]["type"] == "text":
        parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
    elif part:
        parts.append(part)


def text_of(parts):
    """What an assistant's message says, without its tool calls: a string."""
    return "".join(part["text"] for part in parts if part["type"] == "text")
