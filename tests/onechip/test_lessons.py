"""onechip/lessons.py: questions made by rule, their answers, and what is held out."""

import random
import re

import pytest

from onechip.calculator import calculate
from onechip.conversations import check_messages
from onechip.errors import UserError
from onechip.lessons import (
    CALCULATOR,
    HELD_OUT,
    Words,
    counting,
    docstring_pairs,
    docstrings,
    is_held_out,
    lesson_messages,
    repeating,
    spelling,
    split_words,
)

WORDS = Words(("alpha", "banana", "kayak"), ("alyak", "banpha"), ("papaya", "civic", "otter", "apple"))
DOCS = docstrings([("load", "Loads it.")], [("save", "Saves it.")])
LESSONS = (CALCULATOR, counting(WORDS), spelling(WORDS), repeating(WORDS), DOCS)


def both(lesson, number, held_out=False):
    """(question, parts of the answer) of a conversation that is one."""
    messages = lesson_messages(lesson, number, held_out)
    check_messages(messages)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    return messages[0]["content"], messages[1]["content"]


def test_sums_are_what_python_says_and_held_out_numbers_are_never_shown():
    """Of 4,000 questions: the call is the question's formula, its output Python's, and no operand is in both halves."""
    seen = {False: set(), True: set()}
    for number in range(2000):
        for held_out in (False, True):
            question, (call, output, said) = both(CALCULATOR, number, held_out)
            a, sign, b = call["text"].split(" ")
            wanted = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign]
            assert output["text"] == said["text"] == str(wanted)
            assert re.findall("[0-9]+", question) == [a, b]
            assert sign != "/" or int(a) % int(b) == 0
            seen[held_out] |= {int(a), int(b)}
    assert not seen[False] & seen[True] and min(seen[True]) >= 100 and len(seen[True]) > 800
    assert any(number < 10 for number in seen[False]) and max(seen[False]) < 10_000


def test_words_are_asked_about_that_are_never_shown():
    """Held-out questions go through their words in turn; the others draw from the shown; letters are counted right."""
    for lesson in (counting(WORDS), spelling(WORDS)):
        asked = [both(lesson, number, True)[0] for number in range(8)]
        for number, question in enumerate(asked):
            assert f'"{WORDS.asked[number % 4]}"' in question
        shown = {word for number in range(60) for word in re.findall('"([a-z]{2,})"', both(lesson, number)[0])}
        assert shown == set(WORDS.shown + WORDS.made_up)
    for number in range(50):
        question, parts = both(counting(WORDS), number)
        letter, word = sorted(re.findall('"([a-z]+)"', question), key=len)
        assert parts[0]["text"] == f'"{word}".count("{letter}")' and parts[-1]["text"] == str(word.count(letter))
        question, (said,) = both(spelling(WORDS), number)
        assert said["text"].replace(" ", "") in question and set(said["text"][1::2]) == {" "}


def test_what_is_repeated_is_what_was_said():
    """To the character; of held-out numbers and words only, in what is held out."""
    for number in range(300):
        for held_out in (False, True):
            question, (said,) = both(repeating(WORDS), number, held_out)
            assert question.partition(": ")[2] == said["text"]
            assert set(re.findall('"(.*?)"', said["text"])) <= set(
                WORDS.asked if held_out else WORDS.shown + WORDS.made_up
            )
            assert all(is_held_out(int(n)) == held_out for n in re.findall("[0-9]+", said["text"]))


def test_an_answer_is_right_by_its_number_and_its_call():
    """The number alone, a call alone, another number or another call is wrong; a spelling has to be equal."""
    _, wanted = both(CALCULATOR, 3)
    call, output, said = wanted
    other = {"type": "text", "text": said["text"] + "1"}
    assert CALCULATOR.is_right(wanted, wanted)
    elsewhere = [call | {"text": call["text"] + " + 0"}, output, said]
    unmade = [call, {"type": "python_output", "text": other["text"]}, said]
    for parts in ([said], [call, said], [call, output], [call, output, other], unmade, elsewhere, []):
        assert not CALCULATOR.is_right(wanted, parts)
    _, wanted = both(spelling(WORDS), 3)
    assert LESSONS[2].is_right(wanted, wanted) and not LESSONS[2].is_right(wanted, [])
    assert DOCS.is_right is None


def test_questions_are_the_same_everywhere():
    """The same number is the same question, and of the two halves another one."""
    for lesson in LESSONS:
        assert lesson_messages(lesson, 7) == lesson_messages(lesson, 7) != lesson_messages(lesson, 7, held_out=True)
    assert both(CALCULATOR, 0) == ("Calculate 66 * 293.", [
        {"type": "python", "text": "66 * 293"}, {"type": "python_output", "text": calculate("66 * 293")},
        {"type": "text", "text": "19338"},
    ])  # fmt: skip


def test_words_are_split_by_a_hash_and_share_their_tokens():
    """Syllables as tokens: words of one, or with one that too few have, are left out; who is asked has been shown."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgk" for b in "aeiou"]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)} | {"zuba", "zubaba"})
    encode = lambda word: re.findall("[a-z][aeiou]", word)
    split = split_words(words, encode)
    assert not set(split.shown) & set(split.asked) and len(split.asked) > 50
    assert all(map(is_held_out, split.asked)) and not any(map(is_held_out, split.shown))
    assert all(len(word) > 2 and not word.startswith("zu") for word in split.shown + split.asked)
    for word in split.asked:
        assert all(sum(token in encode(other) for other in split.shown) > 1 for token in encode(word))
    made_up = set(split.made_up)
    assert len(made_up) > 1000 and not made_up & set(words) and not any(map(is_held_out, made_up))
    known = {token for word in split.shown for token in encode(word)}
    assert all(len(encode(word)) > 1 and known >= set(encode(word)) for word in made_up)
    assert split.made_up == split_words(words, encode).made_up  # the same on every machine
    share = sum(map(is_held_out, range(100, 9100))) / 9000
    assert abs(share - 1 / HELD_OUT) < 0.02 and not any(map(is_held_out, range(100)))
    with pytest.raises(UserError, match="words=0: too few"):
        split_words(words[:3], encode)


SOURCE = '''
class Shape:
    """A figure in the plane."""

    def area(self):
        """Return the area.

        In square units.
        """

    def _private(self):
        """Not for anyone."""

    def name(self):
        """no sentence"""
'''


def test_docstrings_are_first_lines_of_public_names():
    """Of functions and classes, each name once; sources that are cut are left out."""
    pairs = docstring_pairs([SOURCE, "def broken(:", SOURCE.replace("Return", "Give")])
    assert pairs == [("Shape", "A figure in the plane."), ("area", "Return the area.")]
