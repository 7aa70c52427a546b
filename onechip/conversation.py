"""A conversation in plain text: its history and settings, what a line of the user does, how an answer is written out.

The terminal and the notebook's chat box are this, each with its own way to read a line.
"""

import contextlib
import queue
import signal
import threading
import time
import unicodedata

from onechip.errors import UserError, first_line, require
from onechip.talker import TalkDone, TextPiece, ToolCall, ToolOutput, add_part

HELP = """\
/new             begins a new conversation
/temperature X   how freely the next answers are chosen, 0 to 2; 0: always the most likely token
/help            shows this
/quit            leaves, as Ctrl-D does; Ctrl-C stops an answer, and leaves where none is written"""
# Direction marks: with them a text can be shown in another order than it has.
REORDERING = {chr(i) for i in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
INSIST_SECONDS = 2.0  # s
POLL_SECONDS = 0.05  # between looks at whether Ctrl-C was pressed


def without_controls(text):
    """A text with its control characters as visible signs, so that it cannot move the cursor or give commands."""
    return "".join(map(visible_sign, text))


def visible_sign(char):
    """A character as it may be sent to a terminal: itself, or a sign for it."""
    if char in "\n\t" or (unicodedata.category(char) not in ("Cc", "Cs") and char not in REORDERING):
        return char
    return chr(0x2400 + ord(char)) if ord(char) < 32 else f"<{ord(char):X}>"


class Interrupted:
    """Whether Ctrl-C, or a notebook's stop button, was pressed while this is open.

    It raises nothing meanwhile, but when it is pressed again after INSIST_SECONDS seconds: what it should end hangs.
    """

    pressed = False

    def __enter__(self):
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame):
        if self.pressed and time.monotonic() - self._since > INSIST_SECONDS:
            raise KeyboardInterrupt
        if not self.pressed:
            self.pressed, self._since = True, time.monotonic()

    def __exit__(self, *exception):
        if self._main:
            signal.signal(signal.SIGINT, self._before)


def events_of(talker, prompt, settings):
    """Yields the events of an answer; Ctrl-C cancels it. Raises what the Talk raised.

    The Talk is read by a thread: this one can look at Ctrl-C meanwhile, which would break into the Talk otherwise.
    """
    events = queue.SimpleQueue()

    def read(talk):
        try:
            for event in talk:
                events.put(event)
            events.put(RuntimeError("the answer ended before its end"))
        except Exception as error:
            events.put(error)

    event = None
    with Interrupted() as interrupted:
        talk = talker.start(prompt, settings)
        threading.Thread(target=read, args=(talk,), daemon=True, name="answer").start()
        try:
            while not isinstance(event, TalkDone):
                if interrupted.pressed:
                    talk.cancel()
                with contextlib.suppress(queue.Empty):
                    event = events.get(timeout=POLL_SECONDS)
                    if isinstance(event, Exception):
                        raise event
                    yield event
        finally:
            talk.cancel()


class Conversation:
    """write(text) puts a text out at once; faint(text) -> the text as what tools did is shown."""

    def __init__(self, talker, settings, write, faint=str):
        self._talker, self.settings, self._write, self._faint = talker, settings, write, faint
        self.messages = []

    def take_line(self, line):
        """Does what a line of the user asks for; whether the conversation continues. An error is one line as well."""
        line = line.strip()
        try:
            if line.startswith("/"):
                return self._obey(*line.split(maxsplit=1))
            if line:
                self._answer(line)
        except Exception as error:  # of the model: the conversation survives it
            about = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            self._write(f"error: {without_controls(about)}\n")
        return True

    def _obey(self, command, value=""):
        """Does a command; whether the conversation continues."""
        if command in ("/quit", "/exit"):
            return False
        if command == "/new":
            self.messages = []
            self._write("a new conversation\n")
        elif command == "/temperature":
            self.settings = self.settings._replace(temperature=read_temperature(value))
            self._write(f"temperature: {self.settings.temperature:g}\n")
        elif command == "/help":
            self._write(f"{HELP}\n")
        else:
            self._write(f"{without_controls(command)} is no command; /help lists them\n")
        return True

    def _answer(self, question):
        """Writes an answer out as it comes, and keeps question and answer; neither if there is no answer."""
        asked = [*self.messages, {"role": "user", "content": question}]
        parts, ended = [], True  # ended: at the beginning of a line
        try:
            for event in events_of(self._talker, asked, self.settings):
                add_part(parts, event)
                shown = self._shown(event, ended)
                if shown:
                    self._write(shown)
                    ended = shown.endswith("\n")
        finally:
            self._write("" if ended else "\n")
        if event.reason != "stop":
            why = "cut off: the most tokens were reached" if event.reason == "length" else "stopped"
            self._write(self._faint(f"({why})") + "\n")
        if parts:
            self.messages = [*asked, {"role": "assistant", "content": parts}]

    def _shown(self, event, ended):
        """An event as text; a tool's in lines of its own. ended: whether what is written so far ends a line."""
        if isinstance(event, TextPiece):
            return without_controls(event.text)
        names = {ToolCall: "python", ToolOutput: "output"}
        if type(event) not in names:
            return ""
        lines = without_controls(event[0]).splitlines() or [""]
        marked = [self._faint(f"{names[type(event)]}> {line}") for line in lines]
        return ("" if ended else "\n") + "".join(f"{line}\n" for line in marked)


def read_temperature(value):
    """The number of /temperature; UserError if it is none from 0 to 2."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    require(0 <= number <= 2, "temperature", value, "must be a number from 0 to 2")
    return number
