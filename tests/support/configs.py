"""Tiny models whose every dimension differs, random values for them, and how their programs are compiled."""

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

train = importlib.import_module("02_train")

# B 5 | T 13 | D 84 | N 6 | K 2 | H 14 | F 336 | L 3 | V 31; context 18, so that an S layer sees 9 keys
TINY = train.Config(
    n_head=6, n_kv_head=2, head_dim=14, aspect_ratio=28, vocab_size=31, seq_len=18, window_pattern="SLS",
    softcap=7.0, rope_base=50.0, attn_impl="einsum", dtype="float32", device_batch_size=5, total_batch_size=5,
    num_iterations=40, learning_rate=3e-3, eps=1e-3, loss_slice=13,
)  # fmt: skip
B, T = 5, 13


def replace(**fields):
    """TINY with other fields."""
    return dataclasses.replace(TINY, **fields)


def draw_params(config, table, scales, seed=0):
    """Float32 NumPy parameters of a table of weights, normal with the deviation that `scales` has for each name."""
    rng = np.random.default_rng(seed)
    draw = lambda path, weight: np.float32(scales[path[-1].key] * rng.normal(size=weight.shape(config)))
    return jax.tree_util.tree_map_with_path(draw, table)


@functools.cache
def random_params(config, seed=0):
    """GPT's, with nothing at its initial value; every residual branch adds about as much as the stream has."""
    D = config.n_embd
    scales = {
        "wte": 1.0, "lm_head": 0.5, "c_q": D**-0.5, "c_k": D**-0.5, "c_v": 1.5 * D**-0.5, "c_proj": 1.2 * D**-0.5,
        "c_fc": D**-0.5, "mlp_proj": 0.5 * D**-0.5, "resid_lambdas": 0.2, "x0_lambdas": 0.6,
    }  # fmt: skip
    params = draw_params(config, train.gpt_weights(config), scales, seed)
    return {**params, "resid_lambdas": 1 + params["resid_lambdas"]}


def random_tokens(config, rows, length, seed=1):
    """Token ids (rows, length) int32."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length), dtype=np.int32)


def random_batch(config, seed=2, rows=None, length=None):
    """{"x", "y"}: (total_batch_size, seq_len) each, or of the given size."""
    tokens = random_tokens(config, rows or config.total_batch_size, (length or config.seq_len) + 1, seed)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Compiles with little optimization, which takes programs this small half the time. For files that import it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compiler(quick_compiler):
    """Compiles as usual: for programs whose text is looked at, or that are held to a bound."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
