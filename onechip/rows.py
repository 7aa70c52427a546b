"""Embeddings in training: their rows are looked up once a microbatch, and gradients are added to the rows they are of.

Autodiff's gradient of `table[tokens]` is a whole table, zero but for the rows of a microbatch; writing it and adding it
to the sum moves several hundred megabytes for each table and microbatch. Here the loss sees the rows that were looked
up, as `Rows`; its gradient is one of rows, and `add_rows` adds those of all tables at once to float32 sums. The sums of
a token lie side by side, so that a TPU moves them in one piece: that is a Pallas kernel. The numbers are in LOG.md.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """The rows of an embedding that a batch's tokens (B, T) name: (B, T, ...)."""

    rows: jax.Array

    def __getitem__(self, tokens):
        raise TypeError("this embedding's rows have been looked up: use onechip.rows.lookup(table, tokens)")


def lookup(table, tokens):
    """Rows (B, T, ...) of an embedding (V, ...) for tokens (B, T); in training, the Rows that are there already."""
    if not isinstance(table, Rows):
        return table[tokens]
    if table.rows.shape[: tokens.ndim] != tokens.shape:
        raise ValueError(f"rows of {table.rows.shape[:2]} tokens, asked for {tokens.shape}: batch['x'] is looked up")
    return table.rows


def is_table(weight):
    """Whether a Weight is an embedding with a row for each token of the vocabulary."""
    return weight.kind == "embed" and weight.letters[:1] == "V"


def split_tables(weights, tree):
    """(the parts of a tree at the embeddings, the tree with None in their place)."""
    leaves, treedef = jax.tree.flatten(weights)
    parts = treedef.flatten_up_to(tree)
    tables = [part for weight, part in zip(leaves, parts, strict=True) if is_table(weight)]
    return tables, treedef.unflatten(None if is_table(w) else part for w, part in zip(leaves, parts, strict=True))


def join_tables(weights, tables, others):
    """The tree that split_tables took apart."""
    tables, others = iter(tables), iter(jax.tree.leaves(others))
    return jax.tree.map(lambda weight: next(tables) if is_table(weight) else next(others), weights)


def widths_of(tables):
    """Channels of each of several embeddings (V, ...)."""
    return [math.prod(table.shape[1:]) for table in tables]


def stack_tables(tables):
    """Embeddings (V, ...) as one (V, C), all channels of a token in a row; None if there are none."""
    return jnp.concatenate([table.reshape(len(table), -1) for table in tables], axis=1) if tables else None


def apart(wide, tables):
    """The columns of an array (..., C) as a list of arrays (..., *shape of a row), one for each of the embeddings."""
    starts = itertools.accumulate(widths_of(tables), initial=0)
    pieces = [wide[..., start : start + width] for start, width in zip(starts, widths_of(tables), strict=False)]
    return [piece.reshape(*wide.shape[:-1], *table.shape[1:]) for piece, table in zip(pieces, tables, strict=True)]


def take_rows(wide, tables, tokens):
    """The Rows of tokens (B, T) for each of the embeddings, from all of them side by side (V, C)."""
    return [Rows(rows) for rows in apart(wide[tokens], tables)] if tables else []


def empty_sums(tables):
    """Zero sums for the gradients of embeddings, side by side: float32 (V, S, 128); None if there are none."""
    return jnp.zeros((len(tables[0]), -(-sum(widths_of(tables)) // 128), 128), jnp.float32) if tables else None


def add_rows(sums, tokens, grads, kernel=False):
    """The sums (V, S, 128) with gradients added, a list of Rows (B, T, ...), one for each embedding; tokens (B, T).

    kernel: by the TPU kernel of row_kernel.py, where it can take that many tokens.
    """
    if not grads:
        return sums
    ids = tokens.reshape(-1)
    rows = jnp.concatenate([g.rows.reshape(ids.size, -1) for g in grads], axis=1)
    rows = jnp.pad(rows, ((0, 0), (0, sums[0].size - rows.shape[1])))
    if kernel:
        from onechip.row_kernel import add_by_kernel, block_rows  # here, as Pallas takes 0.3 s to import

        if block := block_rows(ids.size, sums.shape[1], rows.dtype.itemsize):
            return add_by_kernel(block, sums, ids, rows)
    return sums.at[ids].add(rows.reshape(ids.size, -1, 128).astype(jnp.float32))


def gradients(sums, tables):
    """The sums (V, S, 128) as one float32 array for each of the embeddings, in their shapes."""
    return apart(sums.reshape(len(sums), -1), tables) if tables else []
