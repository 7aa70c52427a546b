"""A run that begins with a trained model: its weights and, from a checkpoint, the optimizer's moments."""

import jax
import jax.numpy as jnp

from onechip.checkpoints import unpack_state
from onechip.errors import require
from onechip.files import read_json
from onechip.parts import load_onto
from onechip.runfolder import STATE


def has_moments(files, optimizer):
    """Whether a trained model's ModelFiles are a checkpoint with the state of this Optimizer."""
    return (files.weights.parent / STATE).exists() and files.about.get("optimizer") == optimizer.name


def count_steps_before(files, optimizer):
    """How many steps the moments that a run begins with have seen; 0 where there are none."""
    if not has_moments(files, optimizer):
        return 0
    step = read_json(files.weights.parent / STATE).get("step")
    require(isinstance(step, int), "checkpoint", str(files.weights.parent), "does not say its step: get it again")
    return step + files.about.get("config", {}).get("steps_before", 0)


def load_start(files, config, model, optimizer, shapes, moments=True):
    """The state of step 0 of a run that begins with ModelFiles.

    shapes: the state as jax.ShapeDtypeStructs with shardings. UserError names an array that does not fit. Without
    moments, those of an export say, or where they are not wanted, the optimizer begins with its own.
    """
    step = jax.device_put(jnp.zeros((), jnp.int32), shapes["step"].sharding)
    if moments and has_moments(files, optimizer):
        state, _, _ = unpack_state(files.weights.parent, shapes, load_onto)
        return state | {"step": step}
    place = lambda array, like: jax.device_put(array.astype(like.dtype), like.sharding)
    params = jax.tree.map(place, files.load_params(config, model), shapes["params"])
    init = lambda params: optimizer.init(config, model.weights(config), params)
    opt = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes["opt"]))(params)
    return {"params": params, "opt": opt, "step": step}
