"""The calculator that a chat model calls: arithmetic, and counting in strings, by a parser of its own."""

import math
import re

LONGEST_FORMULA = (
    1000  # characters; a product has no more digits than its factors, so this bounds every result and all time
)
DEEPEST_FORMULA = 50  # brackets and signs inside one another
DIGITS = "[0-9](?:,?[0-9])*"  # 1,234: a comma between digits is dropped
TOKEN = re.compile(
    rf""" *(?:({DIGITS}(?:\.(?:{DIGITS})?)?|\.{DIGITS})|("[^"\\\n]*"|'[^'\\\n]*')|(\.count\b|\*\*|//|[-+*/()]))"""
)
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
}


class _NotThis(ValueError):
    """What the calculator does not compute."""


def calculate(text):
    """The result as Python prints it, a string; None for all that the calculator does not compute.

    Numbers, + - * / // and brackets; commas between digits are dropped. "strawberry".count("r") is a number too.
    """
    if len(text) > LONGEST_FORMULA:
        return None
    try:
        parser = _Formula(_split(text))
        result = parser.sum(0)
        parser.take("")  # nothing may follow
        return str(result) if isinstance(result, int) or math.isfinite(result) else None
    except (_NotThis, ArithmeticError):
        return None


def _split(text):
    """A text's numbers without commas, strings in their quotes, and signs: a list that ends with an empty string."""
    tokens, start, text = [], 0, text.rstrip(" ")
    while start < len(text):
        found = TOKEN.match(text, start)
        if not found:
            raise _NotThis
        tokens.append(found[1].replace(",", "") if found[1] else found[found.lastindex])
        start = found.end()
    return [*tokens, ""]


def _starts_number(token):
    return token[:1].isdigit() or (token[:1] == "." and token[1:2].isdigit())


def _number(token):
    """An int or float as Python reads it: 007 is neither."""
    if token.isdigit():
        if token[0] == "0" and token.strip("0"):
            raise _NotThis
        return int(token)
    return float(token)


class _Formula:
    """Reads tokens from left to right, products before sums, each method one kind of expression."""

    def __init__(self, tokens):
        """tokens: as `_split` gives them."""
        self._tokens, self._at = tokens, 0

    def take(self, *wanted):
        """The next token, which has to be one of those wanted, if any are named."""
        token = self._tokens[self._at]
        if wanted and token not in wanted:
            raise _NotThis
        self._at += bool(token)  # the last one, which is empty, stays
        return token

    def sum(self, depth):
        """Terms, added and subtracted."""
        return self._chain(self.product, ("+", "-"), depth)

    def product(self, depth):
        """Factors, multiplied and divided; division by zero raises."""
        return self._chain(self.factor, ("*", "/", "//"), depth)

    def _chain(self, operand, signs, depth):
        result = operand(depth)
        while self._tokens[self._at] in signs:
            sign = self.take()
            result = OPERATIONS[sign](result, operand(depth))
        return result

    def factor(self, depth):
        """A number, a count, something in brackets, or one of these behind a sign."""
        if depth > DEEPEST_FORMULA:
            raise _NotThis
        token = self.take()
        if token in ("+", "-"):
            value = self.factor(depth + 1)
            return -value if token == "-" else +value
        if token == "(":
            value = self.sum(depth + 1)
            self.take(")")
            return value
        if token[:1] in ("'", '"'):
            return self._count(token[1:-1])
        if not _starts_number(token):
            raise _NotThis
        return _number(token)

    def _count(self, string):
        """How often what stands in .count("") occurs in a string."""
        self.take(".count")
        self.take("(")
        part = self.take()
        self.take(")")
        if part[:1] not in ("'", '"'):
            raise _NotThis
        return string.count(part[1:-1])
