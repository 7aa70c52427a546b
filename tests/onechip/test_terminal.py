"""A chat in a real terminal, by keys, and through a pipe."""

import codecs
import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SUPPORT

PROGRAM = f"""
import sys
sys.path[:0] = {[str(ROOT), str(SUPPORT)]!r}
from onechip.errors import report_in_one_line
from onechip.talker import TalkSettings, TextPiece
from onechip.terminal import talk_in_terminal
from scripted import ScriptedModel, endless, last_text, say_back
def script(prompt):
    if "long" in last_text(prompt):
        return endless(prompt)
    return [TextPiece("\\x1b[31mred\\x07")] if "escape" in last_text(prompt) else say_back(prompt)
report_in_one_line()
talk_in_terminal(ScriptedModel(script, pause=0.01, context=10**6).talker(), TalkSettings())
"""

# Of a process that leads a session of its own: its input is the terminal whose keys become signals.
TAKE_TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


class Terminal:
    """A program in a pseudo-terminal of its own session, whose foreground it is: Ctrl-C reaches it as a signal."""

    def __enter__(self):
        self.keys, screen = pty.openpty()
        command = [sys.executable, "-c", f"{TAKE_TERMINAL}{PROGRAM}"]
        environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
        streams = {"stdin": screen, "stdout": screen, "stderr": screen}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.close(screen)
        self.shown, self._decoder = "", codecs.getincrementaldecoder("utf-8")()  # a read may end within a character
        return self

    def __exit__(self, *exception):
        os.close(self.keys)
        self._process.kill()
        self._process.wait()

    def press(self, keys):
        os.write(self.keys, keys.encode())

    def wait_for(self, text):
        """Reads until `text` has been shown; returns what was shown since the last one."""
        while text not in self.shown:
            self.shown += self._decoder.decode(os.read(self.keys, 1 << 16))
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def exit_status(self):
        """Reads to the end of the output and returns the program's exit status."""
        with contextlib.suppress(OSError):  # Linux reports the end of a pseudo-terminal so
            while more := os.read(self.keys, 1 << 16):
                self.shown += self._decoder.decode(more)
        return self._process.wait()


@pytest.fixture
def terminal(in_time):
    with Terminal() as terminal:
        terminal.wait_for("> ")
        yield terminal


def test_an_answer_comes_as_it_is_written(terminal):
    """It is shown bit by bit; a tool's lines are faint; the line can be edited; Ctrl-D leaves with status 0."""
    terminal.press("what is 12*9\x7f34?\r")
    assert "Let me see." in terminal.wait_for("python> 12*34")
    shown = terminal.wait_for("It is 408.")
    assert "\x1b[2moutput> 408\x1b[22m" in shown
    terminal.wait_for("> ")
    terminal.press("\x04")
    assert terminal.exit_status() == 0


def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(terminal):
    """The first ends the answer, and the next question is answered; at the prompt it leaves with status 0."""
    terminal.press("a long story\r")
    terminal.wait_for("word5 ")
    terminal.press("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.press("hello\r")
    terminal.wait_for("You said: hello")
    terminal.wait_for("> ")
    terminal.press("\x03")
    assert terminal.exit_status() == 0 and "Traceback" not in terminal.shown


def test_commands_and_escapes(terminal):
    """Commands answer in a line; a model's escape sequence is shown, not obeyed."""
    for line, answer in {"/temperature 0": "temperature: 0", "/help": "/quit ", "/new": "a new conversation"}.items():
        terminal.press(f"{line}\r")
        terminal.wait_for(answer)
        terminal.wait_for("> ")
    terminal.press("escape\r")
    terminal.wait_for("escape")
    assert "\u241b[31mred\u2407" in terminal.wait_for("\u2407")
    terminal.wait_for("> ")
    terminal.press("/quit\r")
    assert terminal.exit_status() == 0


def pipe(text, **more):
    """What the program does with `text` as its standard input."""
    return subprocess.run([sys.executable, "-c", PROGRAM], input=text, capture_output=True, timeout=25, **more)


def test_lines_through_a_pipe(in_time):
    """Answers and nothing else, each ended by a line break; no prompt, no colour; the end of the input is the end."""
    done = pipe(b"hello\n/temperature 0\nwhat is 2*3\nescape")
    assert (done.returncode, done.stderr) == (0, b"")
    expected = "You said: hello\ntemperature: 0\nLet me see. \npython> 2*3\noutput> 6\nIt is 6.\n\u241b[31mred\u2407\n"
    assert done.stdout.decode() == expected


def test_a_pipe_that_breaks_and_no_input(in_time):
    """Bytes that are no text, an output that is closed early and a closed input end in at most one line of error."""
    assert pipe(b"\xff\xfe\n/quit\n").returncode == 0
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        process.stdout.read(3)
        process.stdout.close()
        process.stdin.write(b"and more\n")
        process.stdin.close()
        assert process.wait(20) == 0 and b"Traceback" not in process.stderr.read()
    closed = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, PROGRAM], capture_output=True, timeout=25
    )
    assert re.fullmatch(rb"error: talk: there is no standard input.*\n", closed.stderr) and closed.returncode == 1


def test_ctrl_c_through_a_pipe(in_time, interruptible):
    """Ctrl-C stops the answer to one line, and the next line is answered."""
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdin.write("a long story\nhello\n")
        process.stdin.close()
        assert process.stdout.read(6) == "word0 "
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith("\n(stopped)\nYou said: hello\n") and process.wait(20) == 0
