"""A mixture of conversations: named sources and how many of each, in one seeded order; packed into rows of tokens."""

import bisect
import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from onechip.conversations import render_conversation
from onechip.errors import UserError, require

SEED, WAITING = 42, 100  # of the order; conversations among which the longest that fits is looked for
LARGEST_COUNT = 10**8


class TalkSource(NamedTuple):
    """messages(number) -> conversation `number` of those named so; a source with fewer begins again.

    held_out(number): the same of those that are never trained on; None if there are none.
    """

    name: str
    messages: Callable
    held_out: Callable | None = None


def parse_mixture(text, known):
    """{name: count} of "spelling:9000 smoltalk:460000"; UserError for a name that is not known, or no count."""
    counts = {}
    for word in text.split():
        name, _, count = word.partition(":")
        require(name in known, "mixture", word, f"use {', '.join(known)}, each with a count: {next(iter(known))}:1000")
        fine = re.fullmatch("[0-9]{1,9}", count) and 0 < int(count) <= LARGEST_COUNT
        require(fine, "mixture", word, f"must have a count from 1 to {LARGEST_COUNT:,}, as in {name}:1000")
        require(name not in counts, "mixture", word, "is there twice: add the counts")
        counts[name] = int(count)
    require(counts, "mixture", text, f"must name at least one source with its count: {next(iter(known))}:1000")
    return counts


class Mixture:
    """Conversations by number, without end: each epoch has `count` of every source, in an order of its own."""

    def __init__(self, sources, counts, held_out=False):
        """sources: [TalkSource]; counts: {name: how many in an epoch}."""
        pick = lambda source: source.held_out if held_out else source.messages
        self._parts = [(pick(source), counts[source.name]) for source in sources if pick(source)]
        self._ends = list(itertools.accumulate(count for _, count in self._parts))
        self.size = self._ends[-1]
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: self._shuffled(epoch))

    def _shuffled(self, epoch):
        return np.random.default_rng([SEED, epoch]).permutation(self.size)

    def messages(self, number):
        """Conversation `number` of the mixture, a list of messages."""
        epoch, place = divmod(number, self.size)
        which = int(self._order(epoch)[place])
        part = bisect.bisect_right(self._ends, which)
        source, count = self._parts[part]
        return source(epoch * count + which - self._ends[part] + count)


def check_place(position):
    """UserError unless a position in a mixture is None or one that packed_conversations has given."""
    if position is None:
        return
    numbers = [position.get("next"), *(position.get("waiting") or [])]
    fine = set(position) >= {"next", "waiting", "tokens", "padding"}
    fine = fine and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    if not fine:
        raise UserError(f"position={str(position)[:80]!r}: is none in a mixture of conversations")


def packed_conversations(mixture, tokens, rows, length, position=None):
    """Yields (ids, mask, position after them): int32 (rows, length) each, mask 1 where a token is learned.

    A row takes whole conversations, of those that wait the longest that still fits, until none does; the rest of it is
    <|bos|> and is not learned. One that is longer than a row is cut to it. tokens: ChatTokens. position: where to
    resume; "log" in it has the share of padding so far.
    """
    position = position or {"next": 0, "waiting": [], "tokens": 0, "padding": 0}
    following, total, padding = position["next"], position["tokens"], position["padding"]
    render = lambda number: (number, *render_conversation(tokens, mixture.messages(number), length))
    size = lambda item: len(item[1])
    held = [render(number) for number in position["waiting"]]
    while True:
        ids, mask = np.full((rows, length), tokens.bos, np.int32), np.zeros((rows, length), np.int32)
        for row in range(rows):
            filled = 0
            while True:
                while len(held) < WAITING:
                    bisect.insort_left(held, render(following), key=size)  # the oldest of a length leaves first
                    following += 1
                fits = bisect.bisect_right(held, length - filled, key=size)
                if fits == 0:
                    break
                _, some, learned = held.pop(fits - 1)
                ids[row, filled : filled + len(some)], mask[row, filled : filled + len(some)] = some, learned
                filled += len(some)
            padding += length - filled
        total += ids.size
        place = {"next": following, "waiting": [item[0] for item in held], "tokens": total, "padding": padding}
        yield ids, mask, place | {"log": {"padding": padding / total}}


def masked_batch(ids, mask):
    """{"x", "y", "mask"}, int32 (B, T) each, of rows (B, T + 1): the mask is that of the targets y."""
    return {"x": ids[:, :-1], "y": ids[:, 1:], "mask": mask[:, 1:]}
