"""SpellingBee and SimpleSpelling: counting letters and spelling, made by the rules of nanochat's generator.

SpellingBee left nanochat, and ChatCORE, in July 2026 (its commit 950a1dc). Seeds, chances and the form of an answer are
that generator's; the sentences are our own, so an accuracy here is one of the same skill, not of the same questions.
words.txt has 3,531 words of four letters or more from the docstrings and comments of Python's standard library: those
that stand in three of them at least and are English. nanochat draws from the 370,000 of dwyl/english-words, which
`download_words` gets.
"""

import functools
import random
import string
from pathlib import Path
from urllib.request import Request, urlopen

from onechip.chat_tasks import ChatTask, conversation, grade_number
from onechip.errors import UserError, first_line, require, say
from onechip.files import hash_file, read_json_or_none, write_json, write_text
from onechip.machine import home

TEST_SEED = 10_000_000  # added to an example's number in the test split, so that no example is in both
TEST_SIZE = 256
WORD_LIST = Path(__file__).with_name("words.txt")
DWYL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
LARGEST_LIST = 20_000_000  # bytes: dwyl's has 4.2 million

# {0} is the letter, {1} the word; each maybe in quotes.
TEMPLATES = (
    "How many times is the letter {0} in {1}", "Count each {0} of {1}", "How often does one find {0} in {1}",
    "Please count the letter {0} in {1}", "Of the letters in {1}, how many are {0}", "{1}: how many {0}",
    "How often is {0} used to write {1}", "I need the number of {0} in {1}", "How many {0} has {1}",
    "If I spell {1}, how many times do I write {0}", "Does {1} have {0} in it, and how many times",
    "Look at {1} and tell me how many {0} you see", "Number of times that {0} stands in {1}",
    "What number of {0} is there in {1}", "Could you tell me how many {0} there are in {1}",
    "Let's count: {0} in {1}", "Write down how often {1} has the letter {0}", "{0} in {1}, how many",
    "¿Cuántas veces está la letra {0} en {1}?", "Dime cuántas {0} hay en la palabra {1}",
    "Wie viele Buchstaben {0} hat das Wort {1}", "Wie oft steht {0} in {1}",
    "Combien de lettres {0} y a-t-il dans le mot {1}", "Quante {0} ci sono nella parola {1}",
    "{1} 这个单词有几个字母 {0}", "{1} という単語に {0} はいくつありますか",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Words


@functools.lru_cache(maxsize=2)
def read_words(path=WORD_LIST):
    """The words of a list, one on each line, a tuple of str; UserError if there are none or one has other letters."""
    try:
        words = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of words ({first_line(error)})") from None
    require(words, f"{path}: words", 0, "one word on each line is needed")
    bad = next((word for word in words if not word or set(word) - set(string.ascii_lowercase)), None)
    require(bad is None, f"{path}: word", bad, "must be letters a to z, one word on each line")
    return words


def download_words(url=DWYL):
    """The path of dwyl's word list in the home folder, downloaded once; its hash is kept and compared ever after."""
    path, note = home() / "words" / "words_alpha.txt", home() / "words" / "words_alpha.json"
    if not path.exists():
        say(f"download: {url} to {path}")
        try:
            with urlopen(Request(url), timeout=60) as answer:
                raw = answer.read(LARGEST_LIST + 1)
        except OSError as error:
            raise UserError(
                f"{url}: cannot be downloaded ({first_line(error)}); run again, or use {WORD_LIST.name}"
            ) from None
        require(len(raw) <= LARGEST_LIST, url, f"{len(raw):,} bytes and more", "is no list of words")
        write_text(path, raw.decode("ascii", "replace").replace("\r\n", "\n"))
        read_words(path)
    digest, known = hash_file(path), (read_json_or_none(note) or {}).get("sha256")
    if known is None:
        write_json(note, {"url": url, "sha256": digest})
    require(known in (None, digest), f"{path}: SHA-256", digest[:12], f"was {known and known[:12]} before: delete it")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Examples


def draw_question(rng, words):
    """(word, letter, question): of nine questions in ten the letter is one of the word's."""
    word = rng.choice(words)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
    template = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        template = template.lower()
    quotes = ["", "'", '"']
    around_letter, around_word = rng.choice(quotes), rng.choice(quotes)
    question = template.format(f"{around_letter}{letter}{around_letter}", f"{around_word}{word}{around_word}")
    return word, letter, question.rstrip("?") + ("?" if rng.random() < 0.5 else "")


def count_by_hand(word, letter):
    """The text that spells a word out and counts a letter in it."""
    lines, count = [], 0
    for i, char in enumerate(word, 1):
        count += char == letter
        lines.append(f"{i}:{char} is number {count}" if char == letter else f"{i}:{char}")
    counted = "\n".join(lines)
    return f"{word}:{','.join(word)}\n\nI look for {letter}:\n{counted}\n\nSo {letter} is there {count} times."


def spelling_bee_item(number, words, test=True):
    """Example `number` of SpellingBee: count a letter by hand, then by Python; the answer stands after ####."""
    rng = random.Random(TEST_SEED * test + number)
    word, letter, question = draw_question(rng, words)
    count = word.count(letter)
    parts = [("text", count_by_hand(word, letter) + "\n\nI check that:\n\n")]
    parts += [("python", f"'{word}'.count('{letter}')"), ("python_output", str(count)), ("text", f"\n\n#### {count}")]
    return conversation(question, [{"type": kind, "text": text} for kind, text in parts])


def simple_spelling_item(number, words, test=True):
    """Example `number` of SimpleSpelling; words: as shuffled_words has them."""
    word = random.Random(TEST_SEED * test + number).choice(words)
    return conversation(f"Spell the word: {word}", f"{word}:{','.join(word)}")


def shuffled_words(words):
    """The words in another order than SpellingBee's, so that the same number is another word."""
    words = list(words)
    random.Random(42).shuffle(words)
    return words


def grade_spelling(item, answer, run=None):
    """Whether an answer is the reference, blanks at its ends apart."""
    return answer.strip() == item["messages"][-1]["content"]


def spelling_bee(size=TEST_SIZE, words=None, test=True):
    """SpellingBee's ChatTask of `size` examples; words: a list, words.txt if None."""
    words = read_words() if words is None else words
    items = [spelling_bee_item(i, words, test) for i in range(size)]
    return ChatTask("SpellingBee", items, grade_number, size)


def simple_spelling(size=TEST_SIZE, words=None, test=True):
    """SimpleSpelling's ChatTask of `size` examples."""
    words = shuffled_words(read_words() if words is None else words)
    items = [simple_spelling_item(i, words, test) for i in range(size)]
    return ChatTask("SimpleSpelling", items, grade_spelling, size)
