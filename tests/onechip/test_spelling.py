"""onechip/spelling.py: questions about letters, made by rule."""

import collections
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from onechip.conversations import check_messages
from onechip.errors import UserError
from onechip.spelling import (
    download_words,
    read_words,
    shuffled_words,
    simple_spelling,
    spelling_bee,
    spelling_bee_item,
)


def test_the_list_of_words():
    """3,531 different words, a to z, of four to fourteen letters, sorted."""
    words = read_words()
    assert len(words) == 3531 == len(set(words)) and list(words) == sorted(words)
    assert {len(word) for word in words} == set(range(4, 15)) and "string" in words


def test_answers_are_counted_right():
    """In each of 2,000 examples the word that is spelled out has the letter as often as the answer, the code and each
    line of the count say."""
    for i in range(2000):
        item = spelling_bee_item(i, read_words())
        check_messages(item["messages"])
        said, code, output, last = item["messages"][1]["content"]
        word, _, letter = code["text"].removeprefix("'").removesuffix("')").partition("'.count('")
        count = word.count(letter)
        assert output["text"] == str(count) and last["text"].endswith(f"#### {count}")
        assert said["text"].startswith(f"{word}:{','.join(word)}\n") and said["text"].count(" is number ") == count
        question = item["messages"][0]["content"]
        assert word in question and letter in question.lower()


def test_the_rules_chances():
    """Nine letters in ten are drawn from the word; a third of the questions in lower case; half end in a mark."""
    items = [spelling_bee_item(i, read_words()) for i in range(4000)]
    none = sum(item["messages"][1]["content"][2]["text"] == "0" for item in items) / 4000
    marks = sum(item["messages"][0]["content"].endswith("?") for item in items) / 4000
    quoted = sum('"' in item["messages"][0]["content"] for item in items) / 4000
    assert 0.05 < none < 0.1 and 0.46 < marks < 0.54 and 0.5 < quoted < 0.61


def test_seeds_of_the_published_rule():
    """Example i of the test is drawn by the seed 10,000,000 + i, of training by i: word, then letter."""
    words = read_words()
    for i in (0, 1, 255):
        for test, seed in ((True, 10_000_000 + i), (False, i)):
            rng = random.Random(seed)
            word = rng.choice(words)
            letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
            code = spelling_bee_item(i, words, test)["messages"][1]["content"][1]["text"]
            assert code == f"'{word}'.count('{letter}')"


def test_tasks_and_their_graders():
    """256 examples each; an answer is right by its number after ####, or by its spelling; always the same ones."""
    bee, simple = spelling_bee(), simple_spelling()
    assert len(bee.items) == bee.total == 256 == len(simple.items)
    item = bee.items[0]
    count = int(item["messages"][1]["content"][2]["text"])
    assert bee.grade(item, f"... #### {count}") and not bee.grade(item, f"#### {count + 1}") and not bee.grade(item, "")
    item = simple.items[0]
    right = item["messages"][1]["content"]
    assert simple.grade(item, f" {right}\n") and not simple.grade(item, right + ",x")
    word = item["messages"][0]["content"].removeprefix("Spell the word: ")
    assert right == f"{word}:{','.join(word)}" and word in read_words()
    assert spelling_bee() == bee and spelling_bee(test=False).items != bee.items
    assert collections.Counter(shuffled_words(read_words())) == collections.Counter(read_words())


def test_a_list_of_ones_own(tmp_path):
    """Any list of words will do; what is none is refused."""
    path = tmp_path / "words.txt"
    path.write_text("abc\nzebra\n")
    assert {item["messages"][1]["content"][0] for item in simple_spelling(9, read_words(path)).items} == {"a", "z"}
    for text, message in (("", "words=0"), ("abc\nx y\n", "word='x y'"), ("abc\n\nd\n", "word=''")):
        (other := tmp_path / f"{len(text)}.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            read_words(other)


def test_the_long_list_is_downloaded_once_and_compared(tmp_path, monkeypatch):
    """From a server on loopback; later from disk; another content than at first is refused."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path))
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"aa\r\naardvark\r\nzebra\r\n")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/words_alpha.txt"
        path = download_words(url)
        assert read_words(path) == ("aa", "aardvark", "zebra") and download_words(url) == path and len(asked) == 1
        path.write_text("aa\n")
        with pytest.raises(UserError, match="words_alpha.txt: SHA-256=.*was .* before"):
            download_words(url)
        server.shutdown()
    path.unlink()
    with pytest.raises(UserError, match="cannot be downloaded"):
        download_words(url)
