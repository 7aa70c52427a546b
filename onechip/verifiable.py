"""Problems whose answers a rule can check: what reinforcement learning is given in place of conversations.

A ProblemSet makes a prompt by its number, and a grade between 0 and 1 from the text that an answer ends with. An
answer that is cut off, or in which the model wrote a tool's output itself, gets 0 whatever it says (rollouts.py).
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from onechip.calculator import calculate
from onechip.chat_sets import HUB_SETS, reader_of_rows
from onechip.errors import require
from onechip.graders import same_number
from onechip.spelling import read_words

HELD_OUT_SHARE = 8  # of this many problems one is for questions only


class Problem(NamedTuple):
    """prompt: what the user says; grade(text) -> a reward from 0 to 1 of what the answer says after its last call.

    about: what is asked, in whatever words: the side that it is on follows from it; empty for the prompt.
    """

    prompt: str
    grade: Callable
    about: str = ""


class ProblemSet(NamedTuple):
    """name; make(rng) -> Problem, drawn from a random.Random."""

    name: str
    make: Callable


def is_for_questions(problem):
    """Whether a Problem is one of those that no training sees: by a hash of what it is about."""
    return hashlib.sha256((problem.about or problem.prompt).encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw_problem(problems, number, held_out=False):
    """Problem `number` of a ProblemSet, the same on every machine; none is both held out and not."""
    rng = random.Random(f"{problems.name} {held_out} {number}")
    for _ in range(1000):
        problem = problems.make(rng)
        if is_for_questions(problem) == held_out:
            return problem
    require(False, "problems", problems.name, "made a thousand prompts, none of them for this side: make more kinds")


def equals(wanted):
    """A grade: 1 if the text is this one and no other. One that has it somewhere would pay for naming every number."""
    return lambda text: float(text.strip() == wanted)


# ----------------------------------------------------------------------------------------------------------------------
# By rule

ASKS = ("What is {}?", "Calculate {}.", "How much is {}?", "Please compute {}.", "{}", "{} = ?", "Tell me what {} is.")


def formula_problem(rng):
    """Two steps with + - *, sometimes three: more numbers than the calculator lessons of a chat model have."""
    numbers = [rng.randrange(2, 100) for _ in range(rng.choice((3, 3, 3, 4)))]
    formula = str(numbers[0])
    for number in numbers[1:]:
        formula += f" {rng.choice('+-*')} {number}"
    return Problem(rng.choice(ASKS).format(formula), equals(calculate(formula)), formula)


def counting_problem(rng):
    """How often two letters are in a word, together."""
    word = rng.choice(read_words())
    a, b = rng.sample(sorted({*word, "q", "z"}), 2)
    prompt = f'How many "{a}" and "{b}" are in "{word}" together?'
    return Problem(prompt, equals(str(word.count(a) + word.count(b))), word)


def spelling_problem(rng):
    """The letters of a word; the grade is the share of places that are right, and less for letters too many."""
    word = rng.choice(read_words())
    return Problem(f'Spell "{word}".', by_places(list(word)), word)


def sorting_problem(rng):
    """Three to five numbers, the smallest first."""
    numbers = [rng.randrange(100) for _ in range(rng.randint(3, 5))]
    return Problem(f"Sort: {' '.join(map(str, numbers))}", by_places(list(map(str, sorted(numbers)))))


def by_places(wanted):
    """A grade: the share of places with the right word, of the longer of the two lists: more words do not pay."""

    def grade(text):
        said = text.split()
        return sum(a == b for a, b in zip(said, wanted, strict=False)) / max(len(said), len(wanted))

    return grade


RULES = {
    "arithmetic": ProblemSet("arithmetic", formula_problem),
    "counting": ProblemSet("counting", counting_problem),
    "spelling": ProblemSet("spelling", spelling_problem),
    "sorting": ProblemSet("sorting", sorting_problem),
}


# ----------------------------------------------------------------------------------------------------------------------
# From the Hub


class HubProblems(NamedTuple):
    """A table's two splits as problems: the Hub has said which are for questions."""

    name: str
    learned: Callable
    asked: Callable


def gsm8k_problems():
    """(HubProblems of GSM8K, {split: commit}): right is the number after ####, as its authors grade it."""
    learned, asked, make = HUB_SETS["gsm8k"]
    (messages, first), (held_out, second) = (reader_of_rows("gsm8k", table, make) for table in (learned, asked))

    def problem(found):
        question, solution = found[0]["content"], found[1]["content"][-1]["text"]
        return Problem(question, lambda text: float(same_number(solution, text)))

    sides = (lambda number: problem(messages(number))), (lambda number: problem(held_out(number)))
    return HubProblems("gsm8k", *sides), {learned.split: first, asked.split: second}


PROBLEM_NAMES = ("gsm8k", *RULES)


def open_problems(names):
    """(function of (number, held_out) -> Problem, commits of what was downloaded) of a list of PROBLEM_NAMES, in turn.

    UserError for a name that is none.
    """
    for name in names:
        require(name in PROBLEM_NAMES, "problems", name, f"use {', '.join(PROBLEM_NAMES)}, with blanks between")
    require(names, "problems", "", f"name at least one of {', '.join(PROBLEM_NAMES)}")
    hub, commits = gsm8k_problems() if "gsm8k" in names else (None, {})

    def problem(number, held_out=False):
        which, own = names[number % len(names)], number // len(names)
        if which == "gsm8k":
            return (hub.asked if held_out else hub.learned)(own)
        return draw_problem(RULES[which], own, held_out)

    return problem, commits
