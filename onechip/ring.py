"""Keys and values of the tokens so far, a ring for each layer; and attention of new tokens over them.

A layer whose queries see W keys keeps the last W positions, position p in slot p % W; a layer that sees all keeps as
many as a text may have. Each row has its own length. What a dispatch adds lies apart, side by side in the same columns
for all rows, and goes into the ring at the end: the ring is only read meanwhile, which no program has to copy for, and
tokens that are taken back have never been in it.
"""

import jax
import jax.numpy as jnp


def empty_rings(config, rows, length):
    """Per layer (keys, values), each (rows, K, slots, H) zeros in the compute type, for texts of at most `length`."""
    K, H = config.n_kv_head, config.head_dim
    zeros = lambda slots: jnp.zeros((rows, K, slots, H), config.dtype)
    return tuple((zeros(slots), zeros(slots)) for slots in (min(window, length) for window in config.windows))


def empty_columns(config, rows, count):
    """Per layer (keys, values), each (rows, K, count, H) zeros: what a dispatch of `count` tokens a row adds."""
    shape = rows, config.n_kv_head, count, config.head_dim
    return tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.n_layer))


def positions_held(start, slots):
    """The position in each of `slots` slots of a ring that holds `start` (B,) tokens: (B, slots), negative if none."""
    newest = start[:, None] - 1
    return newest - (newest - jnp.arange(slots)) % slots


def cut_rings(rings, span):
    """The first `span` slots of each ring: all that is in use while no text is longer."""
    return jax.tree.map(lambda a: a[:, :, :span], rings)


def attend_over(parts, q, scale):
    """softmax(scale * q k) v over several pieces of keys and values, softmax in float32; returns (B, T, N, H).

    parts: (keys, values (B, K, S, H), mask (B, T, S)); at least one key of each query is not masked.
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
    pieces = [jnp.einsum("bkgts,bksh->btkgh", w, v) for w, (_, v, _) in zip(weights, parts, strict=True)]
    return sum(pieces).reshape(B, T, N, H)


def add_columns(columns, new, first):
    """Columns (keys, values) with new ones (B, T, K, H) each from column `first` on."""
    put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.swapaxes(1, 2).astype(a.dtype), first, axis=2)
    return tuple(map(put, columns, new))


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
    """The rings with the first counts (B,) columns of each row added, at positions start (B,) and after."""
    return tuple(
        tuple(write_ring(ring, new, start, counts) for ring, new in zip(*pairs, strict=True))
        for pairs in zip(rings, columns, strict=True)
    )


def write_ring(ring, new, start, counts):
    """One array (B, K, slots, H) with columns (B, K, D, H) added; of more columns than slots the last ones stay."""
    slots, column = ring.shape[2], jnp.arange(new.shape[2])
    kept = (column < counts[:, None]) & (column >= counts[:, None] - slots)
    slot = jnp.where(kept, (start[:, None] + column) % slots, slots)  # past the end: dropped
    rows = jnp.arange(ring.shape[0])[:, None]
    return ring.at[rows, :, slot].set(new.swapaxes(1, 2), mode="drop")


def fill_rings(rings, columns, row, lengths):
    """The rings with rows replaced by texts of `lengths` (R,) tokens, whose keys and values are (R, K, P, H).

    row (R,): where each goes; one past the last row goes nowhere.
    """
    return tuple(
        tuple(fill_ring(ring, new, row, lengths) for ring, new in zip(*pairs, strict=True))
        for pairs in zip(rings, columns, strict=True)
    )


def fill_ring(ring, new, row, lengths):
    """One array (B, K, slots, H) with rows replaced by (R, K, P, H); what is not in a text may hold anything."""
    slots, P = ring.shape[2], new.shape[2]
    if P <= slots:
        return ring.at[row, :, :P].set(new, mode="drop")
    position = jnp.maximum(positions_held(lengths, slots), 0)
    return ring.at[row].set(jnp.take_along_axis(new, position[:, None, :, None], axis=2), mode="drop")
