"""onechip/texts.py: texts are cropped and batched, and documents become windows that score each token once."""

import math

import pytest

from onechip.errors import UserError
from onechip.questions import Score, Text
from onechip.texts import batches, bits_per_byte, crop, first_documents, in_questions, padded_lengths, windows


def test_a_crop_keeps_the_last_tokens():
    """Indices move with the tokens; what fits is left alone."""
    text = Text(list(range(10)), 7, 9)
    assert crop(text, 10) is text and crop(text, 4) == Text([6, 7, 8, 9], 1, 3)
    with pytest.raises(UserError, match="context of 3 tokens"):
        crop(text, 3)


def test_batches_hold_every_text_once():
    """Each text is in one batch, of a length that holds it, of as many rows as the budget allows; longest first."""
    sizes = [3, 64, 65, 128, 200, 1, 129, 64]
    texts = [Text([0] * n, 1, n) for n in sizes]
    lengths = padded_lengths(200)
    made = list(batches(texts, lengths, 256))
    assert lengths == [64, 128, 200] and sorted(i for indices, _ in made for i in indices) == list(range(8))
    for indices, length in made:
        assert len(indices) <= max(1, 256 // length)
        assert all(length == min(n for n in lengths if n >= sizes[i]) for i in indices)
    assert [length for _, length in made] == [200, 200, 128, 64]


@pytest.mark.parametrize("size", [1, 2, 8, 9, 12, 13, 40])
@pytest.mark.parametrize("window", [2, 7, 8])
def test_windows_score_each_token_once_with_half_a_window_before_it(size, window):
    """All tokens but the first, in order; each window is a stretch of the document, and no longer than allowed."""
    tokens, scored = [100 + i for i in range(size)], []
    for text in windows(tokens, window):
        begin = text.tokens[0] - 100
        assert text.tokens == tokens[begin : begin + len(text.tokens)] and len(text.tokens) <= window
        assert text.start >= 1 and text.end == len(text.tokens)
        assert begin == 0 or text.start >= window - window // 2
        scored += text.tokens[text.start :]
    assert scored == tokens[1:]


def uniform(vocabulary):
    """A scorer that gives every token log(vocabulary) nats."""
    return in_questions(
        lambda texts: [Score((t.end - t.start) * math.log(vocabulary), t.end - t.start, False) for t in texts]
    )


def as_bytes(texts):
    return [list(text.encode()) for text in texts]


def test_bits_per_byte_of_a_uniform_model_of_bytes():
    """256 equal bytes cost 8 bits each, whatever the windows; half as many tokens cost half."""
    documents = ["naïve", "数据 and more", "x"]
    bits = bits_per_byte(documents, as_bytes, 256, uniform(256), context=5)
    size = sum(len(text.encode()) for text in documents)
    assert bits.per_byte == pytest.approx(8) and (bits.tokens, bits.size, bits.documents) == (size, size, 3)
    pairs = bits_per_byte(["ab" * 9], lambda texts: [[7] * 9], 256, uniform(256), context=5)
    assert pairs.per_byte == pytest.approx(4) and pairs.tokens == 9


def test_bits_per_byte_of_a_model_with_memory():
    """Against a sum token by token: a scorer whose nats depend on all that is before a token sees BOS and no other
    document."""
    seen = []

    def score_texts(texts):
        seen.extend(texts)
        nats = lambda text, t: 1 + sum(text.tokens[:t]) % 7
        return [Score(float(sum(nats(t, i) for i in range(t.start, t.end))), t.end - t.start, False) for t in texts]

    documents = ["abcde", "fg"]
    bits = bits_per_byte(documents, as_bytes, 300, in_questions(score_texts), context=50)
    expected = 0
    for text in documents:
        ids = [300, *text.encode()]
        expected += sum(1 + sum(ids[:t]) % 7 for t in range(1, len(ids)))
    assert bits.nats == expected and all(text.tokens[0] == 300 for text in seen)


def test_whole_documents_up_to_some_bytes():
    """The one that reaches max_bytes is the last; empty ones do not count; none at all is an error."""
    assert first_documents(iter(["ab", "", "数", "rest"]), 4) == ["ab", "数"]
    assert first_documents(["ab"], 1000) == ["ab"]
    with pytest.raises(UserError, match="documents=0"):
        first_documents(["", ""], 10)
