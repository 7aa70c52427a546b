"""A mesh of devices with two axes: over `data` a batch is split, over `fsdp` a batch and the weights.

A weight that is split over fsdp, with its gradient and its moments, lies on no device as a whole (ZeRO, Rajbhandari et
al., 2020; FSDP, Zhao et al., 2023). Before a layer needs it, its shares are gathered, in the compute type; its gradient
leaves as a sum of which each device keeps its share. Both are jax's own collectives, under shard_map.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from onechip.errors import require

AXES = ("data", "fsdp")


def mesh_sizes(text, devices):
    """(data, fsdp) of a mesh in words, "data=2,fsdp=4", on that many devices; an axis that is not named has size 1.

    "": all of them are data. UserError for other words, and for a mesh that is not of just these devices.
    """
    if not text:
        return devices, 1
    form = 'must name data or fsdp or both, with their sizes: "data=8", "data=2,fsdp=4"'
    parts = [re.fullmatch(r"\s*(data|fsdp)=([1-9][0-9]{0,5})\s*", part) for part in text.split(",")]
    require(all(parts) and len({part[1] for part in parts}) == len(parts), "mesh", text, form)
    sizes = {"data": 1, "fsdp": 1} | {part[1]: int(part[2]) for part in parts}
    require(math.prod(sizes.values()) == devices, "mesh", text, f"must be a mesh of the {devices} devices here")
    return sizes["data"], sizes["fsdp"]


def build_mesh(devices, text=""):
    """The jax.sharding.Mesh of AXES over these devices, in the order in which neighbours on a TPU are linked."""
    devices = list(devices)
    kinds = (AxisType.Auto, AxisType.Auto)  # named, as jax changed its mind about the default in 0.9
    sizes = mesh_sizes(text, len(devices))
    if devices[0].platform == "tpu":
        return jax.make_mesh(sizes, AXES, kinds, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=kinds)


# What the TPU's compiler has to be asked for: gather in pieces, between those of the products that run meanwhile.
OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def compiler_options(mesh):
    """The options of jax.jit for a program on the devices of a mesh."""
    return OVERLAP if mesh.size > 1 and mesh.devices.flat[0].platform == "tpu" else {}


def describe_mesh(mesh):
    """A mesh in words, as --mesh takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "data=1"


def meshes_of(devices, width):
    """Meshes in words on that many devices, the least split first: their fsdp divides `width`, which it splits."""
    sizes = [f for f in range(1, devices + 1) if devices % f == 0 and width % f == 0]
    return [f"data={devices // f},fsdp={f}" for f in sizes]


# ----------------------------------------------------------------------------------------------------------------------
# Weights in shares: what a program under shard_map has of them


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axis"])
@dataclasses.dataclass
class Share:
    """A device's share of an array, which is split along `axis` over fsdp."""

    array: jax.Array
    axis: int

    def astype(self, dtype):
        return Share(self.array.astype(dtype), self.axis)


def split_axis(spec):
    """The axis that a PartitionSpec splits over fsdp; None if there is none."""
    return next((i for i, name in enumerate(spec) if name == "fsdp"), None)


def as_shares(specs, params):
    """The parameters, as a program under shard_map has them, with a Share in the place of each that is split."""
    mark = lambda spec, a: a if split_axis(spec) is None else Share(a, split_axis(spec))
    return jax.tree.map(mark, specs, params, is_leaf=lambda spec: isinstance(spec, PartitionSpec))


def is_share(leaf):
    """Whether something is a Share, for jax.tree.map."""
    return isinstance(leaf, Share)


def has_shares(tree):
    """Whether something in a pytree is split."""
    return any(map(is_share, jax.tree.leaves(tree, is_leaf=is_share)))


def gather(tree):
    """A pytree with all shares gathered; the gradient of that is a sum of which each device has its share."""

    whole = lambda leaf: gather_share(leaf.axis, leaf.array) if is_share(leaf) else leaf
    return jax.tree.map(whole, tree, is_leaf=is_share)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather_share(axis, array):
    """An array from the shares of all devices along fsdp."""
    return jax.lax.all_gather(array, "fsdp", axis=axis, tiled=True)


def gather_share_backward(axis, _, grad):
    share = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
    # Else XLA takes the sum out of the loop over microbatches, for which each device would keep whole gradients.
    return (jax.lax.optimization_barrier(share),)


# The primitive itself, which keep_no_gathered can see.
gather_share.defvjp(lambda axis, a: (jax.lax.all_gather(a, "fsdp", axis=axis, tiled=True), None), gather_share_backward)


def gather_all_but(params, *names):
    """Parameters with what is not under these names gathered."""
    return {name: part if name in names else gather(part) for name, part in params.items()}


def keep_no_gathered(primitive, *_, **__):
    """A policy for jax.checkpoint: all that a gradient needs is kept, but gathered weights are gathered once more."""
    return primitive.name != "all_gather"


def mean_over_devices(specs, grads):
    """The mean over all devices of gradients by each, in shares where their weight is: sums of a Share are there."""

    def mean(spec, grad):
        axis = split_axis(spec)
        if is_share(grad):
            return jax.lax.pmean(grad.array, "data") / jax.lax.psum(1, "fsdp")
        if axis is None:
            return jax.lax.pmean(grad, AXES)
        share = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.pmean(share, "data") / jax.lax.psum(1, "fsdp")

    return jax.tree.map(mean, specs, grads, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


# ----------------------------------------------------------------------------------------------------------------------
# Whole matrices on one device each


@dataclasses.dataclass(frozen=True)
class Spread:
    """Work on stacks of equal matrices, shared out over a mesh: each device does whole matrices, with no collective.

    spec_of(weight) -> the PartitionSpec of a Weight. Without a mesh, and on a mesh of one device, all is done here.
    """

    mesh: Mesh | None = None
    spec_of: Callable | None = None

    def axis_of(self, weight):
        """Which axis of a Weight as a matrix (in, out) is split over fsdp: 0, 1, or None."""
        axis = None if self.mesh is None else split_axis(self.spec_of(weight))
        return None if axis is None else int(axis >= len(weight.axes.partition("->")[0]))

    def __call__(self, f, axis, stack, rest):
        """f(stack, rest) -> two arrays (S, ...): stack (S, in, out), split along the matrices' `axis`; rest (S, ...),
        whole. The first array comes back split like the stack, the second whole. S is filled up with zeros."""
        if self.mesh is None or self.mesh.size == 1:
            return f(stack, rest)
        count = len(stack)
        fill = lambda a: jnp.pad(a, [(0, -count % self.mesh.size)] + [(0, 0)] * (a.ndim - 1))
        split = PartitionSpec(*("fsdp" if i - 1 == axis else None for i in range(stack.ndim)))
        specs, whole = (split, PartitionSpec()), PartitionSpec()
        run = functools.partial(run_own, f, dict(self.mesh.shape), axis)
        share_out = jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=(split, whole), check_vma=False)
        return tuple(a[:count] for a in share_out(fill(stack), fill(rest)))


def run_own(f, sizes, axis, stack, rest):
    """Spread's program on one device: one exchange, f of its own matrices, one exchange back."""

    def part_of(array, names):
        """This device's part of the rows, over these axes of the mesh."""
        rows = len(array) // math.prod(sizes[name] for name in names)
        return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(names) * rows, rows)

    names = AXES if axis is None else ("data",)
    own = part_of(stack, names)
    if axis is not None:
        own = jax.lax.all_to_all(own, "fsdp", split_axis=0, concat_axis=axis + 1, tiled=True)
    own, rest = f(own, part_of(rest, AXES))
    if axis is not None:
        own = jax.lax.all_to_all(own, "fsdp", split_axis=axis + 1, concat_axis=0, tiled=True)
    if math.prod(sizes[name] for name in names) > 1:
        own = jax.lax.all_gather(own, names, axis=0, tiled=True)
    return own, jax.lax.all_gather(rest, AXES, axis=0, tiled=True)


UNSHARED = Spread()


def bytes_on_device(tree):
    """Bytes that one device has of a pytree of jax.ShapeDtypeStructs, or arrays, with shardings."""
    share = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(share, jax.tree.leaves(tree)))
