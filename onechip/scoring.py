"""Scores on held-out rows: nats per token and bits per byte, the same whatever the batch size and the devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from onechip.hosts import spread


def make_scorer(losses, split, rows, x, y, token_bytes):
    """A function of params -> {"val_loss": nats per token, "val_bpb": bits per byte} on the rows x, y (R, T) int32.

    A target of -1 counts nothing, and so do rows that fill the last batch up. losses(params, x, y) -> nats of every
    token, float32 (rows, T); split: a NamedSharding that splits rows over the mesh; rows: sequences at a time, over all
    devices; token_bytes (V,): bytes of each token, 0 for the special ones, whose loss bits per byte leave out (as in
    nanochat).
    """
    axis = split.spec[0]

    def sums(params, x, y):
        nats = losses(params, x, jnp.maximum(y, 0))
        size = jnp.where(y >= 0, jnp.asarray(token_bytes)[jnp.maximum(y, 0)], 0)
        parts = nats * (y >= 0), nats * (size > 0), size
        return jax.lax.psum(jnp.stack([part.sum().astype(jnp.float32) for part in parts]), axis)

    specs = (PartitionSpec(), split.spec, split.spec)
    step = jax.jit(jax.shard_map(sums, mesh=split.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))

    def fill(part, value):
        return np.pad(part, ((0, rows - len(part)), (0, 0)), constant_values=value)

    def score(params):
        parts = [slice(i, i + rows) for i in range(0, len(x), rows)]
        totals = [step(params, *spread((fill(x[part], 0), fill(y[part], -1)), split)) for part in parts]
        nats, counted, size = np.sum(jax.device_get(totals), axis=0, dtype=np.float64)
        return {"val_loss": nats / np.sum(y >= 0), "val_bpb": counted / math.log(2) / size}

    return score
