"""Weights in 8 bits: what is rounded and by how much, that the engine reads them, and that a step reads them narrow."""

import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import full_compiler, quick_compiler, random_params  # noqa: F401  (fixtures)
from writers import GPT, ask, make_engine, params_of, random_prompt, written

from onechip.engine import Engine
from onechip.quantize import Quantized, is_quantized, quantize_weights, widen_weights
from onechip.weights import bytes_of

train = importlib.import_module("02_train")


def widened_gpt(params):
    """GPT's parameters, rounded to 8 bits and widened again."""
    small = quantize_weights(train.gpt_weights(GPT), params, "float32")
    return jax.device_get(widen_weights(small, "float32", jnp.zeros(1)))


def test_each_output_channel_has_a_scale_of_its_own():
    """An error of half a 127th of the channel's largest weight at most, and of no more than that: channels differ."""
    params = random_params(GPT)
    wide = widened_gpt(params)
    for layer, rounded in zip(params["layers"], wide["layers"], strict=True):
        for name, inputs in {"c_q": 1, "c_k": 1, "c_v": 1, "c_fc": 1, "mlp_proj": 1, "c_proj": 2}.items():
            axes = tuple(range(inputs))
            largest, error = np.abs(layer[name]).max(axis=axes), np.abs(layer[name] - rounded[name]).max(axis=axes)
            assert (error <= largest / 254 * 1.001).all() and (error > 0).mean() > 0.9, name
            assert largest.max() > 1.05 * largest.min()
    for name in ("wte", "resid_lambdas", "x0_lambdas"):
        np.testing.assert_array_equal(wide[name], params[name])


def test_a_channel_of_zeros_stays_zero():
    """Every projection out of a block starts so."""
    table = {"w": train.gpt_weights(GPT)["lm_head"]}
    wide = widen_weights(quantize_weights(table, {"w": jnp.zeros((4, 3))}, "float32"), "float32", jnp.zeros(1))
    np.testing.assert_array_equal(wide["w"], np.zeros((4, 3)))


def test_matrices_take_half_of_what_they_take_in_bfloat16():
    """Of the default model: all but embeddings and scalars, with 1 % for the scales."""
    table = train.gpt_weights(train.Config())
    shapes = jax.eval_shape(lambda key: train.init_params(train.Config(), key), jax.random.key(0))
    small = jax.eval_shape(lambda params: quantize_weights(table, params, "bfloat16"), shapes)
    bytes_small = sum(
        map(bytes_of, [leaf for leaf in jax.tree.leaves(small, is_leaf=is_quantized) if is_quantized(leaf)])
    )
    counts = train.count_params(train.Config())
    assert bytes_small < 1.01 * (counts["attention"] + counts["mlp"] + counts["lm_head"])
    assert isinstance(small["lm_head"], Quantized) and not isinstance(small["wte"], Quantized)


@pytest.mark.slow
def test_what_is_no_matrix_is_in_the_compute_type():
    """As without 8 bits; scalars stay. An embedding in float32 made a float32 stream, which no bfloat16 cache took."""
    table = train.gpt_weights(GPT)
    small = quantize_weights(table, random_params(GPT), "bfloat16")
    assert small["wte"].dtype == jnp.bfloat16 and small["resid_lambdas"].dtype == jnp.float32
    config = dataclasses.replace(GPT, dtype="bfloat16")
    for int8 in (False, True):
        engine = Engine(config, random_params(GPT), train.GPT, train.attention_parts(config), rows=1, int8=int8)
        (answer,) = engine.generate_all([ask(random_prompt(GPT, 7), 5)])
        assert len(answer.tokens) == 5


@pytest.mark.slow
def test_an_engine_of_8_bits_writes_what_the_rounded_model_writes():
    """Token for token with 02's generate on the rounded weights, by the programs of any other engine."""
    prompt, wide = random_prompt(GPT, 7), widened_gpt(params_of("gpt"))
    engine = make_engine(rows=2, at_once=5, int8=True)
    (answer,) = engine.generate_all([ask(prompt, 30)])
    assert answer.tokens == written("gpt", prompt, 30, wide)
    assert answer.tokens != written("gpt", prompt, 30)


def test_a_loop_reads_the_narrow_weights(full_compiler):  # noqa: F811
    """Widened ahead of a loop, the wide weights would be what each step reads: the loop's state has none of them."""
    weight = quantize_weights({"w": train.gpt_weights(GPT)["lm_head"]}, {"w": jnp.ones((384, 640))}, "float32")

    def loop(weight, x):
        step = lambda i, x: x @ widen_weights(weight, "float32", x)["w"] @ jnp.ones((640, 384))
        return jax.lax.fori_loop(0, 50, step, x)

    text = jax.jit(loop).lower(weight, jnp.ones((1, 384))).compile().as_text()
    state = re.findall(r"\((?:[^()]|\([^()]*\))*\) while\(", text)
    assert len(state) == 1 and "s8[384,640]" in state[0] and "f32[384,640]" not in state[0]
