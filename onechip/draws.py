"""The next token of each row, by its own temperature, top-k, top-p and seed.

A draw adds noise to the logits and takes the largest (the Gumbel-max trick). The noise depends on the row's seed and
the token's position in its text, and on nothing else: a row draws the same tokens alone and among others. Two programs
that see the same logits draw the same token, which speculative decoding relies on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HALVINGS = 32  # of a range of logits, when the lowest one that may be drawn is looked for


class Knobs(NamedTuple):
    """How each row's tokens are drawn: arrays (B,).

    temperature: float32, 0 for the likeliest token; top_k: int32, 0 for all; top_p: float32, 1 for all: the fewest
    likeliest tokens that have this probability together, of those that top_k leaves; seed: uint32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array


def first_largest(x):
    """The index (B,) int32 of the largest of x (B, V), the first of equal ones; one of V even where all are NaN."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, ids, ids[-1]), axis=-1)


def largest_floor(x, enough):
    """The largest floor (B, 1) for which enough(x >= floor) (B, 1) holds; the smallest of x (B, V) if there is none."""
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) / 2
        holds = enough(x >= middle)
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low, _ = jax.lax.fori_loop(0, HALVINGS, halve, (low, high + (high - low) / 1024))
    return low


def keep_likely(logits, top_k, top_p):
    """Logits (B, V), divided by the temperature, with all that may not be drawn at -inf.

    No sort: the floor is halved towards, to 2^-32 of the range of the logits. Logits as large as the floor all stay.
    """
    k = jnp.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    floor = largest_floor(logits, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= k)
    p = jax.nn.softmax(jnp.where(logits >= floor, logits, -jnp.inf), axis=-1)
    total = jnp.where(top_p < 1, top_p, jnp.inf)[:, None]
    lowest = largest_floor(logits, lambda kept: jnp.sum(jnp.where(kept, p, 0), axis=-1, keepdims=True) >= total)
    return jnp.where(logits >= jnp.maximum(floor, lowest), logits, -jnp.inf)


def gumbel_noise(seeds, positions, count):
    """Gumbel noise (B, count) float32 that depends on each row's seed and position alone."""

    def of_row(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (count,))

    return jax.vmap(of_row)(seeds, positions)


def draw(logits, knobs, positions):
    """Tokens (B,) drawn from logits (B, V) / temperature, of those that top_k and top_p leave."""
    scaled = logits / jnp.where(knobs.temperature > 0, knobs.temperature, 1)[:, None]
    some = jnp.any((knobs.temperature > 0) & ((knobs.top_k > 0) | (knobs.top_p < 1)))
    scaled = jax.lax.cond(some, lambda: keep_likely(scaled, knobs.top_k, knobs.top_p), lambda: scaled)
    return first_largest(scaled + gumbel_noise(knobs.seed, positions, logits.shape[-1]))


def choose(logits, knobs, positions):
    """Tokens (B,) int32 at `positions` (B,) of their texts, from logits (B, V) float32."""
    likeliest = first_largest(logits)
    warm = knobs.temperature > 0
    drawn = jax.lax.cond(jnp.any(warm), lambda: draw(logits, knobs, positions), lambda: likeliest)
    return jnp.where(warm, drawn, likeliest)


def log_probability(logits, tokens):
    """Log-probabilities (B,) float32 of tokens (B,) by logits (B, V), at temperature 1 and among all tokens."""
    of_token = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return of_token - jax.nn.logsumexp(logits, axis=-1)
