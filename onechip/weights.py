"""Weights as a table: of each array its axes, how it starts and what it counts as. All that reads a model reads this.

A table is a dict of Weights, of dicts, or of lists of dicts (one a layer). The parameters have the same structure, with
an array in the place of each Weight. A Config's `sizes` gives each letter its number.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from onechip.errors import require

KINDS = ("embed", "attention", "mlp", "lm_head", "scalar")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of a model.

    axes: its letters in order; in a matrix, "->" separates the axes that a product sums over from those it makes.
    init(key, shape, fan_in) -> its first values, float32. kind: embed (a lookup, which costs no FLOPs), attention, mlp,
    lm_head, or scalar (never decayed, never cast). group: what it is to an optimizer with several learning rates; its
    kind if empty. dtype: how it is stored, and its moments with it: "float32" or "bfloat16".
    """

    axes: str
    init: Callable
    kind: str
    group: str = ""
    dtype: str = "float32"

    def __post_init__(self):
        require(self.kind in KINDS, "kind", self.kind, f"use one of {', '.join(KINDS)}")
        object.__setattr__(self, "group", self.group or self.kind)

    @property
    def letters(self):
        """Its axes without the arrow: "DNH"."""
        return self.axes.replace("->", "")

    def shape(self, config):
        """Its shape, by the Config's sizes."""
        return tuple(config.sizes[letter] for letter in self.letters)

    @property
    def is_matrix(self):
        """Whether a product sums over some of its axes and makes the others."""
        return "->" in self.axes

    def fan_in(self, config):
        """Inputs of each output: the product of the axes before the arrow."""
        return math.prod(config.sizes[letter] for letter in self.axes.partition("->")[0])


def normal(deviation):
    """init: N(0, deviation)."""
    return lambda key, shape, fan_in: deviation * jax.random.normal(key, shape)


def uniform(key, shape, fan_in):
    """init: uniform with variance 1 / fan_in, so that a product keeps the size of its input."""
    bound = math.sqrt(3 / fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def constant(value):
    """init: every entry at this value."""
    return lambda key, shape, fan_in: jnp.full(shape, value, jnp.float32)


def draw_weights(config, table, key):
    """A table's arrays, as they are stored. Every entry, and every layer, has a key of its own, in the table's order.

    JAX's keys do not depend on how many are split off: a weight added at the end changes no other's first values.
    """
    if isinstance(table, Weight):
        return table.init(key, table.shape(config), table.fan_in(config)).astype(table.dtype)
    entries = itertools.chain.from_iterable(e if isinstance(e, list) else [e] for e in table.values())
    keys = iter(jax.random.split(key, len(list(entries))))

    def arrays(entry):
        if isinstance(entry, list):
            return [draw_weights(config, item, next(keys)) for item in entry]
        return draw_weights(config, entry, next(keys))

    return {name: arrays(entry) for name, entry in table.items()}


def weight_shapes(config, table):
    """A table's arrays as jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape(config), weight.dtype), table)


def cast_weights(table, params, dtype):
    """The parameters with their matrices in `dtype`; scalars stay as they are."""
    return jax.tree.map(lambda w, p: p if w.kind == "scalar" else p.astype(dtype), table, params)


def widened(tree):
    """A pytree with its bfloat16 arrays in float32: what an optimizer computes with, however they are stored."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)


def stored_like(tree, before):
    """A pytree with each array in the dtype of the one in `before`, rounded to nearest."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, before)


@jax.jit
def all_finite(tree):
    """Whether every number in a pytree is finite: bool scalar."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def bytes_of(tree):
    """Bytes of all arrays, or jax.ShapeDtypeStructs, of a pytree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_by_kind(config, table):
    """Parameters by kind: {kind: int, ..., "total": int}."""
    counts = dict.fromkeys(KINDS, 0)
    for weight in jax.tree.leaves(table):
        counts[weight.kind] += math.prod(weight.shape(config))
    return {**counts, "total": sum(counts.values())}


def place_like(shapes, params, places, whole):
    """A pytree of jax.ShapeDtypeStruct with shardings: what has the structure and a shape of `params` lies like that.

    shapes: say {"params": params, "opt": {"mu": ..., "count": ...}}; places: a sharding for each of params; whole: the
    sharding of everything else.
    """
    structure = jax.tree.structure(places)
    alike = lambda tree: jax.tree.structure(tree) == structure
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    put_like = lambda leaf, param, place: put(leaf, place if leaf.shape == param.shape else whole)
    part = lambda tree: jax.tree.map(put_like, tree, params, places) if alike(tree) else put(tree, whole)
    return jax.tree.map(part, shapes, is_leaf=alike)
