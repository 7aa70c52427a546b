"""A Talker whose answers an engine writes: token ids become text, tool calls and their output."""

import queue
import secrets

from onechip.answer import TextRequest
from onechip.conversations import render_prompt
from onechip.errors import UserError
from onechip.talker import PromptTooLong, StopStrings, TalkDone, Talker, TextPiece, ToolCall, ToolOutput
from onechip.textstream import TextStream


class TokenReader:
    """Turns the ids of an answer into events, as they come. tokens: ChatTokens; decode(ids) -> text of plain tokens.

    What stands between python_start and python_end, or output_start and output_end, is one event at its end; what is
    left open there is shown when the answer ends. Other special tokens are left out.
    """

    def __init__(self, tokens, decode, stop):
        """stop: the strings that end the text, see StopStrings."""
        self._tokens, self._decode = tokens, decode
        self._special = set(tokens[:-1])
        self._text, self._stop = TextStream(decode), StopStrings(stop)
        self._event, self._inside = TextPiece, []  # what is being read, and its ids if it is no text

    @property
    def stopped(self):
        """Whether a stop string has come: nothing is read any more."""
        return self._stop.found

    def add(self, ids):
        """Yields the events that these ids complete."""
        opens = {self._tokens.python_start: ToolCall, self._tokens.output_start: ToolOutput}
        for i in ids:
            if i not in self._special:
                yield from self._plain(i)
            elif self._event is not TextPiece:
                yield self._close()
            if i in opens:
                yield from self._rest()
                self._event = opens[i]
            if self.stopped:
                return

    def end(self):
        """Yields what is left when the answer has ended."""
        if self._event is not TextPiece:
            yield self._close()
        yield from self._rest()

    def _plain(self, i):
        if self._event is TextPiece:
            text = self._stop.add(self._text.add([i]))
            yield from [TextPiece(text)] if text else []
        else:
            self._inside.append(i)

    def _close(self):
        """The event of a tool that was open."""
        event, self._event = self._event(self._decode(self._inside)), TextPiece
        self._inside = []
        return event

    def _rest(self):
        """What was held back of the text, as events."""
        text = self._stop.add(self._text.end())
        yield from [TextPiece(piece) for piece in (text, self._stop.rest()) if piece]


class EngineTalk:
    """One answer of an engine, as onechip/talker.py describes a Talk. write(on_tokens) -> the engine's Answer."""

    def __init__(self, write, reader, prompt_tokens):
        self._arrived, self._reader, self._prompt_tokens = queue.SimpleQueue(), reader, prompt_tokens
        self._answer = write(lambda answer, new: self._arrived.put((list(new), answer.reason)))

    def cancel(self):
        self._answer.cancel()

    def __iter__(self):
        reason = None
        try:
            while reason is None:
                ids, reason = self._arrived.get()
                if not self._reader.stopped:
                    yield from self._reader.add(ids)
                    if self._reader.stopped:
                        self._answer.stop()
        finally:
            self._answer.cancel()
        if self._answer.error:
            raise self._answer.error
        yield from () if self._reader.stopped else self._reader.end()
        if reason == "error":
            raise UserError("the engine has stopped")
        yield TalkDone(reason, self._prompt_tokens, len(self._answer.tokens))


def engine_talker(name, writer, engine, tokens, decode, tool=None):
    """A Talker. writer: the EngineThread of `engine`; tokens: ChatTokens; decode(ids) -> text.

    tool: a ToolRunner, for the programs in a chat's answers; None: they are shown and not run. A text that is to be
    continued has no tools.
    """
    ends = (tokens.assistant_end, tokens.bos, tokens.user_start)

    def start(prompt, settings):
        chat = not isinstance(prompt, str)
        ids = render_prompt(tokens, prompt, None) if chat else [tokens.bos, *tokens.encode(prompt)]
        room = engine.length - len(ids)
        if room < 1:
            raise PromptTooLong(f"prompt: {len(ids)} tokens; must leave room for an answer within {engine.length}")
        use = {"pause": tool.pause, "hook": tool.hook} if tool and chat else {}
        seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
        knobs = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p, "seed": seed}
        most = room if settings.max_tokens is None else min(settings.max_tokens, room)
        request = {"tokens": ids, "max_new_tokens": most, "stop": ends} | knobs | use
        write = lambda on_tokens: writer.submit(TextRequest(**request, on_tokens=on_tokens))
        return EngineTalk(write, TokenReader(tokens, decode, settings.stop), len(ids))

    return Talker(name, engine.length, engine.rows, start)
