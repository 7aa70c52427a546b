"""Embeddings in training: their rows are looked up once a microbatch, and gradients are added to the rows they are of.

Autodiff's gradient of `table[tokens]` is a whole table, zero but for the rows of a microbatch; writing it and adding it
to the sum moves several hundred megabytes for each table and microbatch. Here the loss sees the rows that were looked
up, as `Rows`; its gradient is one of rows, and `Embeddings` adds those of all tables at once to float32 sums. The sums
of a token lie side by side, so that a TPU moves them in one piece: that is a Pallas kernel. The numbers are in LOG.md.
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


class Embeddings:
    """A model's embeddings with a row for each token of the vocabulary, tables (V, ...), taken out of its parameters.

    weights: the model's tree of Weights; params: its arrays. `others` is that tree with None for each embedding. A list
    of `Rows` has one for each embedding, in the order of the tree; tokens are (B, T), int32.
    """

    def __init__(self, weights, params):
        leaves, self.treedef = jax.tree.flatten(weights)
        self.taken = [weight.kind == "embed" and weight.letters[:1] == "V" for weight in leaves]
        parts = list(zip(self.taken, self.treedef.flatten_up_to(params), strict=True))
        self.tables = [part for taken, part in parts if taken]
        self.others = self.treedef.unflatten([None if taken else part for taken, part in parts])
        self.widths = [math.prod(table.shape[1:]) for table in self.tables]
        self.lines = [-(-width // 128) for width in self.widths]  # of 128 channels, the last of them filled up
        flat = [table.reshape(len(table), -1) for table in self.tables]
        self.wide = jnp.concatenate(flat, axis=1) if flat else None  # (V, C): all channels of a token side by side

    def join(self, tables, others):
        """The whole tree again, of what stands for each embedding and of what stands for the others."""
        tables, parts = iter(tables), zip(self.taken, self.treedef.flatten_up_to(others), strict=True)
        return self.treedef.unflatten([next(tables) if taken else part for taken, part in parts])

    def apart(self, wide):
        """The columns of an array (..., C) as a list of arrays (..., *shape of a row), one for each embedding."""
        starts = list(itertools.accumulate(self.widths))[:-1]
        pieces = jnp.split(wide, starts, axis=-1)
        return [p.reshape(*wide.shape[:-1], *t.shape[1:]) for p, t in zip(pieces, self.tables, strict=True)]

    def rows(self, tokens):
        """The Rows of tokens."""
        return [Rows(rows) for rows in self.apart(self.wide[tokens])] if self.tables else []

    def no_sums(self):
        """Zero sums for `add`: float32 (V, S, 128), all embeddings' side by side; None if there are none."""
        return jnp.zeros((len(self.wide), sum(self.lines), 128), jnp.float32) if self.tables else None

    def add(self, sums, tokens, grads, kernel=False):
        """The sums (V, S, 128) with the gradients of tokens added, a list of Rows.

        kernel: by the TPU kernel of row_kernel.py, where it can take that many tokens.
        """
        if not grads:
            return sums
        ids = tokens.reshape(-1)
        pad = lambda rows, lines: jnp.pad(rows, ((0, 0), (0, 128 * lines - rows.shape[1])))
        rows = [pad(g.rows.reshape(ids.size, -1), lines) for g, lines in zip(grads, self.lines, strict=True)]
        if kernel:
            from onechip.row_kernel import add_by_kernel, block_rows  # here, as Pallas takes 0.3 s to import

            if block := block_rows(ids.size, sums.shape[1], rows[0].dtype.itemsize):
                return add_by_kernel(block, sums, ids, rows)
        wide = jnp.concatenate(rows, axis=1)
        return sums.at[ids].add(wide.reshape(ids.size, -1, 128).astype(jnp.float32))

    def gradients(self, sums):
        """The sums as one float32 array for each embedding, in its shape."""
        if not self.tables:
            return []
        pieces = jnp.split(sums, list(itertools.accumulate(self.lines))[:-1], axis=1)
        cut = lambda piece, width: piece.reshape(len(sums), -1)[:, :width]
        return [
            cut(piece, width).reshape(table.shape)
            for piece, width, table in zip(pieces, self.widths, self.tables, strict=True)
        ]

    def gradients_of(self, tokens, grads):
        """`gradients` of one batch alone: each embedding's in an array of its own, which takes less memory."""
        zeros = [jnp.zeros(table.shape, jnp.float32) for table in self.tables]
        return [zero.at[tokens].add(g.rows.astype(jnp.float32)) for zero, g in zip(zeros, grads, strict=True)]
