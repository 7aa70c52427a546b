"""Keys and values of the tokens so far, a ring for each layer; and attention of new tokens over them.

A layer whose queries see W keys keeps the last W positions, position p in slot p % W; a layer that sees all keeps as
many as a text may have. Each row has its own length. What a dispatch adds lies apart, side by side in the same columns
for all rows, and goes into the ring at the end: the ring is only read meanwhile, which no program has to copy for, and
tokens that are taken back have never been in it.

Keys are (rows, K, slots, H) and values (rows, K, H, slots), as the two products of attention take them: any other
layout, XLA would convert for each token.
"""

import jax
import jax.numpy as jnp


def empty_pair(config, rows, slots):
    """(keys, values) of zeros in the compute type."""
    K, H = config.n_kv_head, config.head_dim
    return jnp.zeros((rows, K, slots, H), config.dtype), jnp.zeros((rows, K, H, slots), config.dtype)


def empty_rings(config, rows, length):
    """Per layer (keys, values) for texts of at most `length` tokens."""
    return tuple(empty_pair(config, rows, min(window, length)) for window in config.windows)


def empty_columns(config, rows, count):
    """Per layer (keys, values), with `count` slots: what a dispatch of as many tokens a row adds."""
    return tuple(empty_pair(config, rows, count) for _ in range(config.n_layer))


def as_columns(k, v):
    """(keys, values) of k, v (B, T, K, H)."""
    return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)


def positions_held(start, slots):
    """The position in each of `slots` slots of a ring that holds `start` (B,) tokens: (B, slots), negative if none."""
    newest = start[:, None] - 1
    return newest - (newest - jnp.arange(slots)) % slots


def cut_rings(rings, span):
    """The first `span` slots of each ring: all that is in use while no text is longer."""
    return tuple((keys[:, :, :span], values[:, :, :, :span]) for keys, values in rings)


def attend_over(parts, q, scale):
    """softmax(scale * q k) v over several pieces of keys and values, softmax in float32; returns (B, T, N, H).

    parts: (keys, values, mask (B, T, S)); at least one key of each query is not masked.
    """
    B, T, N, H = q.shape
    q = q.reshape(B, T, parts[0][0].shape[1], -1, H)  # query heads in groups g that share a key/value head
    scores, cuts = [], []
    for keys, _, mask in parts:
        products = jnp.einsum("btkgh,bksh->bkgts", q, keys, preferred_element_type=jnp.float32) * scale
        scores.append(jnp.where(mask[:, None, None], products, -jnp.inf))
        cuts.append(keys.shape[2] + (cuts[-1] if cuts else 0))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    weights = jnp.split(weights, cuts[:-1], axis=-1)
    pieces = [jnp.einsum("bkgts,bkhs->btkgh", w, values) for w, (_, values, _) in zip(weights, parts, strict=True)]
    return sum(pieces).reshape(B, T, N, H)


def add_columns(columns, k, v, first):
    """Columns with those of k, v (B, T, K, H) from slot `first` on."""
    (keys, values), (new_keys, new_values) = columns, as_columns(k, v)
    keys = jax.lax.dynamic_update_slice_in_dim(keys, new_keys, first, axis=2)
    return keys, jax.lax.dynamic_update_slice_in_dim(values, new_values, first, axis=3)


def window_masks(start, first, new, slots, held, columns, window):
    """(mask of the ring (B, T, held), mask of the columns (1, T, columns)) for T new tokens from column `first` on.

    start (B,): tokens in the ring, which has `slots` slots, of which the first `held` are looked at.
    """
    own = first + jnp.arange(new)
    distance = (start[:, None] + own)[:, :, None] - positions_held(start, slots)[:, None, :held]
    in_ring = (distance < window) & (positions_held(start, slots)[:, None, :held] >= 0)
    between = own[:, None] - jnp.arange(columns)
    return in_ring, ((between >= 0) & (between < window))[None]


def write_rings(rings, columns, start, counts):
    """The rings with the first counts (B,) columns of each row added, at positions start (B,) and after.

    Of more columns than a ring has slots the last ones stay.
    """
    rows, column = jnp.arange(len(start))[:, None], jnp.arange(columns[0][0].shape[2])

    def write(ring, new):
        (keys, values), (new_keys, new_values), slots = ring, new, ring[0].shape[2]
        kept = (column < counts[:, None]) & (column >= counts[:, None] - slots)
        slot = jnp.where(kept, (start[:, None] + column) % slots, slots)  # past the end: dropped
        keys = keys.at[rows, :, slot].set(new_keys.transpose(0, 2, 1, 3), mode="drop")
        return keys, values.at[rows, :, :, slot].set(new_values.transpose(0, 3, 1, 2), mode="drop")

    return tuple(map(write, rings, columns))


def fill_rings(rings, columns, row, lengths):
    """The rings with rows replaced by texts of `lengths` (R,) tokens, whose columns are padded to one length.

    row (R,): where each goes; one past the last row goes nowhere. Slots that no token of a text has may hold anything.
    """
    padded = columns[0][0].shape[2]

    def fill(ring, new):
        (keys, values), (new_keys, new_values), slots = ring, new, ring[0].shape[2]
        if padded > slots:
            position = jnp.maximum(positions_held(lengths, slots), 0)
            new_keys = jnp.take_along_axis(new_keys, position[:, None, :, None], axis=2)
            new_values = jnp.take_along_axis(new_values, position[:, None, None, :], axis=3)
        held = min(padded, slots)
        keys = keys.at[row, :, :held].set(new_keys, mode="drop")
        return keys, values.at[row, :, :, :held].set(new_values, mode="drop")

    return tuple(map(fill, rings, columns))
