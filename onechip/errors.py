"""Bad input in one line: what is raised, required, printed."""

import sys


class UserError(ValueError):
    """Bad input. The message is one line: the field or file, its value, and what would be right."""


class NonFiniteLoss(UserError):
    """A loss or gradient that is no longer a number."""


def require(condition, field, value, remedy):
    """Raises UserError naming the field, its value and what would be right, unless the condition holds."""
    if not condition:
        raise UserError(f"{field}={value!r}: {remedy}")


def say(text):
    """Prints one line at once: Colab holds unflushed lines back."""
    print(text, flush=True)


def first_line(error: BaseException) -> str:
    """An error's message, short and on one line, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def print_one_line_errors(kind, error, traceback):
    """An excepthook for scripts: bad input is told in one line, anything else with its traceback."""
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
