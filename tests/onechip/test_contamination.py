"""onechip/contamination.py: planted examples are found, all others are not, whatever the documents' order."""

import random

import numpy as np
import pytest

from onechip import contamination
from onechip.contamination import example_text, find_contamination, plain_words

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_words(rng, count):
    return ["".join(rng.choices(LETTERS, k=4)) for _ in range(count)]


def by_hand(tasks, documents):
    """Touched and checked examples, by sets of tuples."""
    seen = {n: set() for n in range(8, 14)}
    for document in documents:
        words = plain_words(document)
        for n, grams in seen.items():
            grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    found = {}
    for label, texts in tasks.items():
        grams = []
        for text in texts:
            words = plain_words(text)
            n = min(13, len(words))
            grams.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n >= 8 else set())
        common = {g for own in grams for g in own if sum(g in other for other in grams) > 10}
        touched = [any(g in seen[len(g)] for g in own - common) for own in grams]
        found[label] = touched, [bool(own) for own in grams]
    return found


@pytest.fixture(scope="module")
def planted():
    """Two tasks of 60 examples of 3 to 40 words, and documents that hold some of them, in part or changed."""
    rng = random.Random(0)
    tasks = {label: [" ".join(draw_words(rng, rng.randrange(3, 41))) for _ in range(60)] for label in ("one", "two")}
    tasks["two"] = [f"{'the form of all these questions is like this and it is long'} {text}" for text in tasks["two"]]
    documents = []
    for text in [*tasks["one"][::3], *tasks["two"][::4]]:
        words = plain_words(text)
        start = rng.randrange(len(words))
        part = words[start : start + rng.randrange(6, 30)]
        if rng.random() < 0.3:
            part[len(part) // 2] = "changed"
        noise = lambda: draw_words(rng, rng.randrange(20))
        documents.append(", ".join([*noise(), *(w.upper() for w in part), *noise()]) + "!")
    documents += ["the form of all these questions is like this and it is long", "", "short"]
    return tasks, documents


def test_as_by_hand(planted):
    """Each example's verdict is that of a search through sets of tuples; some are touched, most are not."""
    tasks, documents = planted
    expected = by_hand(tasks, documents)
    for found in find_contamination(tasks, documents):
        touched, checked = expected[found.label]
        assert found.touched.tolist() == touched and found.checked.tolist() == checked
        assert 3 < found.touched.sum() < found.checked.sum() < 61
        assert found.share == pytest.approx(sum(touched) / sum(checked))


def test_neither_order_nor_parts_matter(planted, monkeypatch):
    """Documents in another order, from a generator, compared a few words at a time: the same answer."""
    tasks, documents = planted
    whole = find_contamination(tasks, documents)
    monkeypatch.setattr(contamination, "WORDS_AT_ONCE", 50)
    again = find_contamination(tasks, (document for document in reversed(documents)))
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a.touched, b.touched)


def test_an_n_gram_does_not_run_from_one_document_into_the_next():
    """The two halves of an example in two documents are not it; in one they are, whatever stands between the words."""
    words = draw_words(random.Random(1), 13)
    task = {"t": [" ".join(words)]}
    halves = [" ".join(words[:6]), " ".join(words[6:])]
    assert not find_contamination(task, halves)[0].touched.any()
    assert find_contamination(task, ["--".join(halves).replace(" ", "\n  ")])[0].touched.all()
    words[4] = "other"
    assert not find_contamination(task, [" ".join(words)])[0].touched.any()


def test_short_examples_are_not_looked_for():
    """Eight words are enough, seven are not; a task of none has no share."""
    words = draw_words(random.Random(2), 8)
    found, none = find_contamination({"a": [" ".join(words), " ".join(words[1:])], "b": ["x"]}, [" ".join(words)])
    assert found.touched.tolist() == [True, False] and found.checked.tolist() == [True, False] and found.share == 1
    assert np.isnan(none.share)


def test_what_many_examples_share_is_their_form():
    """An n-gram of eleven examples touches none of them, one of ten touches all ten; another task has its own count."""
    form = " ".join(draw_words(random.Random(3), 13))
    for count, touched in ((10, True), (11, False)):
        tasks = {"a": [f"{form} {'x' * (i + 1)}" for i in range(count)], "b": [form]}
        a, b = find_contamination(tasks, [form])
        assert a.touched.all() == touched == a.touched.any() and b.touched.all()


def test_texts_of_examples():
    """Of each kind, with the right answer; a conversation with all its parts."""
    assert example_text({"query": "q", "choices": ["x", "y"], "gold": 1}) == "q y"
    assert example_text({"context_options": ["m", "n"], "continuation": "c", "gold": 0}) == "m c"
    assert example_text({"context": "p", "continuation": "c"}) == "p c"
    parts = [{"type": "text", "text": "a "}, {"type": "python", "text": "1+1"}]
    assert (
        example_text({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": parts}]})
        == "u a 1+1"
    )


def test_keys_are_the_same_on_every_machine():
    """They depend on no seed of the process; neighbours in number are far apart."""
    keys = contamination.ngram_keys(np.arange(1, 16, dtype=np.uint64), 13)
    assert keys.tolist() == KEYS and len(set(keys.tolist())) == 3


KEYS = [2114956485264716223, 11263791153658844911, 7975074835788261114]
