"""Text from tokens as they come: whole characters, and in the end what all tokens decode to."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from onechip.textstream import UNKNOWN, TextStream


@pytest.fixture(scope="module")
def bytewise():
    """A byte-level tokenizer of single bytes, and one special token, 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>"])
    return tokenizer


def pieces_of(decode, ids, sizes):
    """What a stream gives for ids that come `sizes` at a time, and at the end."""
    stream, pieces, at = TextStream(decode), [], 0
    for size in sizes:
        pieces.append(stream.add(ids[at : at + size]))
        at += size
    assert at >= len(ids)
    return [*pieces, stream.end()]


@pytest.mark.parametrize("text", ["naïve café", "日本語 🙂🙃", "👩‍👩‍👧 e\u0301", "a\ufffdb\ufffd", "plain"])
def test_no_half_character_comes_out(bytewise, text):
    """Byte by byte: each piece is part of the text, a character comes with its last byte."""
    ids = bytewise.encode(text).ids
    pieces = pieces_of(bytewise.decode, ids, [1] * len(ids))
    assert "".join(pieces) == text and len(ids) == len(text.encode())
    if UNKNOWN not in text:
        seen = b""
        for byte, piece in zip(text.encode(), pieces, strict=False):
            seen += bytes([byte])
            assert UNKNOWN not in piece
            whole = seen.decode(errors="ignore")
            assert "".join(pieces[: len(seen)]) == whole


def test_the_whole_is_what_all_tokens_decode_to(bytewise):
    """2,000 random texts of random bytes, most of them no UTF-8, with special tokens, in pieces of random sizes."""
    rng = np.random.default_rng(0)
    start = bytewise.encode("é🙂").ids
    for _ in range(2000):
        ids = rng.integers(0, 257, rng.integers(1, 12)).tolist()
        ids = [*ids, *start[: rng.integers(0, 7)], *ids[:2]]
        sizes = rng.integers(0, 4, 3 * len(ids))
        sizes[-1] = len(ids)
        assert "".join(pieces_of(bytewise.decode, ids, sizes)) == bytewise.decode(ids)


def test_only_what_is_not_whole_is_decoded_again(bytewise):
    """A long text costs as many decoded tokens as it has, and a few more."""
    counted = []

    def decode(ids):
        counted.append(len(ids))
        return bytewise.decode(ids)

    ids = bytewise.encode("ab🙂" * 50).ids
    assert "".join(pieces_of(decode, ids, [1] * len(ids))) == "ab🙂" * 50
    assert sum(counted) < 3 * len(ids)
