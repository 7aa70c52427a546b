"""The model part of 02_train.py against float64 NumPy: attention, transformer, optimizer, step, sampling, v6e programs.

Sizes differ in every dimension, so that a swapped axis cannot pass. The references below are written from the
definitions, with loops, and share no code with what they check.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

train = importlib.import_module("02_train")

ROOT = Path(__file__).resolve().parent.parent
EPS32 = 2.0**-23  # torch's F.rms_norm and the model add float32's epsilon to the mean square

# B 5 | T 13 | D 84 | N 6 | K 2 | H 14 | F 336 | L 3 | V 31; context 18, so that an S layer sees 9 keys
TINY = train.Config(
    n_head=6, n_kv_head=2, head_dim=14, aspect_ratio=28, vocab_size=31, seq_len=18, window_pattern="SLS",
    softcap=7.0, rope_base=50.0, attn_impl="einsum", dtype="float32", device_batch_size=5, total_batch_size=5,
    num_iterations=40, learning_rate=3e-3, eps=1e-3, loss_slice=13,
)  # fmt: skip
B, T = 5, 13


# ---------------------------------------------------------------------------------------------------------------
# References


def visible(t, s, window):
    return 0 <= t - s < window


def attention_reference(q, k, v, window, g=None):
    """Attention in float64, head by head; with an output gradient g also the gradients: out, (dq, dk, dv)."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, heads, channels = q.shape
    group = heads // k.shape[2]
    mask = np.array([[visible(t, s, window) for s in range(length)] for t in range(length)])
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        for n in range(heads):
            keys, values = k[b, :, n // group], v[b, :, n // group]
            scores = np.where(mask, q[b, :, n] @ keys.T / math.sqrt(channels), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, n] = weights @ values
            if g is not None:
                dweights = g[b, :, n] @ values.T
                dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) / math.sqrt(channels)
                dq[b, :, n] = dscores @ keys
                dk[b, :, n // group] += dscores.T @ q[b, :, n]
                dv[b, :, n // group] += weights.T @ g[b, :, n]
    return out, (dq, dk, dv)


def norm_reference(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS32)


def norm_gradient_reference(x, g):
    """The gradient for x from that for norm_reference(x)."""
    y, r = norm_reference(x), 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS32)
    return r * (g - y * (g * y).mean(-1, keepdims=True))


def raw_attention_reference(q, k, v, window, base, g=None):
    """attention_reference of rotated and normed q and k, and its gradients for q and k as they were before that."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    turned = [rope_reference(a, base) for a in (q, k)]
    out, (dq, dk, dv) = attention_reference(*map(norm_reference, turned), v, window, g)
    if g is not None:  # a rotation's gradient is the rotation back
        dq, dk = (rope_reference(norm_gradient_reference(*a), base, -1) for a in zip(turned, (dq, dk), strict=True))
    return out, (dq, dk, dv)


def rope_reference(x, base, direction=1):
    """Channel i of x (B, T, heads, H) and channel i + H / 2 are turned by t * base ** (-2 i / H)."""
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        for i in range(half):
            angle = direction * t * base ** (-2 * i / x.shape[-1])
            a, b = x[:, t, :, i], x[:, t, :, i + half]
            y[:, t, :, i] = a * math.cos(angle) + b * math.sin(angle)
            y[:, t, :, i + half] = -a * math.sin(angle) + b * math.cos(angle)
    return y


def windows_reference(config):
    """Every layer's window, from the words of the design: tiled, S half the context, the last layer all of it."""
    layers = config.n_head * config.head_dim // config.aspect_ratio
    letters = [config.window_pattern[i % len(config.window_pattern)] for i in range(layers)]
    letters[-1] = "L"
    return [config.seq_len if letter == "L" else config.seq_len // 2 for letter in letters]


def logits_reference(config, params, tokens):
    """The whole transformer in float64, written anew: logits (B, T, V)."""
    x = x0 = norm_reference(params["wte"][tokens])
    for i, (layer, window) in enumerate(zip(params["layers"], windows_reference(config), strict=True)):
        x = params["resid_lambdas"][i] * x + params["x0_lambdas"][i] * x0
        h = norm_reference(x)
        q, k, v = (np.tensordot(h, layer[name], 1) for name in ("c_q", "c_k", "c_v"))
        q, k = (norm_reference(rope_reference(a, config.rope_base)) for a in (q, k))
        x = x + np.tensordot(attention_reference(q, k, v, window)[0], layer["c_proj"], 2)
        x = x + np.maximum(norm_reference(x) @ layer["c_fc"], 0) ** 2 @ layer["mlp_proj"]
    return config.softcap * np.tanh(norm_reference(x) @ params["lm_head"] / config.softcap)


def token_losses_reference(config, params, x, y):
    logits = logits_reference(config, params, x)
    loss = np.empty(y.shape)
    for b, t in np.ndindex(*y.shape):
        row = logits[b, t]
        loss[b, t] = row.max() + math.log(np.exp(row - row.max()).sum()) - row[y[b, t]]
    return loss


# ---------------------------------------------------------------------------------------------------------------
# Values: every parameter random and of a size that matters, those that start at zero or one too


@functools.cache
def random_params(config, seed=0):
    """Parameters with nothing at its initial value; every residual branch adds about as much as the stream has."""
    rng = np.random.default_rng(seed)
    init = lambda key: train.split_trainable(train.init_params(config, key))
    constants = jax.jit(lambda key: init(key)[1])(jax.random.key(0))  # alone: no weight is drawn to be thrown away
    trainable = jax.eval_shape(init, jax.random.key(0))[0]
    D = config.n_embd
    scales = {
        "wte": 1.0, "lm_head": 0.5, "c_q": D**-0.5, "c_k": D**-0.5, "c_v": 1.5 * D**-0.5, "c_proj": 1.2 * D**-0.5,
        "c_fc": D**-0.5, "mlp_proj": 0.5 * D**-0.5, "resid_lambdas": 0.2, "x0_lambdas": 0.6,
    }  # fmt: skip

    def draw(path, leaf):
        name = path[-1].key
        return np.float32((name == "resid_lambdas") + scales[name] * rng.normal(size=leaf.shape))

    return train.merge_params(jax.tree_util.tree_map_with_path(draw, trainable), constants)


def widen(params):
    """The trained parameters in float64."""
    return jax.tree.map(lambda p: np.asarray(p, np.float64), train.split_trainable(params)[0])


def random_tokens(config, rows, length, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length), dtype=np.int32)


def random_batch(config, seed=2):
    """x, y: (total_batch_size, seq_len)."""
    tokens = random_tokens(config, config.total_batch_size, config.seq_len + 1, seed)
    return tokens[:, :-1], tokens[:, 1:]


def replace(**fields):
    return dataclasses.replace(TINY, **fields)


def distance(tree, reference):
    """Largest difference over all leaves, as a share of the reference leaf's largest magnitude."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(float(np.abs(np.float64(a) - b).max() / (np.abs(np.float64(b)).max() or 1.0)) for a, b in pairs)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Programs this small compile twice as fast with little optimization."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compiler(quick_compiler):
    """The compiler as it is, for programs that are looked at, or held to a bound."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# ---------------------------------------------------------------------------------------------------------------
# Attention

# (T, N, K, H): grouped, one head each, one for all; kernels work on blocks of 128 tokens, ours on 128 channels too.
# einsum takes 256 queries at a time, so one of its cases is longer than two blocks.
SMALL = {"GQA": (13, 6, 3, 10), "MHA": (11, 5, 5, 6), "MQA": (17, 7, 1, 4), "long": (521, 4, 2, 8)}
BLOCKS = {"GQA": (256, 6, 3, 10), "MHA": (384, 2, 2, 6), "MQA": (128, 5, 1, 14)}
LANES = {"GQA": (384, 6, 3, 128), "MHA": (512, 2, 2, 256), "MQA": (768, 3, 1, 128)}
WINDOWS = (1, 5, "half", "all")
BASE = 50.0
ATTENTION_CASES = [
    *itertools.product(("einsum", "jax"), SMALL, WINDOWS),
    *(("splash", "GQA", window) for window in (1, 77, "half", "all")),
    *(("splash", *case) for case in (("MHA", 77), ("MHA", "all"), ("MQA", 1), ("MQA", "half"))),
    *(("pallas", "GQA", window) for window in (1, 77, 128, 129, "half", "all")),
    *(("pallas", *case) for case in (("MHA", "half"), ("MHA", "all"), ("MQA", 300), ("MQA", "all"))),
]


def attention_case(impl, heads, window):
    """(q, k, v, an output gradient), window in keys; a batch of 2, or 3 where a head is small."""
    length, N, K, H = {"splash": BLOCKS, "pallas": LANES}.get(impl, SMALL)[heads]
    batch = 2 if N != 2 else 3
    rng = np.random.default_rng(3)
    q, k, v, g = (rng.normal(size=(batch, length, n, H)).astype(np.float32) for n in (N, K, K, N))
    return (1.5 * q, k, v, g), {"half": length // 2, "all": length}.get(window, window)


def attend_by(impl, length, channels, window):
    """The attention `impl` as the model calls it: a function of q, k and v as they leave their products."""
    shape = train.Config(
        n_head=2, head_dim=channels, aspect_ratio=channels, seq_len=length, attn_impl="einsum", rope_base=BASE
    )
    return lambda q, k, v: train.ATTENTIONS[impl](q, k, v, train.rope_tables(shape), window)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rotate", ["rotate_halves", "rotate_by_product"])
def test_both_rotations_are_the_reference(rotate, dtype):
    """The same angles, and the sum is in float32."""
    shape = train.Config(n_head=2, head_dim=10, aspect_ratio=20, seq_len=7, attn_impl="einsum", rope_base=BASE)
    x = jnp.asarray(np.random.default_rng(8).normal(size=(2, 7, 3, 10)), dtype)
    out = getattr(train, rotate)(x, *train.rope_tables(shape))
    assert out.dtype == jnp.float32
    assert distance(out, rope_reference(np.float64(x), BASE)) < 3e-7


def test_a_tpu_rotates_by_a_product_and_no_other_device():
    """By the programs that are lowered for each, which needs neither."""
    shape = train.Config(n_head=2, head_dim=10, aspect_ratio=20, seq_len=7, attn_impl="einsum")
    traced = jax.jit(train.apply_rope).trace(jnp.ones((2, 7, 3, 10)), *train.rope_tables(shape))
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu", "cuda")}
    assert ["dot_general" in text[platform] for platform in ("tpu", "cpu", "cuda")] == [True, False, False]


def test_attention_reference_gradients_match_finite_differences():
    """The float64 reference's own gradients are right, so that what is compared with them is."""
    (q, k, v, g), window = attention_case("einsum", "GQA", 5)
    _, grads = raw_attention_reference(q, k, v, window, BASE, g)
    rng, step = np.random.default_rng(4), 1e-6
    for i, grad in enumerate(grads):
        change = rng.normal(size=grad.shape)
        args = [np.float64(a) for a in (q, k, v)]
        ends = [[a + s * step * change if i == j else a for j, a in enumerate(args)] for s in (1, -1)]
        high, low = ((raw_attention_reference(*end, window, BASE)[0] * g).sum() for end in ends)
        assert (high - low) / (2 * step) == pytest.approx((grad * change).sum(), rel=1e-6)


def test_every_attention_has_its_cases_and_its_word_in_the_help():
    """One that is added to the table is held to the reference, and --help knows it."""
    assert {impl for impl, *_ in ATTENTION_CASES} == set(train.ATTENTIONS)
    [field] = [field for field in dataclasses.fields(train.Config) if field.name == "attn_impl"]
    assert all(name in field.metadata["help"] for name in train.ATTENTIONS)


@pytest.mark.parametrize("impl, heads, window", ATTENTION_CASES)
def test_attention_equals_the_reference_in_value_and_gradient(impl, heads, window):
    """Four attentions are one function, to 2e-6 in value and 5e-6 in gradients, relative to each array's largest."""
    (q, k, v, g), window = attention_case(impl, heads, window)
    want, want_grads = raw_attention_reference(q, k, v, window, BASE, g)
    attend = attend_by(impl, q.shape[1], q.shape[3], window)

    def weighted(q, k, v):
        out = attend(q, k, v)
        return (out * g).sum(), out

    grads, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    assert out.shape == q.shape and out.dtype == jnp.float32
    assert distance(out, want) < 2e-6
    for grad, want_grad in zip(grads, want_grads, strict=True):
        scale = np.abs(want_grad).max()  # zero for q and k at window 1, where the one weight is 1
        np.testing.assert_allclose(grad, want_grad, rtol=0, atol=5e-6 * max(scale, 1.0))


@pytest.mark.parametrize("window, share", [(2048, 36 / 64), (1024, 0.4685), (100, 0.1673)])
def test_einsum_attention_computes_only_keys_that_a_block_of_queries_sees(window, share):
    """Of 2,048 keys for each of 2,048 queries, by XLA's count of FLOPs: 36 of 64 squares of 256 in a causal layer."""
    arrays = [jax.ShapeDtypeStruct((1, 2048, heads, 16), jnp.float32) for heads in (4, 2, 2)]

    def flops(attend, **how):
        return jax.jit(functools.partial(attend, **how)).lower(*arrays).cost_analysis()["flops"]

    everything = flops(train.masked_attention, mask=np.ones((2048, 2048), bool))
    assert flops(train.attention_einsum, window=window) / everything == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("impl, window", [("einsum", 5), ("jax", 5), ("splash", 77), ("pallas", 200)])
def test_a_key_is_seen_from_its_own_position_for_window_queries_and_by_no_other(impl, window):
    """A mask off by one: key and value t change outputs t to t + window - 1, and no other, to the last bit."""
    (q, k, v, _), _ = attention_case(impl, "GQA", window)
    attend = jax.jit(attend_by(impl, q.shape[1], q.shape[3], window))
    before, length = np.asarray(attend(q, k, v)), q.shape[1]
    for t in (0, 3, length // 2, length - 1):
        k2, v2 = k.copy(), v.copy()
        k2[:, t] += 1.0
        v2[:, t] -= 2.0
        changed = (np.asarray(attend(q, k2, v2)) != before).any(axis=(0, 2, 3))
        assert np.flatnonzero(changed).tolist() == list(range(t, min(length, t + window)))


def relative_rms(a, reference):
    """Root mean square of the difference, as a share of the reference's."""
    return np.sqrt(np.mean((np.float64(a) - reference) ** 2) / np.mean(np.float64(reference) ** 2))


def test_attention_in_bfloat16_takes_its_softmax_in_float32():
    """Scores rounded to bfloat16 before the softmax lose 3 more bits: the error stays near that of the inputs' type."""
    (q, k, v, _), window = attention_case("einsum", "GQA", 5)
    q, k, v = (jnp.asarray(a * 2, jnp.bfloat16) for a in (q, k, v))
    want, _ = attention_reference(*(np.float64(a) for a in (q, k, v)), window)
    for impl in ("einsum", "jax"):
        out = getattr(train, f"attention_{impl}")(q, k, v, window)
        assert out.dtype == jnp.bfloat16
        assert relative_rms(out, want) < 2.5e-3, impl


@pytest.mark.parametrize("impl", ["einsum", "jax", "splash", "pallas"])
def test_attention_in_bfloat16_stays_near_its_inputs_precision(impl):
    """bfloat16 keeps 8 bits, 1.7e-3 rms: scores rounded before the softmax, or sums kept in it, would lose 3 more."""
    (q, k, v, g), window = attention_case("pallas", "GQA", 200)
    q, k, v, g = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v, g))
    want, want_grads = raw_attention_reference(*(np.float64(a) for a in (q, k, v)), window, BASE, np.float64(g))
    out, back = jax.vjp(attend_by(impl, q.shape[1], q.shape[3], window), q, k, v)
    assert out.dtype == jnp.bfloat16
    assert relative_rms(out, want) < 3.5e-3
    for grad, want_grad in zip(back(g), want_grads, strict=True):
        assert relative_rms(grad, want_grad) < 5e-3


# ---------------------------------------------------------------------------------------------------------------
# The whole model


@pytest.mark.parametrize("impl", ["einsum", "jax"])
@pytest.mark.parametrize("kv_heads, pattern", [(2, "SLS"), (0, "LS"), (1, "S")])
def test_forward_equals_a_float64_transformer(impl, kv_heads, pattern):
    """Logits equal the float64 transformer, every parameter away from its initial value, to 2e-5 of softcap 7."""
    config = replace(n_kv_head=kv_heads, window_pattern=pattern, attn_impl=impl)
    params, tokens = random_params(config), random_tokens(config, B, T)
    logits = jax.jit(functools.partial(train.forward, config))(params, tokens)
    want = logits_reference(config, widen(params), tokens)
    assert logits.shape == (B, T, config.vocab_size) and logits.dtype == jnp.float32
    assert np.abs(want).max() > 0.6 * config.softcap  # the cap bends what is compared
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("impl, channels", [("splash", 14), ("pallas", 128)])
def test_forward_with_a_kernel_equals_a_float64_transformer(impl, channels, full_compiler):
    """The kernels stand in the model where the readable attention stands, each layer with its own window."""
    shape = dict(n_head=2, n_kv_head=1, head_dim=channels, aspect_ratio=channels, seq_len=128)
    config = replace(attn_impl=impl, window_pattern="S", **shape)
    params, tokens = random_params(config), random_tokens(config, 3, 128)
    logits = jax.jit(functools.partial(train.forward, config))(params, tokens)
    np.testing.assert_allclose(logits, logits_reference(config, widen(params), tokens), rtol=0, atol=2e-5)


def loss_and_grads(config, params, x, y):
    """loss_fn and its gradients for what is trained."""
    trainable, constants = train.split_trainable(params)
    loss = lambda trainable: train.loss_fn(config, train.merge_params(trainable, constants), x, y)
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(trainable))


@pytest.fixture(scope="module")
def batch():
    """x, y: (B, T) each."""
    tokens = random_tokens(TINY, B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(scope="module")
def tiny_loss_and_grads(batch):
    return loss_and_grads(TINY, random_params(TINY), *batch)


def test_loss_equals_the_reference_token_by_token(batch, tiny_loss_and_grads):
    """Cross-entropy per token and its mean equal float64 to 2e-5: targets are picked from the right row and column."""
    params = random_params(TINY)
    want = token_losses_reference(TINY, widen(params), *batch)
    losses = jax.jit(lambda p: train.token_losses(TINY, train.cast_params(TINY, p), *batch))(params)
    assert losses.shape == (B, T) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, want, rtol=0, atol=2e-5)
    loss, _ = tiny_loss_and_grads
    assert loss.dtype == np.float32 and float(loss) == pytest.approx(want.mean(), abs=1e-5)


def test_gradients_equal_central_differences_of_the_float64_loss(batch, tiny_loss_and_grads):
    """Every parameter's gradient, at its largest and at random entries, is that of the float64 loss to 1e-4."""
    (_, grads), wide = tiny_loss_and_grads, widen(random_params(TINY))
    rng, step = np.random.default_rng(5), 1e-5
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wide), strict=True)
    for (path, grad), leaf in leaves:
        grad, flat = np.asarray(grad).ravel(), leaf.reshape(-1)  # a view: what is written to it is in `wide`
        for i in {int(np.abs(grad).argmax()), *rng.integers(0, flat.size, 2).tolist()}:
            ends = []
            for sign in (1, -1):
                flat[i] += sign * step
                ends.append(token_losses_reference(TINY, wide, *batch).mean())
                flat[i] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            assert grad[i] == pytest.approx(slope, rel=1e-4, abs=1e-4 * float(np.abs(grad).max())), path


def test_bfloat16_stays_near_float32_in_loss_and_gradient(batch, tiny_loss_and_grads):
    """bfloat16 has 8 bits: its loss is within 1 % of float32's and every gradient, kept in float32, within 10 %."""
    loss, grads = tiny_loss_and_grads
    half_loss, half_grads = loss_and_grads(replace(dtype="bfloat16"), random_params(TINY), *batch)
    assert half_loss != loss  # it does compute in bfloat16
    assert half_loss == pytest.approx(float(loss), rel=0.01)
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(half_grads), strict=True)
    for (path, grad), half_grad in leaves:
        assert half_grad.dtype == np.float32
        assert np.linalg.norm(half_grad - grad) < 0.1 * np.linalg.norm(grad), path


@pytest.mark.parametrize("size", [5, 65])
def test_loss_slices_do_not_change_loss_or_gradient(size, batch, tiny_loss_and_grads):
    """The loss is made slice by slice to save memory: one slice of 65 tokens gives what 5 of 13 and 13 of 5 give."""
    loss, grads = tiny_loss_and_grads
    sliced_loss, sliced_grads = loss_and_grads(replace(loss_slice=size), random_params(TINY), *batch)
    assert sliced_loss == pytest.approx(float(loss), rel=1e-6)
    assert distance(sliced_grads, grads) < 1e-5


@pytest.mark.parametrize("name, old, new", [("resid_lambdas", 1.0, 1.001), ("x0_lambdas", 0.1, 0.1002)])
def test_bfloat16_does_not_round_the_lambdas(name, old, new):
    """Rounded to bfloat16, 1.001 is 1 and 0.1002 is 0.1: an optimizer's small steps would have no effect."""
    config = replace(dtype="bfloat16")
    params, tokens = random_params(config), random_tokens(config, B, T)
    forward = jax.jit(functools.partial(train.forward, config))
    values = (np.full(config.n_layer, value, np.float32) for value in (old, new))
    before, after = (np.asarray(forward({**params, name: value}, tokens)) for value in values)
    assert before.dtype == np.float32
    assert (before != after).any()


# ---------------------------------------------------------------------------------------------------------------
# Parameters


def test_initial_parameters_are_distributed_as_designed():
    """wte N(0, 1), lm_head N(0, 0.001), inputs uniform within sqrt(3 / n_embd), outputs 0, lambdas 1 and 0.1."""
    config = replace(vocab_size=997)
    params, _ = train.split_trainable(train.init_params(config, jax.random.key(7)))
    assert set(params) == {"wte", "lm_head", "resid_lambdas", "x0_lambdas", "layers"}
    D, N, K, H, F, L, V = 84, 6, 2, 14, 336, 3, 997
    assert params["wte"].shape == (V, D) and params["lm_head"].shape == (D, V)
    for name, scale in (("wte", 1.0), ("lm_head", 0.001)):
        values = np.asarray(params[name]) / scale
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
        assert 0.66 < (np.abs(values) < 1).mean() < 0.70  # of a normal distribution, 68.3 %
    assert params["resid_lambdas"].tolist() == [1.0] * L
    assert params["x0_lambdas"].tolist() == [np.float32(0.1)] * L
    assert len(params["layers"]) == L
    bound, seen = math.sqrt(3 / D), []
    shapes = {"c_q": (D, N, H), "c_k": (D, K, H), "c_v": (D, K, H), "c_fc": (D, F)}
    for layer in params["layers"]:
        assert set(layer) == {*shapes, "c_proj", "mlp_proj"}
        assert layer["c_proj"].shape == (N, H, D) and not layer["c_proj"].any()
        assert layer["mlp_proj"].shape == (F, D) and not layer["mlp_proj"].any()
        for name, shape in shapes.items():
            values = np.asarray(layer[name])
            assert values.shape == shape
            assert 0.99 * bound < values.max() <= bound and -bound <= values.min() < -0.99 * bound
            assert values.std() == pytest.approx(D**-0.5, rel=0.03)
            seen.append(values.ravel()[:3].tolist())
    assert len(set(map(tuple, seen))) == len(seen)  # no two of them drawn with the same key
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    other, _ = train.split_trainable(train.init_params(config, jax.random.key(8)))
    assert not np.array_equal(other["wte"], params["wte"])


def test_split_and_merge_are_inverse_and_part_what_is_not_trained():
    """RoPE tables in the optimizer would be decayed, counted and saved: they come apart, and together the same."""
    params = random_params(TINY)
    trainable, constants = train.split_trainable(params)
    assert not set(trainable) & set(constants) and jax.tree.leaves(constants)
    merged = train.merge_params(trainable, constants)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))


def test_count_params_counts_each_group_and_the_default_has_268_million():
    """The default is the 268.4M model of the design, by its own dimensions; each group holds what its name says."""
    V, D, L = 32768, 1024, 16
    want = {"embed": V * D, "attention": 4 * D * D * L, "mlp": 8 * D * D * L, "lm_head": D * V, "scalars": 2 * L}
    assert train.count_params(train.Config()) == {**want, "total": 268_435_488}
    D, N, K, H, F, L, V = 84, 6, 2, 14, 336, 3, 31
    want = {"embed": V * D, "attention": L * (2 * D * N * H + 2 * D * K * H), "mlp": L * 2 * D * F, "lm_head": D * V}
    want["scalars"] = 2 * L
    assert train.count_params(TINY) == {**want, "total": sum(want.values())}
    sizes = [leaf.size for leaf in jax.tree.leaves(train.split_trainable(random_params(TINY))[0])]
    assert train.count_params(TINY)["total"] == sum(sizes)


@pytest.mark.parametrize("length, window", [(13, 1), (13, 5), (13, 13), (18, 9), (1, 1)])
def test_mean_keys_is_what_counting_gives(length, window):
    """Keys seen on average under causality and a window, counted pair by pair."""
    pairs = sum(visible(t, s, window) for t in range(length) for s in range(length))
    assert train.mean_keys(length, window) == pytest.approx(pairs / length, rel=1e-12)


def test_flops_per_token_are_counted_multiplication_by_multiplication():
    """MFU rests on this: 2 FLOPs per multiply-add, three passes, and only the pairs that a query really sees."""
    D, N, K, H, F, V, length = 84, 6, 2, 14, 336, 31, 18
    macs = full = 0
    for window in windows_reference(TINY):
        per_token = D * N * H + 2 * D * K * H + N * H * D + 2 * D * F
        pairs = sum(visible(t, s, window) for t in range(length) for s in range(length))
        macs += length * per_token + pairs * N * 2 * H  # q k and weights v
        full += length * per_token + length * length * N * 2 * H
    head = length * D * V
    assert train.flops_per_token(TINY) == pytest.approx(3 * 2 * (macs + head) / length, rel=1e-12)
    assert train.flops_per_token(TINY, full_attention=True) == pytest.approx(3 * 2 * (full + head) / length, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------
# Config

REFUSED = [
    (dict(n_head=0), "n_head=0", "positive"),
    (dict(n_head=-2), "n_head=-2", "positive"),
    (dict(n_kv_head=-1), "n_kv_head=-1", "positive"),
    (dict(n_kv_head=3), "n_kv_head=3", "must divide n_head=8"),
    (dict(n_kv_head=16), "n_kv_head=16", "must divide n_head=8"),
    (dict(head_dim=0), "head_dim=0", "positive"),
    (dict(head_dim=33, aspect_ratio=33), "head_dim=33", "even"),
    (dict(aspect_ratio=0), "aspect_ratio=0", "positive"),
    (dict(aspect_ratio=100), "1024", "multiple of aspect_ratio=100"),
    (dict(aspect_ratio=2048), "1024", "multiple of aspect_ratio=2048"),
    (dict(vocab_size=0), "vocab_size=0", "positive"),
    (dict(seq_len=0), "seq_len=0", "positive"),
    (dict(seq_len=200), "seq_len=200", "multiple of 128"),
    (dict(seq_len=64), "seq_len=64", "multiple of 128"),
    (dict(seq_len=200, attn_impl="pallas", window_pattern="L"), "seq_len=200", "multiple of 128"),
    (dict(attn_impl="pallas", head_dim=64), "head_dim=64", "multiple of 128"),
    (dict(attn_impl="pallas", seq_len=8192), "seq_len=8192", "goes to 4096"),
    (dict(attn_impl="flash"), "attn_impl='flash'", "einsum, jax, splash, pallas"),
    (dict(window_pattern=""), "window_pattern=''", "S and L"),
    (dict(window_pattern="SXL"), "window_pattern='SXL'", "S and L"),
    (dict(window_pattern="sl"), "window_pattern='sl'", "S and L"),
    (dict(dtype="float16"), "dtype='float16'", "bfloat16 or float32"),
    (dict(softcap=-1.0), "softcap=-1.0", "[0, 60]"),
    (dict(softcap=61.0), "softcap=61.0", "[0, 60]"),
    (dict(rope_base=-1.0), "rope_base=-1.0", "greater than 0"),
    (dict(device_batch_size=0), "device_batch_size=0", "positive"),
    (dict(total_batch_size=0), "total_batch_size=0", "positive"),
    (dict(total_batch_size=63), "total_batch_size=63", "multiple of device_batch_size=4"),
    (dict(num_iterations=0), "num_iterations=0", "positive"),
    (dict(learning_rate=0.0), "learning_rate=0.0", "greater than 0"),
    (dict(learning_rate=float("nan")), "learning_rate=nan", "finite"),
    (dict(learning_rate=float("inf")), "learning_rate=inf", "finite"),
    (dict(n_head=2.0), "n_head=2.0", "int"),
    (dict(seq_len=256.0), "seq_len=256.0", "int"),
    (dict(keep=True), "keep=True", "int"),
    (dict(weight_decay=-0.1), "weight_decay=-0.1", "negative"),
    (dict(beta1=1.0), "beta1=1.0", "[0, 1)"),
    (dict(beta2=-0.5), "beta2=-0.5", "[0, 1)"),
    (dict(eps=0.0), "eps=0.0", "greater than 0"),
    (dict(grad_clip=-1.0), "grad_clip=-1.0", "negative"),
    (dict(warmup_ratio=-0.1), "warmup_ratio=-0.1", "[0, 1]"),
    (dict(warmdown_ratio=1.5), "warmdown_ratio=1.5", "[0, 1]"),
    (dict(warmup_ratio=0.75, warmdown_ratio=0.5), "1.25", "must not exceed 1"),
    (dict(final_lr_frac=2.0), "final_lr_frac=2.0", "[0, 1]"),
    (dict(eval_every=-1), "eval_every=-1", "negative"),
    (dict(eval_tokens=0), "eval_tokens=0", "positive"),
    (dict(sample_every=-5), "sample_every=-5", "negative"),
    (dict(save_every=-5), "save_every=-5", "negative"),
]


@pytest.mark.parametrize("fields, value, remedy", REFUSED, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_config_refuses_what_cannot_run(fields, value, remedy):
    """A mistake is told in one line, with the field, its value and what would be right, before anything is loaded."""
    with pytest.raises(UserError) as refusal:
        train.Config(**fields)
    message = str(refusal.value)
    assert "\n" not in message and value in message and remedy in message
    assert any(name in message for name in fields)


def test_config_derives_sizes_and_windows():
    """n_head is the one knob; S is half the context, the pattern is tiled, and the last layer sees everything."""
    default = train.Config()
    assert (default.n_embd, default.n_layer, default.mlp_dim, default.n_kv_head) == (1024, 16, 4096, 8)
    assert default.windows == (1024, 1024, 1024, 2048) * 4
    assert (TINY.n_embd, TINY.n_layer, TINY.mlp_dim, TINY.n_kv_head) == (84, 3, 336, 2)
    for pattern, want in (("S", (9, 9, 18)), ("LS", (18, 9, 18)), ("SLS", (9, 18, 18)), ("L", (18,) * 3)):
        assert replace(window_pattern=pattern).windows == want
    assert replace(seq_len=1, window_pattern="S").windows == (1,) * 3  # half of one token is still one key
    assert replace(n_kv_head=0).n_kv_head == 6


def test_config_is_frozen_hashable_and_static_to_jit():
    """A changed field compiles anew, an equal config does not: a stale program would train the old model."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.n_head = 4
    assert hash(TINY) == hash(replace()) and TINY == replace() and TINY != replace(softcap=8.0)
    assert replace(n_kv_head=0) == replace(n_kv_head=6)
    traced = []

    @jax.jit
    def times(config, x):
        traced.append(config)
        return config.softcap * x

    assert [float(times(c, 2.0)) for c in (TINY, replace(), replace(softcap=8.0))] == [14.0, 14.0, 16.0]
    assert traced == [TINY, replace(softcap=8.0)]


# ---------------------------------------------------------------------------------------------------------------
# Optimizer


def rate_reference(config, step):
    """The learning rate of a 0-based step, spelled out."""
    warmup = max(1, round(config.warmup_ratio * config.num_iterations))
    warmdown = max(1, round(config.warmdown_ratio * config.num_iterations))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if step > config.num_iterations - warmdown:
        left = (config.num_iterations - step) / warmdown
        return config.learning_rate * (config.final_lr_frac + left * (1 - config.final_lr_frac))
    return config.learning_rate


@pytest.mark.parametrize(
    "fields, rates",
    [
        # 50 steps: 5 up, 20 down to a quarter
        (
            dict(warmup_ratio=0.1, warmdown_ratio=0.4, final_lr_frac=0.25),
            {0: 0.2, 3: 0.8, 4: 1.0, 5: 1.0, 29: 1.0, 30: 1.0, 31: 0.9625, 40: 0.625, 49: 0.2875},
        ),
        (dict(warmup_ratio=0.0, warmdown_ratio=0.5, final_lr_frac=0.0), {0: 1.0, 25: 1.0, 26: 0.96, 49: 0.04}),
        (dict(warmup_ratio=0.0, warmdown_ratio=0.0, final_lr_frac=0.0), {0: 1.0, 25: 1.0, 49: 1.0}),
        (dict(warmup_ratio=0.5, warmdown_ratio=0.5, final_lr_frac=1.0), {0: 0.04, 24: 1.0, 25: 1.0, 49: 1.0}),
        (dict(warmup_ratio=1.0, warmdown_ratio=0.0), {0: 0.02, 24: 0.5, 49: 1.0}),
    ],
)
def test_learning_rate_rises_stays_and_falls(fields, rates):
    """The trapezoid at its corners: the first step is not lost at rate 0, the last is not yet past the end."""
    config = replace(num_iterations=50, learning_rate=0.5, **fields)
    rate = jax.jit(functools.partial(train.learning_rate_at, config))
    for step, share in rates.items():
        assert float(rate(jnp.int32(step))) == pytest.approx(0.5 * share, rel=1e-6), step
    every = [rate_reference(config, step) for step in range(50)]
    np.testing.assert_allclose([float(rate(jnp.int32(step))) for step in range(50)], every, rtol=1e-6)


def adamw_reference(config, params, grads, m, v, step):
    """One step of AdamW in float64 on dicts of arrays, by Loshchilov and Hutter's Algorithm 2."""
    rate, t = rate_reference(config, step), step + 1
    for name, g in grads.items():
        m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
        v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
        m_hat, v_hat = m[name] / (1 - config.beta1**t), v[name] / (1 - config.beta2**t)
        decay = config.weight_decay * params[name] if params[name].ndim >= 2 else 0.0
        params[name] = params[name] - rate * (m_hat / (np.sqrt(v_hat) + config.eps) + decay)


def test_adamw_equals_a_float64_reference_over_20_steps():
    """Moments, bias correction, decay on matrices only and the schedule, to float32 rounding: 3e-6 of each array."""
    config = replace(
        num_iterations=20, learning_rate=0.05, weight_decay=0.3, beta1=0.8, beta2=0.93, eps=1e-2, warmup_ratio=0.25,
        warmdown_ratio=0.5, final_lr_frac=0.1,
    )  # fmt: skip
    rng = np.random.default_rng(6)
    shapes = {"scalars": (7,), "matrix": (3, 5), "heads": (2, 11, 13), "scalar": ()}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    moments = train.adamw_init(params)
    assert all(not leaf.any() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(moments))
    assert {k: v.shape for k, v in moments["mu"].items()} == {k: v.shape for k, v in moments["nu"].items()} == shapes
    update = jax.jit(functools.partial(train.adamw_update, config))
    want = {name: np.float64(p) for name, p in params.items()}
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for step in range(20):
        scale = 10.0 ** rng.uniform(-3, 0)
        grads = {n: np.asarray(scale * (rng.normal(size=s) + 0.3), np.float32) for n, s in shapes.items()}
        params, moments = update(params, moments, grads, jnp.int32(step))
        adamw_reference(config, want, {n: np.float64(g) for n, g in grads.items()}, m, v, step)
        assert distance((params, moments["mu"], moments["nu"]), (want, m, v)) < 3e-6, step
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, moments)))


def test_weight_decay_spares_scalars():
    """With no gradient, matrices shrink by rate * weight_decay and arrays of one axis stay as they are, bit for bit."""
    config = replace(num_iterations=10, warmup_ratio=0.0, learning_rate=0.25, weight_decay=0.5)
    params = {"lambdas": np.float32([1.0, 0.1, 3.0]), "matrix": np.full((2, 3), 1.5, np.float32)}
    grads = jax.tree.map(np.zeros_like, params)
    after, _ = train.adamw_update(config, params, train.adamw_init(params), grads, jnp.int32(0))
    assert after["lambdas"].tolist() == params["lambdas"].tolist()
    np.testing.assert_allclose(after["matrix"], 1.5 * (1 - 0.25 * 0.5), rtol=1e-6)


def test_global_norm_is_euclidean_over_all_leaves():
    """The norm of one long vector: 2 ** 2 + 3 ** 2 + 6 ** 2 = 7 ** 2, whatever the shapes."""
    tree = {"a": np.float32([2.0, 0.0]), "b": [np.float32([[-3.0]]), np.float32(6.0)]}
    assert float(train.global_norm(tree)) == pytest.approx(7.0, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# The step

# Two layers. eps is large, so that what rounding makes of a gradient of nearly 0 does not decide a parameter's sign.
STEP = replace(aspect_ratio=42, device_batch_size=2, total_batch_size=12, grad_clip=0.0, learning_rate=1e-2, eps=1e-3)


@functools.cache
def make_step(config):
    return train.make_train_step(config)


def run_steps(config, count, params=None):
    """(state on the host, losses, metrics of the last step) after `count` steps on as many batches."""
    state, constants = fresh_state()
    if params is not None:
        state["params"] = jax.tree.map(jnp.asarray, {k: params[k] for k in state["params"]})
    losses = []
    for i in range(count):
        state, metrics = make_step(config)(state, constants, *random_batch(config, 2 + i))
        losses.append(np.asarray(metrics["loss"]))
    return jax.device_get(state), losses, jax.device_get(metrics)


@functools.cache
def initial_state():
    return jax.device_get(train.init_state(STEP, train.make_mesh()))


def fresh_state():
    """STEP's (state, constants), on the device and there to be donated."""
    return jax.tree.map(jnp.array, initial_state())


@pytest.fixture(scope="module")
def whole_batch():
    """Three steps of 12 sequences in one microbatch, from parameters with nothing at zero."""
    return run_steps(dataclasses.replace(STEP, device_batch_size=12), 3, random_params(STEP))


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_accumulating_equals_one_large_batch(microbatch, whole_batch):
    """12 sequences by 1, 2 or 3 at a time: the same losses, moments and parameters to rounding; sums are not means."""
    config = dataclasses.replace(STEP, device_batch_size=microbatch)
    state, losses, metrics = run_steps(config, 3, random_params(STEP))
    want_state, want_losses, want_metrics = whole_batch
    np.testing.assert_allclose(losses, want_losses, rtol=2e-6)
    assert metrics["grad_norm"] == pytest.approx(want_metrics["grad_norm"], rel=2e-5)
    assert distance(state["mu"], want_state["mu"]) < 2e-5
    assert distance(state["params"], want_state["params"]) < 2e-5


def test_the_step_is_the_gradient_of_the_mean_loss_put_through_adamw():
    """One step equals loss_fn's gradient, global_norm and the float64 AdamW, and reports what it did."""
    params = random_params(STEP)
    state, losses, metrics = run_steps(STEP, 1, params)
    x, y = random_batch(STEP)
    wide = widen(params)
    assert losses[0] == pytest.approx(token_losses_reference(STEP, wide, x, y).mean(), abs=1e-5)
    flat = lambda tree: {jax.tree_util.keystr(k): np.float64(a) for k, a in jax.tree_util.tree_leaves_with_path(tree)}
    # The mean is taken in float64, over the step's own microbatches: a lambda's gradient nearly cancels over the batch.
    count = len(x) // STEP.device_batch_size
    parts = [
        flat(loss_and_grads(STEP, params, *xy)[1]) for xy in zip(np.split(x, count), np.split(y, count), strict=True)
    ]
    want, grads = flat(wide), {name: sum(part[name] for part in parts) / count for name in parts[0]}
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["lr"] == pytest.approx(rate_reference(STEP, 0), rel=1e-6)
    assert state["step"] == 1
    m, v = ({name: np.zeros_like(a) for name, a in want.items()} for _ in range(2))
    adamw_reference(STEP, want, grads, m, v, 0)
    assert distance(flat(state["mu"]), m) < 5e-6
    assert distance(flat(state["params"]), want) < 2e-5


def test_clipping_scales_the_gradient_to_the_norm_and_no_further():
    """A gradient above grad_clip is scaled to it as a whole, one below is left alone, and 0 means no clipping."""
    starts = [random_params(STEP), initial_state()[0]["params"]]  # the second's gradient is the smaller one
    free = [run_steps(STEP, 1, start) for start in starts]
    norms = [float(metrics["grad_norm"]) for _, _, metrics in free]
    clip = norms[0] / 3
    assert norms[1] < 0.9 * clip
    for start, (want, _, _), norm, scale in zip(starts, free, norms, (1 / 3, 1.0), strict=True):
        clipped, _, metrics = run_steps(dataclasses.replace(STEP, grad_clip=clip), 1, start)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)  # reported as it was before
        assert distance(clipped["mu"], jax.tree.map(lambda m, s=scale: s * np.float64(m), want["mu"])) < 2e-6
        assert distance(clipped["nu"], jax.tree.map(lambda n, s=scale: s**2 * np.float64(n), want["nu"])) < 4e-6


def test_the_old_state_is_donated_and_nothing_else_is():
    """Undonated, parameters and moments would exist twice (3.2 GB more by default); the tables must survive."""
    state, constants = fresh_state()
    x, y = (jnp.asarray(a) for a in random_batch(STEP))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers")  # those that no output can take
        train.make_train_step(STEP).lower(state, constants, x, y)
    new, _ = make_step(STEP)(state, constants, x, y)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, constants, x, y)))
    make_step(STEP)(new, constants, x, y)  # and the step goes on from there


def test_the_second_step_is_the_program_of_the_first():
    """A weakly typed leaf, such as that of jnp.full(n, 0.1), comes back strong: another program, compiled once more."""
    init = functools.partial(train.new_state, STEP, train.GPT)
    before, constants = jax.eval_shape(init, jax.random.key(0))
    after, _ = jax.eval_shape(train.make_train_step(STEP), before, constants, *random_batch(STEP))
    kinds = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    assert kinds(after) == kinds(before)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    """Three steps twice: parameters and losses equal to the last bit, so that a run can be repeated."""
    (first, losses, _), (second, again, _) = run_steps(STEP, 3), run_steps(STEP, 3)
    assert np.array_equal(losses, again)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    other, _ = train.init_state(dataclasses.replace(STEP, param_seed=43), train.make_mesh())
    assert not np.array_equal(other["params"]["wte"], initial_state()[0]["params"]["wte"])


def test_loss_starts_at_a_uniform_guess_and_falls_on_a_repeated_batch():
    """At step 0 all logits are nearly 0 and the loss is log(V) to 5e-3; 40 steps on one batch halve it at least."""
    (state, constants), batch, losses = fresh_state(), random_batch(STEP), []
    for _ in range(STEP.num_iterations):
        state, metrics = make_step(STEP)(state, constants, *batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(31), abs=5e-3)
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_keeps_float32_masters_and_moments():
    """Masters in bfloat16 would not move: a step of 1e-4 of a weight is below its 8 bits."""
    config = dataclasses.replace(STEP, dtype="bfloat16")
    params = random_params(STEP)
    state, losses, _ = run_steps(config, 1, params)
    assert {str(leaf.dtype) for name in ("params", "mu", "nu") for leaf in jax.tree.leaves(state[name])} == {"float32"}
    assert losses[0] == pytest.approx(run_steps(STEP, 1, params)[1][0], rel=0.01)
    wte = np.asarray(state["params"]["layers"][0]["c_fc"])
    assert (wte != wte.astype(jnp.bfloat16)).mean() > 0.9  # not rounded on the way either


EIGHT = """
import importlib, json, sys
import numpy as np, jax
sys.path[:0] = [{root!r}, {tests!r}]
import test_model as t
train, config = t.train, t.dataclasses.replace(t.STEP, device_batch_size=1, total_batch_size=16, grad_clip=1.0)
report = {{"devices": jax.device_count()}}
for count in (1, 8):
    mesh = train.make_mesh(jax.devices()[:count]) if count == 1 else train.make_mesh()
    step = train.make_train_step(config, mesh)
    state, constants = train.init_state(config, mesh)
    params = train.split_trainable(t.random_params(config))[0]
    state["params"] = jax.device_put(params, state["step"].sharding)
    losses = []
    for i in range(3):
        state, metrics = step(state, constants, *t.random_batch(config, i))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    copies = state["params"]["layers"][1]["c_q"].addressable_shards
    assert len(copies) == mesh.size and all(np.array_equal(c.data, copies[0].data) for c in copies)
    report[f"losses_{{count}}"] = losses
    report[f"params_{{count}}"] = [np.asarray(p).ravel()[:50].tolist() for p in jax.tree.leaves(state["params"])]
try:
    train.make_train_step(config, train.make_mesh(jax.devices()[:3]))
except train.UserError as error:
    report["refused"] = str(error)
print(json.dumps(report))
"""


def test_eight_devices_give_the_losses_of_one():
    """Eight shards of two microbatches have the mean of sixteen; 16 sequences on three devices are refused."""
    code = EIGHT.format(root=str(ROOT), tests=str(ROOT / "tests"))
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["devices"] == 8
    np.testing.assert_allclose(report["losses_8"], report["losses_1"], rtol=1e-5)
    for eight, one in zip(report["params_8"], report["params_1"], strict=True):
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)
    assert "\n" not in report["refused"]
    assert "total_batch_size=16" in report["refused"] and "device_batch_size * devices = 1 * 3" in report["refused"]


LAYER_SCOPES = [f"layer_{i}/{part}" for i in range(2) for part in ("attention", "mlp")]


def test_named_scopes_are_in_the_compiled_step():
    """A profile is read by these names: forward and, where the loss does not bring its own gradient, backward."""
    text = make_step(STEP).lower(*fresh_state(), *random_batch(STEP)).compile().as_text()
    names = [re.sub(r"[()]", "/", name) for name in re.findall(r'op_name="([^"]*)"', text)]
    for scope in ("embedding", *LAYER_SCOPES, "lm_head", "loss", "optimizer"):
        found = [name for name in names if re.search("(^|/)" + scope.replace("/", "/+") + "(/|$)", name)]
        assert [name for name in found if "transpose" not in name], scope
        assert [name for name in found if "transpose" in name] or scope not in ("embedding", *LAYER_SCOPES), scope


# ---------------------------------------------------------------------------------------------------------------
# Sampling: the context is 42 and S layers see 21 keys, fewer than the 24 new tokens

GEN = replace(seq_len=42, window_pattern="SSL")
NEW = 24
PROMPT_SEEDS = {1: 0, 5: 14, 16: 5, 17: 8, 18: 8}  # by length; those that lead to many different tokens


@functools.cache
def greedy_sampler(config=GEN, new=NEW):
    return train.make_sampler(config, new)


def greedy_reference(config, params, prompt, count):
    """`count` likeliest tokens, the whole prefix computed anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_reference(config, params, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", PROMPT_SEEDS)
def test_greedy_generation_equals_recomputing_the_whole_prefix(length):
    """Token for token: the cache holds the right keys at the right positions, and padding is never seen."""
    params = random_params(GEN, 1)
    prompt = random_tokens(GEN, 1, length, PROMPT_SEEDS[length])[0].tolist()
    tokens = train.generate(GEN, params, prompt, NEW, sampler=greedy_sampler())
    want = greedy_reference(GEN, widen(params), prompt, NEW)
    assert len(set(want)) > 10  # a model stuck on one token would agree with anything
    assert tokens == want


def test_greedy_generation_equals_forward_on_the_whole_prefix():
    """The same against the model's own forward pass, with as many key/value heads as query heads."""
    config = replace(n_kv_head=0, seq_len=27, window_pattern="S", vocab_size=53)
    params, prompt = random_params(config), [2, 3, 5, 7]
    forward = jax.jit(functools.partial(train.forward, config))
    tokens = list(prompt)
    for _ in range(23):
        padded = np.zeros((1, 27), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.asarray(forward(params, padded))[0, len(tokens) - 1].argmax()))
    assert train.generate(config, params, prompt, 23) == tokens[4:]


def test_a_batch_of_prompts_is_sampled_row_by_row():
    """make_sampler on several rows gives each row what it gets alone."""
    params, prompts = random_params(GEN, 1), random_tokens(GEN, 3, 5)
    together = np.asarray(greedy_sampler()(params, prompts, 5, jax.random.key(0)))
    assert together.shape == (3, NEW) and together.dtype == np.int32
    for row, prompt in zip(together, prompts, strict=True):
        assert row[:9].tolist() == greedy_reference(GEN, widen(params), prompt.tolist(), 9)


def test_a_new_token_copies_neither_the_cache_nor_a_weight(full_compiler):
    """On a CPU each of them took XLA a tenth of a token's time: no transpose or copy is of their sizes."""
    config = train.Config(n_head=2, head_dim=128, aspect_ratio=128, vocab_size=61, seq_len=99, attn_impl="einsum")
    config = dataclasses.replace(config, n_kv_head=2, dtype="float32")
    params = train.init_params(config, jax.random.key(0))
    lowered = train.make_sampler(config, 56).lower(params, np.zeros((1, 16), np.int32), 3, jax.random.key(0))
    text, D, S = lowered.compile().as_text(), 256, 72
    assert re.search(rf"f32\[2,{S},128\]", text) and re.search(rf"f32\[{D},{D}\]", text)
    sizes = {math.prod(shape) for shape in ((2, S, 128), (D, D), (D, 4 * D))}
    made = re.findall(r"%(\S*(?:copy|transpose)\S*) = f32\[([\d,]+)\]", text)
    assert not [name for name, shape in made if math.prod(map(int, shape.split(","))) in sizes]


def test_the_first_of_the_likeliest_is_taken():
    """As numpy's argmax does; where every logit is NaN the id is still one of the vocabulary."""
    logits = np.float32([[1, 3, 2, 3], [5, 4, 5, 5], [-1, -2, -3, -0.5]])
    assert train.pick_token(logits, None, 0.0, 0).tolist() == [1, 0, 3]
    assert 0 <= train.pick_token(np.full((1, 4), np.nan, np.float32), None, 0.0, 0)[0] < 4


def test_top_1_is_greedy_at_any_temperature():
    """Of one candidate there is no choice."""
    params, prompt = random_params(GEN), [11, 3, 7]
    top_1 = train.generate(GEN, params, prompt, 6, temperature=2.0, top_k=1, seed=5)
    assert top_1 == greedy_reference(GEN, widen(params), prompt, 6)


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("top_k", [0, 5])
def test_sampled_tokens_follow_the_softmax_of_the_top_k(top_k):
    """4,000 draws of two tokens: only the top k appear, as often as softmax(logits / temperature) says (p > 1e-6)."""
    config, temperature, draws = replace(softcap=3.0), 1.7, 4000
    params, prompt = random_params(config), [13, 4, 8]
    sampler = train.make_sampler(config, 2, temperature, top_k)
    tokens = np.asarray(sampler(params, np.tile(np.int32(prompt), (draws, 1)), 3, jax.random.key(9)))
    first = int(np.bincount(tokens[:, 0]).argmax())
    for prefix, drawn in ((prompt, tokens[:, 0]), ([*prompt, first], tokens[tokens[:, 0] == first, 1])):
        logits = logits_reference(config, widen(params), np.array([prefix]))[0, -1]
        likely = np.argsort(-logits)[: top_k or None]
        assert set(drawn.tolist()) <= set(likely.tolist())
        weights = np.exp(logits[likely] / temperature)
        counts = np.bincount(drawn, minlength=config.vocab_size)[likely]
        limit = {5: 33.4, 31: 86.7}[len(likely)]  # chi-square with one degree of freedom fewer, p = 1e-6
        assert counts.sum() > 100 and chi_square(counts, weights / weights.sum()) < limit


def test_the_same_seed_samples_the_same_tokens():
    """Samples of a run can be repeated, and another seed gives others."""
    params = random_params(GEN)
    sampler = train.make_sampler(GEN, 16, 1.0)
    draw = lambda seed: train.generate(GEN, params, [1, 2], 16, temperature=1.0, seed=seed, sampler=sampler)
    assert draw(3) == draw(3) != draw(4)
    assert len(set(draw(3))) > 3  # each step has a key of its own


@pytest.mark.parametrize(
    "arguments, value",
    [
        (dict(prompt=[]), "prompt=[]"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=40), "max_new_tokens=40"),
        (dict(prompt=[1] * 42, max_new_tokens=1), "max_new_tokens=1"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=32), "top_k=32"),
        (dict(temperature=-0.5), "temperature=-0.5"),
        (dict(temperature=float("nan")), "temperature=nan"),
    ],
)
def test_generate_refuses_bad_arguments(arguments, value):
    """Told in one line with the argument and its value, where JAX would clamp an index and go on."""
    call = {"prompt": [1, 2, 3], "max_new_tokens": 4, **arguments}
    with pytest.raises(UserError) as refusal:
        train.generate(GEN, random_params(GEN), **call)
    assert str(refusal.value).startswith(f"{value}: ") and "\n" not in str(refusal.value)
