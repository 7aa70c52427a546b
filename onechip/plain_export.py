"""A trained model for JAX alone: a StableHLO program, and weights in 8 bits."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save_file

from onechip.checkpoints import flatten, unflatten
from onechip.errors import UserError
from onechip.files import atomic_write, write_json
from onechip.quantize import is_quantized, quantize_weights

PLATFORMS = ("cpu", "cuda")  # on a TPU the model asks for a layout, which JAX does not promise to keep readable


def write_stablehlo(opened, folder, forward):
    """Writes params.safetensors and logits.stablehlo, a program of (weights by their names, tokens (b, seq_len) int32).

    It returns logits (b, seq_len, V) float32; b may be any number. forward(config, params, tokens, model): the model.
    Pad a shorter text on the right: no token sees a later one. JAX keeps programs by the package flatbuffers, and reads
    them by it; UserError where it is missing.
    """
    if not importlib.util.find_spec("flatbuffers"):
        raise UserError("export stablehlo: needs the package flatbuffers: uv run --with flatbuffers NN_name.py ...")
    config = dataclasses.replace(opened.config, attn_impl="einsum", remat="none")
    flat = {name: np.asarray(array, np.float32) for name, array in flatten(opened.params).items()}

    def logits(arrays, tokens):
        return forward(config, unflatten(opened.params, arrays), tokens, opened.model)

    (b,) = export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat.items()}
    tokens = jax.ShapeDtypeStruct((b, config.seq_len), jnp.int32)
    program = export.export(jax.jit(logits), platforms=PLATFORMS)(shapes, tokens)
    with atomic_write(folder / "logits.stablehlo") as part:
        part.write_bytes(program.serialize())
    with atomic_write(folder / "params.safetensors") as part:
        save_file(flat, part)
    about = {"jax": jax.__version__, "calling_convention": program.calling_convention_version}
    about |= {"platforms": PLATFORMS, "seq_len": config.seq_len, "vocab_size": config.vocab_size}
    write_json(folder / "program.json", about)


def write_int8(opened, folder):
    """Writes int8.safetensors: each matrix NAME as NAME.int8 and NAME.scale, whose product it is; all else as it is."""
    quantized = quantize_weights(opened.model.weights(opened.config), opened.params, "float32")
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(quantized, is_leaf=is_quantized):
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
        if is_quantized(leaf):
            arrays |= {f"{name}.int8": np.asarray(leaf.values), f"{name}.scale": np.asarray(leaf.scale)}
        else:
            arrays[name] = np.asarray(leaf)
    with atomic_write(folder / "int8.safetensors") as part:
        save_file(arrays, part)
    write_json(folder / "config.json", {"model": opened.model.name, "config": dataclasses.asdict(opened.config)})
