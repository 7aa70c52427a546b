"""Whether an answer is right: the number after ####, and programs by their tests, as nanochat and the data sets' own
authors grade them."""

import re

from onechip.sandbox import run_python

NUMBER = re.compile(r"#### (-?[0-9.,]+)")  # the first one, as in openai/grade-school-math's dataset.py
CALL = re.compile(r"<<([^>]+)>>")
FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def find_number(text):
    """What follows the first "#### " in a text, a string without commas; None if no number does."""
    found = NUMBER.search(text)
    return found and found[1].replace(",", "")


def same_number(reference, answer):
    """Whether an answer names the reference's number: equal as strings, so that 5.0 is not 5."""
    number = find_number(answer)
    return number is not None and number == find_number(reference)


def calculator_parts(solution):
    """GSM8K's solution as an assistant's parts: each <<48/2=24>> is the python 48/2 and its output 24."""
    parts = []
    for i, piece in enumerate(CALL.split(solution)):
        if i % 2 == 0:
            parts.append({"type": "text", "text": piece})
        else:
            code, _, result = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts += [{"type": "python", "text": code}, {"type": "python_output", "text": result}]
    return parts


def find_imports(prompt):
    """The import lines at the head of a program, above which only comments and blank lines stand."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def find_program(answer):
    """The first fenced block of an answer, or all of it if it has none."""
    found = FENCED.search(answer)
    return (found[1] if found else answer).strip()


def checked_program(prompt, answer, test, entry_point):
    """A program that fails unless the answer passes HumanEval's test: imports, answer, test, check(entry_point)."""
    return f"{find_imports(prompt)}\n\n{find_program(answer)}\n\n{test}\ncheck({entry_point})"


def run_checked(program, limits=None):
    """Whether a program, as `checked_program` makes it, runs to its last line in the sandbox: chat_tasks' run(program).

    UserError where this machine offers no sandbox: onechip.sandbox.describe_protection() says why, before any is run.
    """
    return run_python(program, limits).finished
