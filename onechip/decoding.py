"""The engine's programs: prompts go in, tokens come out, for all rows of a batch at once.

- `read_prompts` takes prompts padded to one length, fills their rows' rings and gives the first token of each.
- `write_tokens` writes several tokens a row, one after another: one dispatch, one loop on the device.
- `check_drafts` takes tokens that something else proposes, looks at all of them in one pass, and keeps those that the
  model would have written itself, and one more.

All are functions of arrays; rows lie along the first axis and know nothing of each other. A Config's compute type, a
Model's functions and the notebook's attention for whole texts are handed in.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from onechip.answers import Parts, rotate_each
from onechip.doors import Model
from onechip.draws import Knobs, choose, log_probability
from onechip.layers import rope_and_norm, soft_cap
from onechip.quantize import widen_weights
from onechip.ring import (
    add_columns,
    as_columns,
    attend_over,
    cut_rings,
    empty_columns,
    fill_rings,
    window_masks,
    write_rings,
)


class Turn(NamedTuple):
    """What a dispatch has to know of each row: arrays (B, ...).

    token, before: the newest token of the text, which the ring does not hold yet, and the one before it, -1 if none;
    start: tokens in the ring; limit: tokens to write at most, 0 for a row that rests; forced (B, D): what the first
    `forced_count` (B,) of them have to be; stops (B, S): tokens after which the row rests, -1 for none; knobs: Knobs.
    """

    token: jax.Array
    before: jax.Array
    start: jax.Array
    limit: jax.Array
    forced: jax.Array
    forced_count: jax.Array
    stops: jax.Array
    knobs: Knobs


class Written(NamedTuple):
    """tokens (B, D) int32, of which the first counts (B,) are written, and their log-probabilities (B, D) float32."""

    tokens: jax.Array
    log_probabilities: jax.Array
    counts: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One model's programs. config: its Config; model: its Model; parts: onechip.answers.Parts; length: of a text."""

    config: object
    model: Model
    parts: Parts
    length: int

    def angles(self, positions):
        """Cosines and signed sines (B, T, H) of positions (B, T)."""
        return [jnp.asarray(table).at[positions].get(mode="clip") for table in self.parts.tables(self.length)]

    def run(self, params, tokens, before, attend):
        """(hidden states (B, T, D), what attend(i, q, k, v) gave of each layer) for tokens (B, T); before (B, 1)."""
        config, model, added = self.config, self.model, []
        params = widen_weights(params, config.dtype, tokens)
        streams = [model.embed(config, params, tokens, before)]
        for i in range(config.n_layer):
            x, columns = model.block(config, params, i, streams, tokens, functools.partial(attend, i))
            streams.append(x)
            added.append(columns)
        return model.readout(config, params, streams), tuple(added)

    def logits(self, params, hidden):
        """Logits (B, V) float32 of hidden states (B, D)."""
        lm_head = widen_weights(params["lm_head"], self.config.dtype, hidden)
        z = jnp.einsum("bd,dv->bv", hidden, lm_head, preferred_element_type=jnp.float32)
        return soft_cap(self.config.softcap, z)[0]

    def read_prompts(self, params, rings, tokens, lengths, row, knobs):
        """(rings, (first tokens (R,), their log-probabilities)) of prompts (R, P), padded after `lengths` (R,).

        row (R,): where each text goes; one past the last row goes nowhere.
        """
        config, P = self.config, tokens.shape[1]
        rope = [jnp.asarray(table) for table in self.parts.tables(P)]
        whole = self.parts.attention(P)

        def attend(i, q, k, v, more=None):
            v = with_more(v, more)
            out = whole(q, k, v, rope, config.windows[i], config.score_scale)
            return out, as_columns(rope_and_norm(k, *rope), v)

        hidden, columns = self.run(params, tokens, None, attend)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = self.logits(params, last)
        first = choose(logits, knobs, lengths)
        return fill_rings(rings, columns, row, lengths), (first, log_probability(logits, first))

    def over_rings(self, rings, columns, start, first, new):
        """`attend` for `new` tokens a row from column `first` on; rings are only read."""
        config, D = self.config, columns[0][0].shape[2]
        rope = self.angles(start[:, None] + first + jnp.arange(new))
        slots = [min(window, self.length) for window in config.windows]
        shapes = {(slots[i], ring[0].shape[2], config.windows[i]) for i, ring in enumerate(rings)}
        masks = {s: window_masks(start, first, new, s[0], s[1], D, s[2]) for s in sorted(shapes)}

        def attend(i, q, k, v, more=None):
            own = add_columns(columns[i], rotate_each(k, *rope), with_more(v, more), first)
            in_ring, in_columns = masks[slots[i], rings[i][0].shape[2], config.windows[i]]
            parts = (*rings[i], in_ring), (*own, in_columns)
            return attend_over(parts, rotate_each(q, *rope), config.score_scale), own

        return attend

    def write_columns(self, params, rings, turn):
        """(Written, columns): up to D tokens a row, D from turn.forced. The rings stay as they are."""
        B, D = turn.forced.shape

        def go_on(state):
            return (state[0] < D) & jnp.any(state[3])

        def next_token(state):
            t, token, before, busy, columns, written = state
            attend = self.over_rings(rings, columns, turn.start, t, 1)
            hidden, columns = self.run(params, token[:, None], before[:, None], attend)
            logits = self.logits(params, hidden[:, 0])
            chosen = choose(logits, turn.knobs, turn.start + t + 1)
            forced = t < turn.forced_count
            chosen = jnp.where(forced, turn.forced[:, t], chosen)
            put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b[:, None], t, axis=1)
            tokens, nats = put(written.tokens, chosen), put(written.log_probabilities, log_probability(logits, chosen))
            written = Written(tokens, nats, written.counts + busy)
            stopped = jnp.any(chosen[:, None] == turn.stops, axis=1) & ~forced
            return t + 1, chosen, token, busy & ~stopped & (t + 1 < turn.limit), columns, written

        empty = Written(jnp.zeros((B, D), jnp.int32), jnp.zeros((B, D), jnp.float32), jnp.zeros(B, jnp.int32))
        columns = empty_columns(self.config, B, D)
        state = jnp.int32(0), turn.token, turn.before, turn.limit > 0, columns, empty
        *_, columns, written = jax.lax.while_loop(go_on, next_token, state)
        return written, columns

    def write_tokens(self, params, rings, turn, span):
        """(rings, Written): up to D tokens a row, of texts whose rings hold at most `span` tokens so far."""
        written, columns = self.write_columns(params, cut_rings(rings, span), turn)
        return write_rings(rings, columns, turn.start, written.counts), written

    def check_drafts(self, params, rings, turn, drafts, span):
        """(rings, Written): the tokens that write_tokens would write, as far as drafts (B, D - 1) have them, and one
        more: D at most. A draft of -1 is none; one that is not taken has no effect. Those of turn.forced come first."""
        B, D = turn.forced.shape
        column = jnp.arange(D)
        tokens = jnp.concatenate([turn.token[:, None], jnp.maximum(drafts, 0)], axis=1)
        columns = empty_columns(self.config, B, D)
        attend = self.over_rings(cut_rings(rings, span), columns, turn.start, 0, D)
        hidden, columns = self.run(params, tokens, turn.before[:, None], attend)
        logits = self.logits(params, hidden.reshape(B * D, -1))
        knobs = jax.tree.map(lambda a: jnp.repeat(a, D), turn.knobs)
        chosen = choose(logits, knobs, (turn.start[:, None] + column + 1).reshape(-1)).reshape(B, D)
        forced = column < turn.forced_count[:, None]
        chosen = jnp.where(forced, turn.forced, chosen)
        nats = log_probability(logits, chosen.reshape(-1)).reshape(B, D)
        stopped = jnp.any(chosen[:, :, None] == turn.stops[:, None], axis=2) & ~forced
        right = (chosen[:, :-1] == drafts) & ~stopped[:, :-1]
        counts = 1 + jnp.sum(jnp.cumprod(right, axis=1), axis=1, dtype=jnp.int32)
        written = Written(chosen, nats, jnp.minimum(counts, turn.limit))
        return write_rings(rings, columns, turn.start, written.counts), written


def with_more(v, more):
    """Values (B, T, K, H) with what a model's `more` adds: a gate (B, T, K) float32 times rows (B, T, K * H)."""
    if more is None:
        return v
    gate, rows = more
    return v + gate.astype(v.dtype)[..., None] * rows.reshape(v.shape)
