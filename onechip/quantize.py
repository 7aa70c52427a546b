"""Weights of matrices in 8 bits: an int8 for each number and a float32 for each output channel.

A decode step reads every weight once, so half the bytes are half its time on a chip. Nothing but the matrices changes:
embeddings are read a row at a time, scalars are few. A program widens a weight where it uses it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from onechip.weights import cast_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Quantized:
    """A matrix as values (int8, its shape) times scale (float32, 1 along the axes that a product sums over)."""

    values: jax.Array
    scale: jax.Array


def is_quantized(leaf):
    """Whether something is Quantized, for jax.tree.map."""
    return isinstance(leaf, Quantized)


def quantize_array(array, inputs):
    """An array as Quantized, whose first `inputs` axes a product sums over: the largest of a channel becomes 127."""
    array = jnp.asarray(array, jnp.float32)
    largest = jnp.max(jnp.abs(array), axis=tuple(range(inputs)), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return Quantized(jnp.round(array / scale).astype(jnp.int8), scale)


def quantize_weights(table, params, dtype):
    """Parameters with each matrix of the blocks, and lm_head, as Quantized, and all else as cast_weights leaves it.

    table: the model's table of Weights.
    """

    def small(weight, array):
        inputs, arrow, outputs = weight.axes.partition("->")
        whole = not (arrow and outputs) or weight.kind == "embed"
        return cast_weights(weight, array, dtype) if whole else quantize_array(array, len(inputs))

    return jax.tree.map(small, table, params)


def widen_weights(params, dtype, after):
    """Parameters with each Quantized as an array of `dtype`; those without one come back as they are.

    after: an array of this step of a loop. The weights are made to wait for it, else XLA would widen them once, ahead
    of the loop, and every step would read the wide ones.
    """
    if not any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        return params

    def widen(leaf):
        if not is_quantized(leaf):
            return leaf
        values, _ = jax.lax.optimization_barrier((leaf.values, after))
        return (values.astype(jnp.float32) * leaf.scale).astype(dtype)

    return jax.tree.map(widen, params, is_leaf=is_quantized)
