"""Speculative decoding: something cheap proposes the next tokens, the model looks at all of them in one pass.

A token is taken if it is the one that the model would have written. What that is depends on the row's seed and the
position alone (draws.py), at any temperature: so the text is, token for token, the one that comes without proposals,
and its distribution too. A smaller model draws its proposals with the same noise, which makes the two agree as often as
their probabilities allow, within a factor (Gumbel coupling; Daliri, Musco and Suresh, 2024, arXiv 2408.07978).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from onechip.answers import Parts
from onechip.doors import Model
from onechip.errors import require
from onechip.ring import cut_rings, write_rings


@dataclasses.dataclass(frozen=True)
class CopyDraft:
    """Proposals from the text so far: what followed its last `longest` to `shortest` tokens when they came up before.

    count: tokens that are proposed at a time.
    """

    count: int = 7
    longest: int = 4
    shortest: int = 2

    def __post_init__(self):
        require(self.count > 0, "count", self.count, "propose at least one token")
        require(0 < self.shortest <= self.longest, "shortest", self.shortest, f"must be 1 to longest={self.longest}")


@dataclasses.dataclass(frozen=True)
class ModelDraft:
    """Proposals by a smaller model of the same tokenizer, in the engine's words; count: tokens at a time."""

    config: object
    params: dict
    model: Model
    parts: Parts
    count: int = 4

    def __post_init__(self):
        require(self.count > 0, "count", self.count, "propose at least one token")


def copy_forward(text, draft):
    """What a CopyDraft proposes after a text, (n,) int32: (count,) int32, all -1 if no end of it came up before.

    Where the earlier place is so near that its continuation runs into the end, it continues into the proposal itself.
    """
    for size in range(draft.longest, draft.shortest - 1, -1):
        if len(text) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        found = np.flatnonzero((windows == text[-size:]).all(axis=1))
        if found.size:
            follows = text[found[-1] + size :]
            return np.resize(follows, draft.count)  # repeats what is too short
    return np.full(draft.count, -1, np.int32)


def propose_copies(texts, forced, draft):
    """Proposals (B, count) int32 for texts, a list of (n,) int32 or None for rows that rest; -1 where there is none.

    forced: per row the tokens that come next in any case, which are proposed first.
    """
    proposals = np.full((len(texts), draft.count), -1, np.int32)
    for row, text, first in zip(proposals, texts, forced, strict=True):
        first = first[: draft.count]
        row[: len(first)] = first
        if text is not None and len(first) < draft.count:
            row[len(first) :] = copy_forward(np.append(text, first).astype(np.int32), draft)[: draft.count - len(first)]
    return proposals


def write_with_draft(decoder, small, params, rings, turn, span):
    """(rings, Written), as Decoder.write_tokens, of a model and a smaller one: Decoders, pairs of parameters and rings.

    The smaller one writes D tokens from turn.forced (B, D), of which D - 1 are looked at; its last one is only read.
    """
    D = turn.forced.shape[1]
    ahead = turn._replace(limit=jnp.where(turn.limit > 0, D, 0), stops=jnp.full_like(turn.stops, -1))
    drafted, columns = small.write_columns(params[1], cut_rings(rings[1], span), ahead)
    large, written = decoder.check_drafts(params[0], rings[0], turn, drafted.tokens[:, :-1], span)
    return (large, write_rings(rings[1], columns, turn.start, written.counts)), written
