"""Answers in the format of OpenAI's API, whole or as events of a stream.

Tools are run by the server itself, which that format has no words for: content has the text alone, as every client
reads it. What happened in full is next to it, for clients that show it: a whole answer's message has `parts`, a
stream's delta `part`, each {"type": text, python or python_output, "text"}; messages that are sent back may have them
as their content.
"""

import json
import secrets
import time

from onechip.talker import TalkDone, TextPiece, add_part, part_of, text_of


def usage_of(done):
    """The numbers of tokens of a TalkDone."""
    total = done.prompt_tokens + done.completion_tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens, "total_tokens": total}


def to_sse(value):
    """A value as one event of a stream, bytes."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


END_OF_STREAM = b"data: [DONE]\n\n"
KEEP_ALIVE = b": the answer is being written\n\n"  # a comment, which clients skip


class Reply:
    """The answer to one request. ask: an Ask (onechip/openai_requests.py); model: the name it is given under."""

    def __init__(self, ask, model):
        self._ask, self._parts = ask, []
        kind = ("chat.completion" if ask.chat else "text_completion") + (".chunk" if ask.chat and ask.stream else "")
        prefix = "chatcmpl" if ask.chat else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self._head["model"] = model

    def _chunk(self, choices, **more):
        usage = {"usage": None} if self._ask.usage else {}
        return to_sse(self._head | {"choices": choices} | usage | more)

    def _choice(self, delta, finish=None):
        if self._ask.chat:
            said = {"delta": delta}
        else:
            said = {"text": delta.get("content") or ""} | ({"part": delta["part"]} if "part" in delta else {})
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def opening(self):
        """What a stream begins with, bytes."""
        return self._chunk([self._choice({"role": "assistant", "content": ""})]) if self._ask.chat else b""

    def event(self, event):
        """An event as bytes of a stream; TalkDone ends it, with the numbers of tokens if they were asked for."""
        if isinstance(event, TextPiece):
            return self._chunk([self._choice({"content": event.text})])
        if not isinstance(event, TalkDone):
            return self._chunk([self._choice({"part": part_of(event)})])
        last = self._chunk([self._choice({}, event.reason)])
        return last + (self._chunk([], usage=usage_of(event)) if self._ask.usage else b"") + END_OF_STREAM

    def add(self, event):
        """Keeps an event of an answer that is sent whole."""
        add_part(self._parts, event)

    def whole(self, done):
        """The answer, a dict, from all events that were added. done: its TalkDone."""
        text = text_of(self._parts)
        if self._ask.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None, "parts": self._parts}}
        else:
            said = {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": done.reason}
        return self._head | {"choices": [choice], "usage": usage_of(done)}


def model_entry(talker, created):
    """A model as /v1/models shows it. created: seconds since 1970; context_window is an addition to the format."""
    about = {"id": talker.name, "object": "model", "created": created, "owned_by": "onechip"}
    return about | {"context_window": talker.context}
