"""Bad input in one line: what is raised, what is required, and how a line is printed."""

import contextlib
import os
import sys


class UserError(ValueError):
    """Bad input. The message is one line: the field or file, its value, and what would be right."""


class NonFiniteLoss(UserError):
    """A loss or gradient that is infinite or not a number."""


def show_value(value):
    """A value as Python writes it, cut to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


def require(condition, field, value, remedy):
    """Raises UserError with the field, its value and what would be right, unless the condition holds."""
    if not condition:
        raise UserError(f"{field}={show_value(value)}: {remedy}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def in_notebook():
    """True in a Jupyter or Colab kernel, false in a script and in a terminal's IPython."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


class SafeStream:
    """A text stream whose write and flush never raise, so that a run outlives the terminal it was started in.

    Characters that the stream's encoding lacks are written as escapes. A standard stream that fails, because its
    reader left, its terminal was closed or its disk is full, is connected to nothing from then on.
    """

    def __init__(self, stream):
        """stream: a text stream, or None, which sys.stdout is if it was closed before Python started."""
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Writes text; returns its length, as any stream does."""
        if self._stream is not None:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            with self._disconnected_on_error():
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        """Writes out what is buffered."""
        if self._stream is not None:
            with self._disconnected_on_error():
                self._stream.flush()

    @contextlib.contextmanager
    def _disconnected_on_error(self):
        try:
            yield
        except (OSError, ValueError) as error:  # a ValueError: the program itself has closed the stream
            if self._disconnect() and self._stream is sys.__stdout__:
                SafeStream(sys.__stderr__).write(f"stdout failed ({first_line(error)}); continuing without it\n")

    def _disconnect(self):
        """Connects a standard stream to nothing; whether it did. Without this, Python's flush at exit fails again."""
        if self._stream not in (sys.__stdout__, sys.__stderr__):
            return False
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
            self._stream.flush()  # what is still in its buffer
            return True
        return False


def say(text):
    """Prints one line at once, since Colab holds back what is not flushed. Never raises: see SafeStream."""
    stream = SafeStream(sys.stdout)
    stream.write(f"{text}\n")
    stream.flush()


def say_above_bars(text):
    """Prints a line as `say` does, above the progress bars that are on screen; from any thread."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        say(text)


def print_safely():
    """Makes every print, progress bar and warning of a script as safe as `say`; a kernel's streams are safe already."""
    if in_notebook():
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream or open(os.devnull, "w")))


def print_one_line_errors(kind, error, traceback):
    """An excepthook for scripts: bad input is reported in one line, any other error with its traceback."""
    if issubclass(kind, UserError):
        SafeStream(sys.stderr if sys.__stderr__ else sys.stdout).write(f"error: {error}\n")
    else:
        sys.__excepthook__(kind, error, traceback)


def report_in_one_line():
    """Has a script report bad input in one line instead of a traceback. Does nothing in a notebook."""
    if not in_notebook():
        sys.excepthook = print_one_line_errors


class Stop(SystemExit):
    """Ends what runs, because all that was asked for is done; a notebook shows nothing of it."""

    def _render_traceback_(self):
        return []


def stop_here():
    """Ends a script, or in a notebook the cell and those after it, without an error."""
    raise Stop
