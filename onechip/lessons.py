"""Conversations made by rule, where there is no network: the calculator, counting letters, spelling, docstrings.

Numbers and words are split by a hash into those that a model is shown and those that it is asked about later.
"""

import ast
import collections
import hashlib
import random
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

from onechip.calculator import calculate
from onechip.chat_tasks import conversation
from onechip.errors import require

HELD_OUT = 3  # of this many words, or numbers of three digits and more, one is held out
LONGEST_DOCSTRING = 90  # characters of a first line that is taken


class Lesson(NamedTuple):
    """A kind of question.

    make(rng, number, held_out) -> (question, the parts of its answer) of question `number`;
    is_right(wanted parts, answered parts) -> bool, None where no rule can tell.
    """

    name: str
    make: Callable
    is_right: Callable | None = None


def lesson_messages(lesson, number, held_out=False):
    """Conversation `number` of a Lesson, the same on every machine; held_out: one of those that no training shows."""
    rng = random.Random(f"{lesson.name} {held_out} {number}")
    question, parts = lesson.make(rng, number, held_out)
    return conversation(question, [{"type": kind, "text": text} for kind, text in parts])["messages"]


def is_held_out(thing):
    """Whether a word or a number is for questions only. Numbers below 100 are one token each, and are always shown."""
    if isinstance(thing, int) and thing < 100:
        return False
    return hashlib.sha256(str(thing).encode()).digest()[0] % HELD_OUT == 0


# ----------------------------------------------------------------------------------------------------------------------
# With the calculator


def with_calculator(code):
    """The parts of an answer that has `code` calculated and repeats what comes out."""
    result = calculate(code)
    return [("python", code), ("python_output", result), ("text", result)]


def called_rightly(wanted, parts):
    """Whether an answer ends in the right number, and that number came out of the call that is wanted."""
    call, output, said = wanted
    return [call, output] == parts[:2] and parts[-1] == said


SUMS = ("What is {}?", "Calculate {}.", "How much is {}?", "Please compute {}.", "{}", "{} = ?", "Tell me what {} is.")
SIGNS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def draw_number(rng, held_out, digits):
    """A number of so many digits, held out or not, as far as there are such ones."""
    while True:
        number = rng.randrange(10 ** (digits - 1), 10**digits)
        if is_held_out(number) == held_out:
            return number


def draw_operands(rng, held_out):
    """(a, sign, b): of one to four digits; each of three or four where they are held out. A quotient is whole."""
    sign, sizes = rng.choice("+-*/"), (3, 4) if held_out else (1, 2, 3, 3, 4, 4)
    a, b = (draw_number(rng, held_out, rng.choice(sizes)) for _ in range(2))
    while sign == "/":
        b = draw_number(rng, held_out, 3 if held_out else rng.choice((1, 2, 3)))
        a = b * rng.randrange(2, 100)
        if a < 10_000 and (a < 100 or is_held_out(a) == held_out) and (a >= 100 or not held_out):
            break
    return a, sign, b


def sum_question(rng, number, held_out):
    """A formula with one sign, as such or in words."""
    a, sign, b = draw_operands(rng, held_out)
    said = SIGNS[sign] if rng.random() < 0.25 else sign
    return rng.choice(SUMS).format(f"{a} {said} {b}"), with_calculator(f"{a} {sign} {b}")


CALCULATOR = Lesson("calculator", sum_question, called_rightly)


# ----------------------------------------------------------------------------------------------------------------------
# Words


COUNTS = (
    'How many "{0}" are in "{1}"?', 'How often is "{0}" in "{1}"?', 'Count the letter "{0}" in "{1}".',
    'In the word "{1}", how many "{0}" are there?', 'How many times does "{1}" have the letter "{0}"?',
)  # fmt: skip
SPELLINGS = ('Spell "{}".', 'How is "{}" spelled?', 'Spell the word "{}".', 'Which letters are in "{}"?')


class Words(NamedTuple):
    """Words that are shown, made-up ones of the same tokens, which are shown too, and those that are asked about."""

    shown: tuple
    made_up: tuple
    asked: tuple


def draw_word(words, rng, number, held_out):
    """One of the shown Words, half of them made up; of those that are asked about each comes once before any again."""
    if held_out:
        return words.asked[number % len(words.asked)]
    return rng.choice(words.made_up if words.made_up and rng.random() < 0.5 else words.shown)


def split_words(words, encode, least=3):
    """The Words of a list: of at least two tokens, each of which `least` of the words have; split by a hash.

    A spelling is learned token by token: each token of a word that is asked about is in two at least that are shown.
    encode(word) -> its ids. UserError if too few words are left.
    """
    ids = {word: encode(word) for word in words}
    ids = {word: tokens for word, tokens in ids.items() if len(tokens) > 1}
    size = 0
    while len(ids) != size:
        size = len(ids)
        often = collections.Counter(token for tokens in ids.values() for token in set(tokens))
        ids = {word: tokens for word, tokens in ids.items() if all(often[token] >= least for token in tokens)}
    shown = [word for word in ids if not is_held_out(word)]
    often = collections.Counter(token for word in shown for token in set(ids[word]))
    asked = [word for word in ids if is_held_out(word) and all(often[token] > 1 for token in ids[word])]
    require(shown and asked, "words", len(ids), f"too few have tokens that {least} words share: give a longer list")
    random.Random(HELD_OUT).shuffle(asked)
    return Words(tuple(shown), make_up_words(shown, encode, often.keys()), tuple(asked))


def make_up_words(words, encode, known, count=20_000):
    """The beginning of one of the words and the end of another, cut between tokens: of at least two tokens, all known.

    With a thousand words alone, a model learns their spellings by heart, and not those of their tokens.
    """
    parts = [(word[:at], word[at:]) for word in words for at in range(1, len(word))]
    ids = {text: encode(text) for text in {*words, *(part for pair in parts for part in pair)}}
    parts = [(a, b) for a, b in parts if ids[a] + ids[b] == ids[a + b]]
    rng, made = random.Random(HELD_OUT), set()
    for _ in range(count if parts else 0):
        word = rng.choice(parts)[0] + rng.choice(parts)[1]
        tokens = encode(word)
        if len(tokens) > 1 and known >= set(tokens) and not is_held_out(word):
            made.add(word)
    return tuple(sorted(made - set(words)))


def counting(words):
    """The Lesson of counting a letter in one of the Words, by the calculator: nine times in ten it is there."""

    def make(rng, number, held_out):
        word = draw_word(words, rng, number, held_out)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        return rng.choice(COUNTS).format(letter, word), with_calculator(f'"{word}".count("{letter}")')

    return Lesson("counting", make, called_rightly)


def spelling(words):
    """The Lesson of writing the letters of one of the Words with blanks between them."""

    def make(rng, number, held_out):
        word = draw_word(words, rng, number, held_out)
        return rng.choice(SPELLINGS).format(word), [("text", " ".join(word))]

    return Lesson("spelling", make, is_equal)


def repeating(words):
    """The Lesson of saying numbers, signs and Words again: of a call, that is what is hard."""

    def make(rng, number, held_out):
        items = []
        for i in range(rng.randint(2, 6)):
            n = draw_number(rng, held_out, rng.choice((3, 4)) if held_out else rng.choice((1, 2, 3, 3, 4, 4)))
            items.append(f'"{draw_word(words, rng, number + i, held_out)}"' if rng.random() < 0.4 else str(n))
        said = " ".join(f"{item} {rng.choice('+-*/')}" if rng.random() < 0.2 else item for item in items)
        return f"{rng.choice(('Repeat', 'Say again', 'Copy'))}: {said}", [("text", said)]

    return Lesson("repeating", make, is_equal)


def is_equal(wanted, parts):
    """Whether an answer is the very parts that are wanted."""
    return parts == wanted


# ----------------------------------------------------------------------------------------------------------------------
# The standard library's docstrings


def docstring_pairs(sources):
    """[(name, first line of its docstring)] of functions and classes in Python sources, each name once.

    Sources that are cut inside a statement are left out, and so are long lines and private names.
    """
    found = {}
    for source in sources:
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes, by newer Pythons
                nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if re.fullmatch(r"[A-Z][ -~]+\.", line) and len(line) <= LONGEST_DOCSTRING:
                    found.setdefault(node.name, line)
    return list(found.items())


def docstrings(shown, asked):
    """The Lesson of saying what a function or class does, from two lists of (name, line)."""

    def make(rng, number, held_out):
        name, line = rng.choice(asked if held_out else shown)
        return rng.choice(("What does {} do?", "What is {} for?", "Explain {}.")).format(name), [("text", line)]

    return Lesson("docstrings", make)
