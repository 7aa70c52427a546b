"""A chat in a terminal, or with lines that come through a pipe."""

import contextlib
import os
import sys

from onechip.conversation import Conversation
from onechip.errors import SafeStream, UserError

PROMPT = "> "


def talk_in_terminal(talker, settings):
    """Reads questions from standard input and writes answers as they come, until its end, /quit or Ctrl-C.

    settings: the TalkSettings to begin with. In a terminal there is a prompt, and lines can be edited; through a pipe
    each line is a question, and nothing but answers is written. UserError if there is no standard input.
    """
    if sys.stdin is None:
        raise UserError("talk: there is no standard input to read questions from")
    out, is_terminal = SafeStream(sys.stdout), sys.stdin.isatty() and sys.stdout.isatty()

    def write(text):
        out.write(text)
        out.flush()

    plain = not is_terminal or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    conversation = Conversation(talker, settings, write, str if plain else dim)
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (from now on input() can edit lines and has a history)
        write(f"{talker.name}: ask something; /help lists commands, Ctrl-D leaves\n")
    ask_until_done(conversation, PROMPT if is_terminal else "")
    if is_terminal:
        write("\n")


def ask_until_done(conversation, prompt):
    """Hands a Conversation line after line of input() until one ends it, or Ctrl-C, or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while conversation.take_line(input(prompt)):
            pass


def dim(text):
    """A line in the terminal's fainter letters."""
    return f"\x1b[2m{text}\x1b[22m"
