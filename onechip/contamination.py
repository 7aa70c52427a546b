"""How much of a test was trained on: the share of a task's examples that have a long n-gram in common with documents.

The rule is that of GPT-3's appendix C (Brown et al., 2020) in its first half: texts are lower-cased words without
punctuation, and an example counts as touched if 13 words in a row stand in a document, or all of its words if they are
fewer, down to 8. Shorter examples are not looked for. So that a task's own form of words does not touch all of it, an
n-gram that more than 10 of its examples have is left out.

Documents are streamed. What is kept is one 64-bit number for each n-gram of the tasks: among 10^9 words of documents
and 10^6 n-grams, the chance that any two different ones have the same is below 10^-4.
"""

import collections
import re
from typing import NamedTuple

import numpy as np

LONGEST, SHORTEST = 13, 8  # words
COMMON = 10  # examples of a task that may share an n-gram
WORD = re.compile(r"[^\W_]+")
WORDS_AT_ONCE = 1 << 18  # words of documents that are compared together
MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)  # any odd number with many bits will do


class Contamination(NamedTuple):
    """touched (n,) bool: of each of a task's examples, whether a document has an n-gram of it; checked (n,) bool:
    whether it is long enough to be looked for."""

    label: str
    touched: np.ndarray
    checked: np.ndarray

    @property
    def share(self):
        """Touched examples as a share of those that were looked for; NaN if none was."""
        return float(self.touched.sum() / self.checked.sum()) if self.checked.any() else float("nan")


def plain_words(text):
    """The words of a text: letters and digits, lower case."""
    return WORD.findall(text.lower())


def example_text(item):
    """An example with its right answer as one text: an item of an EvalTask of any kind, or of a ChatTask."""
    if "messages" in item:
        contents = [message["content"] for message in item["messages"]]
        return " ".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)
    if "choices" in item:
        return f"{item['query']} {item['choices'][item['gold']]}"
    context = item["context_options"][item["gold"]] if "context_options" in item else item["context"]
    return f"{context} {item['continuation']}"


def scramble(numbers):
    """splitmix64 of uint64: equally likely bits, the same on every machine."""
    x = numbers * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ngram_keys(ids, length):
    """A uint64 for each run of `length` ids, uint64 (len(ids) - length + 1,): a polynomial of their mixed values."""
    values, keys = scramble(ids), np.zeros(max(0, len(ids) - length + 1), np.uint64)
    for j in range(length):
        keys = keys * MULTIPLIER + values[j : j + len(keys)]
    return keys


class Index(NamedTuple):
    """What is looked for. vocabulary: {word: id from 1}; tables: {n: (keys, owners)}, sorted by key; an n-gram that
    several examples have stands there once for each. Owners are numbers of examples, through all tasks."""

    vocabulary: dict
    tables: dict


def build_index(examples):
    """(Index, checked) of a list of (task, text); checked: whether each text has SHORTEST words."""
    vocabulary, found = {}, collections.defaultdict(list)
    checked = np.zeros(len(examples), bool)
    for owner, (task, text) in enumerate(examples):
        words = plain_words(text)
        ids = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], np.uint64)
        checked[owner] = len(words) >= SHORTEST
        if checked[owner]:
            length = min(LONGEST, len(words))
            keys = np.unique(ngram_keys(ids, length))
            found[length].append((keys, np.full(len(keys), owner), np.full(len(keys), task)))
    tables = {}
    for length, parts in sorted(found.items()):
        keys, owners, tasks = map(np.concatenate, zip(*parts, strict=True))
        order = np.lexsort((tasks, keys))
        keys, owners, tasks = keys[order], owners[order], tasks[order]
        starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]) | (tasks[1:] != tasks[:-1])))
        counts = np.diff(np.append(starts, len(keys)))  # examples of one task that have the n-gram
        rare = np.repeat(counts, counts) <= COMMON
        tables[length] = keys[rare], owners[rare]
    return Index(vocabulary, tables), checked


def mark(index, ids, touched):
    """Marks the owners of all n-grams in ids, uint64 (W,); 0 is a word of no example, or the end of a document."""
    known = np.append(0, np.cumsum(ids == 0))
    for length, (keys, owners) in index.tables.items():
        if len(ids) < length:
            continue
        whole = known[length:] == known[:-length]
        seen = np.unique(ngram_keys(ids, length)[whole])
        first, last = np.searchsorted(keys, seen, "left"), np.searchsorted(keys, seen, "right")
        for a, b in zip(first[first < last], last[first < last], strict=True):
            touched[owners[a:b]] = True


def find_contamination(tasks, documents):
    """The Contamination of each task. tasks: {label: [text of an example]}; documents: an iterable of str, read once.

    Memory does not grow with the documents; the same documents in any order give the same answer.
    """
    examples = [(number, text) for number, texts in enumerate(tasks.values()) for text in texts]
    index, checked = build_index(examples)
    touched, waiting = np.zeros(len(examples), bool), []
    for document in documents:
        for word in plain_words(document):
            waiting.append(index.vocabulary.get(word, 0))
        waiting.append(0)
        if len(waiting) >= WORDS_AT_ONCE:
            mark(index, np.array(waiting, np.uint64), touched)
            waiting = []
    mark(index, np.array(waiting, np.uint64), touched)
    ends = np.cumsum([len(texts) for texts in tasks.values()])[:-1]
    parts = zip(tasks, np.split(touched, ends), np.split(checked, ends), strict=True)
    return [Contamination(*part) for part in parts]
