"""onechip/calculator.py: what it computes, as Python would, and all that it does not."""

import random
import time

import pytest

from onechip.calculator import DEEPEST_FORMULA, LONGEST_FORMULA, calculate


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48/2", "24.0"),
        ("48+24", "72"),
        ("1,234 * 2", "2468"),
        ("1,234,567.5 - .5", "1234567.0"),
        ("2+3*4-5", "9"),
        ("2-3-4", "-5"),
        ("(2+3)*(4-5)", "-5"),
        ("-(3)--2", "-1"),
        ("7//2", "3"),
        ("0.1+0.2", "0.30000000000000004"),
        ("10*.15", "1.5"),
        ("1/3", "0.3333333333333333"),
        (" 5. ", "5.0"),
        ("00", "0"),
        ('"strawberry".count("r")', "3"),
        ("'Mississippi'.count('ss')", "2"),
        ("\"it's, all\".count(',')", "1"),
        ("'1,234'.count(\",\")", "1"),
        ("'naïve'.count('ï')", "1"),
        ("'a'.count('')", "2"),
        ("'profile'.count('file') + 1", "2"),
    ],
)
def test_what_it_computes(text, result):
    """As Python prints it, without the commas of numbers, but with those of strings."""
    assert calculate(text) == result


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "1/0", "1//0", "0./0", "2**3", "2 ** 3", "2* *3", "7%2", "1 2", "3(4)", "(1", "1)", "1,", ",1",
        "1,,2", "1 ,2", "007", "1.2.3", "1e5", "0x10", "1_000", "1j", "a", "x=1", "1;2",
        "1\n+1", "1+", "*1", "True", "1<2", "[1]",
        "'a'", "'a'.count", "'a'.count(", "'a'.count('a'", "'a'.count(1)", "'a'.count('a', 1)", "'a'.counter('a')",
        "'a'.upper()", "'a'*9", "'a' 'b'.count('a')", "'a\\x62'.count('b')", "'a\nb'.count('a')", "'a.count('a')",
        "''.count(''.count(''))", "1.count('1')", "__import__('os')", "().__class__", "(lambda: 1)()",
        "f'{1}'.count('1')",
        "1²", "²", "٣", "１", "1\x00", "\u2028", "1+1#",
    ],
)  # fmt: skip
def test_what_it_does_not_compute(text):
    """Everything else is None, and nothing raises."""
    assert calculate(text) is None


def random_arithmetic(depth):
    """A random expression that Python can read."""
    if depth == 0:
        return random.choice([str(random.randint(0, 99)), f"{random.uniform(0, 9):.2f}", ".5", "3."])
    inside = random_arithmetic(random.randrange(depth))
    other = random_arithmetic(random.randrange(depth))
    sign = random.choice(["+", "-", "*", "/", "//", " + ", " - "])
    return random.choice([f"({inside})", f"-{inside}", f"{inside}{sign}{other}", f"{inside}{sign}({other})"])


def test_equal_to_python():
    """On 2,000 random expressions the results are Python's, and None where Python divides by zero."""
    random.seed(7)
    for _ in range(2000):
        text = random_arithmetic(5)
        try:
            expected = str(eval(text, {"__builtins__": {}}))  # of our own making
        except ArithmeticError:
            expected = None
        assert calculate(text) == expected, text


def test_results_are_finite():
    """Neither infinite, nor not a number, nor too large for a float."""
    large = "9" * 400
    assert calculate(f"{large}/3") is None and calculate(f"{large}.0") is None
    assert calculate(f"{'9' * 300}.0 * {'9' * 300}") is None
    assert calculate(f"{large}*{large}") == str(int(large) ** 2)


@pytest.mark.parametrize(
    "unit", ["(", "-", "1+", "9", "9*", "(1+", "'", "''.count(", ",", "1,", " ", ".", "9999999999*"]
)
def test_bounded(unit):
    """Texts of the greatest length, deep or wide, and of a million characters end at once."""
    started = time.monotonic()
    for length in (LONGEST_FORMULA, 1_000_000):
        text = (unit * (length // len(unit) + 1))[: length - 1]
        for whole in (text, text + "1", text + ")"):
            result = calculate(whole)
            assert result is None or len(result) <= LONGEST_FORMULA
    assert time.monotonic() - started < 1


def test_depth():
    """Brackets up to the depth, and not beyond."""
    assert calculate("(" * DEEPEST_FORMULA + "7" + ")" * DEEPEST_FORMULA) == "7"
    assert calculate("(" * (DEEPEST_FORMULA + 1) + "7" + ")" * (DEEPEST_FORMULA + 1)) is None
    assert calculate("-" * (DEEPEST_FORMULA + 1) + "7") is None
