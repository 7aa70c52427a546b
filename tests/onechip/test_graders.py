"""onechip/graders.py: numbers and programs in answers, on fixed answers."""

import subprocess
import sys

import pytest
from chat_data import HUMANEVAL_ROWS

from onechip.errors import UserError
from onechip.graders import (
    calculator_parts,
    checked_program,
    find_imports,
    find_number,
    find_program,
    run_checked,
    same_number,
)
from onechip.sandbox import Limits, describe_protection, find_walls


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 4.\n#### 1,234", "1234"),
        ("#### -7.50 dollars", "-7.50"),
        ("#### 3 then #### 4", "3"),
        ("#### $5", None),
        ("####5", None),
        ("##### 5", "5"),
        ("5", None),
        ("#### 5.", "5."),
    ],
)
def test_numbers(text, number):
    """The first after "#### ", without commas, as it is written."""
    assert find_number(text) == number


def test_numbers_are_compared_as_text():
    """5.0 is not 5, and no answer is not right."""
    assert same_number("x #### 1,000", "so #### 1000 it is")
    assert not same_number("#### 5", "#### 5.0") and not same_number("#### 5", "5") and not same_number("", "")


def test_calculator_calls_become_parts():
    """Text, code and result in turn; a call without "=" has no result; the text comes back."""
    text = "Half is <<48/2=24>>24, all <<48+24=72>>72. <<7>>\n#### 72"
    parts = calculator_parts(text)
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "Half is "), ("python", "48/2"), ("python_output", "24"), ("text", "24, all "), ("python", "48+24"),
        ("python_output", "72"), ("text", "72. "), ("python", "7"), ("python_output", ""), ("text", "\n#### 72"),
    ]  # fmt: skip
    assert calculator_parts("a <<x=1=2>> b")[1]["text"] == "x=1"
    assert calculator_parts("<<1+1=2>>")[0] == {"type": "text", "text": ""}


def test_imports_at_the_head():
    """Comments and blank lines may stand between; the first other line ends them."""
    prompt = "# a\nimport math\n\n  from typing import List\ndef f():\n    import os\n"
    assert find_imports(prompt) == "import math\nfrom typing import List" and find_imports("x = 1\nimport os") == ""


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("Here:\n```python\nx = 1\n\ny = 2\n```\nand\n```\nz = 3\n```", "x = 1\n\ny = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("  x = 1\n", "x = 1"),
        ("```python\nx = 1", "```python\nx = 1"),
        ("```python x = 1```", "```python x = 1```"),
    ],
)
def test_programs_in_answers(answer, program):
    """The first fenced block, or everything."""
    assert find_program(answer) == program


@pytest.mark.parametrize(("body", "right"), [("return x + {}", True), ("return x - {}", False), ("return (", False)])
def test_programs_are_run_against_the_tests(body, right):
    """The program as a whole runs under Python, with the prompt's imports, and fails where the answer is wrong."""
    for i, row in enumerate(HUMANEVAL_ROWS[:2]):
        answer = f"Sure.\n```python\ndef add_{i}(xs: List) -> int:\n    x = xs\n    {body.format(i + (not right))}\n```"
        program = checked_program(row["prompt"], answer, row["test"], row["entry_point"])
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True)
        assert (done.returncode == 0) == right


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("return x + {}", True),
        ("return x - {}", False),
        ("return (", False),
        ("raise SystemExit(0)", False),
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("return [0] * 10**10", False),
        ("import subprocess; subprocess.run('true'); return x + {}", False),
    ],
)
def test_programs_are_graded_in_the_sandbox(body, right):
    """Right is what passes the tests to the last one: no exit before it, no endless loop, no way out of the sandbox."""
    row = HUMANEVAL_ROWS[1]
    answer = f"```python\ndef add_1(xs: List) -> int:\n    x = xs\n    {body.format(1)}\n```"
    program = checked_program(row["prompt"], answer, row["test"], row["entry_point"])
    if find_walls()[0] is None:
        print(describe_protection())
        with pytest.raises(UserError, match="sandbox"):
            run_checked(program)
    else:
        assert run_checked(program, Limits(seconds=10.0, cpu=1)) == right
