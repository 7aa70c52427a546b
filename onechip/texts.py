"""Texts on their way through a model: cropped to its context, batched by length; and documents as windows of them."""

import math
from typing import NamedTuple

from onechip.errors import UserError, require
from onechip.questions import Text

SHORTEST = 64  # tokens: shorter texts are padded to so many
BATCH_TOKENS = 4096  # about so many, of other people's models
WINDOW = 2048  # tokens of a document's window, where a model's context has room for so many


def crop(text, limit):
    """The Text's last `limit` tokens, as CORE has it for models with learned positions; itself if it fits.

    UserError if a scored token would be left without any before it.
    """
    extra = max(0, len(text.tokens) - limit)
    if text.start - extra < 1:
        size = f"{len(text.tokens)} tokens, scored from {text.start}"
        raise UserError(f"text={size}: the model's context of {limit} tokens must hold what is scored, and one before")
    return Text(text.tokens[extra:], text.start - extra, text.end - extra) if extra else text


def padded_lengths(limit):
    """The lengths that texts are padded to, so that few programs are compiled: 64, 128, ... below limit, and limit."""
    return [SHORTEST << i for i in range(32) if SHORTEST << i < limit] + [limit]


def batches(texts, lengths, budget):
    """Yields (indices, length): texts that are padded to one length, at most budget // length of them (at least 1).

    lengths: ascending; each text is padded to the first that holds it. Longest first: if memory is too small for any,
    it is for the first.
    """
    groups = {}
    for i, text in enumerate(texts):
        groups.setdefault(next(n for n in lengths if n >= len(text.tokens)), []).append(i)
    for length in sorted(groups, reverse=True):
        rows = max(1, budget // length)
        for at in range(0, len(groups[length]), rows):
            yield groups[length][at : at + rows], length


def in_questions(score_texts):
    """A scorer of questions, list[list[Text]] -> list[list[Score]], from one of texts, list[Text] -> list[Score]."""

    def score(questions):
        scores = iter(score_texts([text for question in questions for text in question]))
        return [[next(scores) for _ in question] for question in questions]

    return score


# ----------------------------------------------------------------------------------------------------------------------
# Bits per byte of whole documents


class Bits(NamedTuple):
    """What some documents cost a model. nats: the cross-entropy of all their tokens; size: their UTF-8 bytes."""

    nats: float
    tokens: int
    size: int
    documents: int

    @property
    def per_byte(self):
        """Bits per byte."""
        return self.nats / math.log(2) / self.size


def first_documents(texts, max_bytes):
    """The first documents, whole, whose UTF-8 bytes together reach max_bytes, or all of them; empty ones are left out.

    Any model's bits per byte of them are then of the very same bytes.
    """
    taken, size = [], 0
    for text in texts:
        if text:
            taken.append(text)
            size += len(text.encode())
        if size >= max_bytes:
            break
    require(taken, "documents", 0, "there is no held-out text to score")
    return taken


def windows(tokens, window):
    """A document as Texts that score each of its tokens but the first once: windows of at most `window` tokens.

    The second and later ones overlap by half, so that each of their scored tokens has at least half a window of the
    document before it (or all of the document that is before it).
    """
    texts, done, step = [], 1, max(1, window // 2)
    while done < len(tokens):
        end = min(len(tokens), window if done == 1 else done + step)
        begin = max(0, end - window)
        texts.append(Text(tokens[begin:end], done - begin, end - begin))
        done = end
    return texts


def bits_per_byte(documents, encode, bos, score, context):
    """Bits of documents (list of str) under a model with its own tokenizer. Comparable between models of any kind.

    encode(texts) -> [ids], without special tokens; bos: the id that opens a document, so that its first token is scored
    as well, given that alone; score: a scorer; context: the longest input of the model. Windows are min(context, 2048)
    tokens, see `windows`; no document sees another. All of a document's bytes count, whatever its tokens are.
    """
    window = min(context, WINDOW)
    require(window >= 2, "context", context, "must hold two tokens at least")
    ids = [[bos, *tokens] for tokens in encode(documents)]
    scores = [score for scores in score([windows(tokens, window) for tokens in ids]) for score in scores]
    nats = math.fsum(score.nats for score in scores)
    size = sum(len(text.encode()) for text in documents)
    return Bits(nats, sum(score.count for score in scores), size, len(documents))
