"""05's optimizer: Muon and AdamW by groups against float64 NumPy, its schedules, its rates, and other models on it.

Sizes differ in every dimension; a key/value head serves two query heads, so that c_k has another shape than c_q.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import TINY as GPT_CONFIG
from configs import quick_compiler, random_batch  # noqa: F401  (one is a fixture for every test)
from reference import distance, relative_rms
from reference_muon import (
    ADAMW,
    MuonReference,
    decay_factor,
    direction,
    exact,
    in_bfloat16,
    momentum,
    muon_reference,
    name_of,
    named,
    normuon,
    peak_decay,
    peak_rates,
    polar_express,
    rate_factor,
)

from onechip.doors import config_with
from onechip.weights import widened

train = importlib.import_module("02_train")
maxtext = importlib.import_module("04_maxtext")
speed = importlib.import_module("05_speedrun")

TESTS = Path(__file__).resolve().parent

# B 5 | T 18 | D 40 | N 4 | K 2 | H 10 | F 160 | L 3 | V 31 | E 12 | S 24. Matrices (inputs, outputs): 40 x 40 twice,
# 40 x 20 twice, 40 x 160, 160 x 40, 12 x 2. Every setting of the optimizer is another than its default, and such that
# decay counts: 1 to 4 % a step.
TINY = config_with(speed.Config, speed.MuonSettings)(
    depth=3, n_embd=40, head_dim=10, n_kv_head=2, vocab_size=31, seq_len=18, attn_impl="einsum", dtype="float32",
    device_batch_size=5, total_batch_size=5, num_iterations=20, loss_slice=13, warmup_steps=4, warmdown_ratio=0.6,
    final_lr_frac=0.1, learning_rate=90.0, matrix_lr=0.03, lm_head_lr=0.007, embed_lr=0.2, value_embed_lr=0.11,
    resid_lr=0.006, x0_lr=0.4, gate_lr=0.3, weight_decay=0.04, beta1=0.95, momentum_start=0.8, momentum_end=0.85,
    momentum_warmup=9, beta2=0.85, eps=1e-9,
)  # fmt: skip
WEIGHTS = speed.nanochat_weights(TINY)
PARTS = ("nesterov", "equilibrate", "renormalize", "per_neuron", "shape", "cautious")


def replace(**fields):
    """TINY with other fields."""
    return dataclasses.replace(TINY, **fields)


# One layer, which has all the kinds of weights
ONE = replace(depth=1, weight_decay=0.013)
ONE_WEIGHTS = speed.nanochat_weights(ONE)


def random_tree(weights, config, seed, scale=1.0):
    """A float32 NumPy array for each weight, normal, with lines of very different lengths along each axis."""
    rng = np.random.default_rng(seed)

    def draw(weight):
        shape = weight.shape(config)
        lengths = [np.exp(rng.normal(size=n)).reshape([-1] + [1] * (len(shape) - i - 1)) for i, n in enumerate(shape)]
        return np.float32(scale * rng.normal(size=shape) * math.prod(lengths))

    return jax.tree.map(draw, weights)


def narrow_tree(weights, config, seed, rank=2, noise=2e-4):
    """Nearly of low rank, as gradients are: most singular values are too small for Polar Express to reach 1."""
    rng = np.random.default_rng(seed)

    def draw(weight):
        shape = weight.shape(config)
        inputs = weight.fan_in(config) if weight.is_matrix else 1
        rows, columns = rng.normal(size=(inputs, rank)), rng.normal(size=(rank, math.prod(shape) // inputs))
        columns *= np.exp(rng.normal(size=columns.shape[1]))
        return np.float32((rows @ columns + noise * rng.normal(size=(len(rows), columns.shape[1]))).reshape(shape))

    return jax.tree.map(draw, weights)


def update_one(config, params, state, grads, step, without=()):
    """muon_update of ONE's table, an operation at a time: variants share what is compiled."""
    return speed.muon_update(config, ONE_WEIGHTS, params, state, grads, jnp.int32(step), without=without)


def step_stack(config, P, U, V, rate, decay):
    """(P, V) after a step of Muon on a stack: float32 P and momenta U (S, in, out), second moments V."""
    X, V = speed.muon_stack(config, jnp.asarray(U).astype(config.dtype), V)
    return speed.muon_apply(P, X, rate, decay, P.shape[1:]), V


def errors_of(reference, params, state):
    """{(kind, path): largest difference as a share of the largest magnitude}; kind: p, m or v.

    Entries in doubt do not count, 0.3 % at most; parameters below 0.1 count as that.
    """
    doubtful = sum(int(doubt.sum()) for doubt in reference.doubt.values())
    assert doubtful < 3e-3 * sum(p.size for p in reference.p.values())
    errors = {}
    for kind, tree in {"p": params, "m": state["mu"], "v": state["nu"]}.items():
        arrays, want = named(tree), getattr(reference, kind)
        assert arrays.keys() == want.keys()
        for path, array in arrays.items():
            counts = ~reference.doubt[path] if kind == "p" else True
            error = np.abs(np.where(counts, np.float64(array) - want[path], 0)).max()
            errors[kind, path] = error / max(np.abs(want[path]).max(), 0.1 if kind == "p" else 0.0)
    return errors


# Measured: 5e-7, 2e-6 (a scalar's, which crosses 0) and, at the first steps, 1.6e-5
ROUNDING = {"p": 2e-6, "m": 5e-6, "v": 5e-5}
# Of a step on narrow_tree, whose small singular values grow 980 times, and their rounding with them: measured 1.1e-5
NARROW = ROUNDING | {"p": 2e-5}


def assert_equal_to(reference, params, state, bounds=ROUNDING):
    """Parameters and moments, array by array."""
    errors = errors_of(reference, params, state)
    assert not {key: error for key, error in errors.items() if not error < bounds[key[0]]}


# ----------------------------------------------------------------------------------------------------------------------
# Against the reference


def test_twenty_steps_equal_a_float64_reference():
    """Both optimizers and all schedules, from the same start, equal to rounding after each step."""
    params = random_tree(WEIGHTS, TINY, 1, 0.1)
    state, reference, start = speed.muon_init(TINY, WEIGHTS, params), MuonReference(TINY, params), named(params)
    update = jax.jit(functools.partial(speed.muon_update, TINY, WEIGHTS))
    for it in range(TINY.num_iterations):
        grads = random_tree(WEIGHTS, TINY, 100 + it, 10.0 ** (it % 3 - 3))
        params, state = update(params, state, grads, jnp.int32(it))
        reference.step(it, grads)
        assert_equal_to(reference, params, state)
    moved = {path: relative_rms(start[path], p) for path, p in reference.p.items()}
    assert min(moved.values()) > 0.02, moved  # the tolerance is small beside what is compared


@functools.cache
def somewhere():
    """(params, state) of ONE with moments that are not zero."""
    second = jax.tree.map(lambda v: np.square(v, dtype=np.float32), random_tree(ONE_WEIGHTS, ONE, 5, 0.1))
    first = speed.muon_init(ONE, ONE_WEIGHTS, second)
    take = lambda moment, v: v[tuple(slice(n) for n in moment.shape)]
    state = {"mu": narrow_tree(ONE_WEIGHTS, ONE, 4), "nu": jax.tree.map(take, first["nu"], second)}
    params = random_tree(ONE_WEIGHTS, ONE, 3, 0.03)
    params["layers"][0]["value_gate"] *= np.float32(8)  # 24 numbers: else which of them decay would be a hundredth
    return params, state


def reference_at(params, state):
    """A MuonReference of ONE that continues from the program's state."""
    reference = MuonReference(ONE, params)
    reference.m, reference.v = ({k: np.float64(a) for k, a in named(state[name]).items()} for name in ("mu", "nu"))
    return reference


@pytest.mark.parametrize("without", [(), *((part,) for part in PARTS), PARTS], ids="-".join)
def test_each_part_is_what_the_reference_has_and_can_be_left_out(without):
    """One step with every part, without each, and with none, equal to the reference; each changes all its matrices.

    That is a twentieth of the step or more; of AdamW's weights nothing.
    """
    (params, state), grads = somewhere(), narrow_tree(ONE_WEIGHTS, ONE, 200)
    got, got_state = update_one(ONE, params, state, grads, 7, without)
    reference, full = reference_at(params, state), reference_at(params, state)
    reference.step(7, grads, without)
    full.step(7, grads)
    assert_equal_to(reference, got, got_state, NARROW)
    before = named(params)
    share = {p: relative_rms(array - before[p], full.p[p] - before[p]) for p, array in named(got).items()}
    changed = {name_of(path) for path in share if share[path] > 0.05}
    matrices = {name_of(path) for path in share if name_of(path) not in ADAMW}
    assert changed == ({"c_fc"} if without == ("shape",) else matrices if without else set()), share


def test_each_function_is_the_references():
    """Polar Express, the directions and NorMuon by themselves, on a stack of tall, wide and square matrices."""
    rng = np.random.default_rng(3)
    for inputs, outputs in ((9, 23), (23, 9), (14, 14)):
        U = np.float32(rng.normal(size=(3, inputs, outputs)) * np.exp(rng.normal(size=(3, inputs, outputs))))
        X, second = rng.normal(size=U.shape), rng.random((3, 1, outputs) if outputs >= inputs else (3, inputs, 1))
        Y, V = speed.per_neuron(TINY, np.float32(X), np.float32(second))
        for i, u in enumerate(np.float64(U)):
            assert distance(speed.orthogonalize(jnp.array(U))[i], polar_express(u.T).T) < 3e-5
            for without in ((), ("equilibrate",), ("renormalize",)):
                assert distance(speed.muon_directions(U, without)[i], direction(u.T, without).T) < 3e-5
            want = [a.T for a in normuon(X[i].T, second[i].T, TINY.beta2)]
            assert distance([Y[i], V[i]], want) < 1e-6


def test_a_matrix_in_a_stack_gets_the_update_that_it_gets_alone():
    """Norms, means and products are each matrix's own: 1e-6 of the largest."""
    rng, step = np.random.default_rng(4), jax.jit(functools.partial(step_stack, TINY))
    for inputs, outputs in ((12, 31), (31, 12)):
        P, U = (np.float32(rng.normal(size=(4, inputs, outputs)) * scale) for scale in (1, 3))
        U *= np.float32([1e-3, 1, 7, 50])[:, None, None]
        V = np.float32(rng.random((4, 1, outputs) if outputs > inputs else (4, inputs, 1)))
        together = step(P, U, V, 0.1, 0.2)
        for i in range(4):
            alone = step(P[i : i + 1], U[i : i + 1], V[i : i + 1], 0.1, 0.2)
            assert distance(alone, [np.float64(a[i : i + 1]) for a in together]) < 1e-6


def test_bfloat16_is_the_type_of_the_products_and_of_nothing_else():
    """Muon's updates are as near float64's as an array rounded after each operation can be, and not float32's own.

    Within 1.1 times that: 0.093 and 0.121 of the update, where ours are at 0.072 and 0.105. AdamW and the whole state
    stay in float32.
    """
    rng, config = np.random.default_rng(8), replace(dtype="bfloat16")
    P, U = (rng.normal(size=(2, 12, 37)) for _ in range(2))
    moments = np.ones((2, 1, 37))
    got, _ = step_stack(config, *(np.float32(a) for a in (P, U, moments)), 0.1, 0.0)
    for i in range(2):  # with momentum 1, the gradient counts for nothing
        args = P[i].T, 0 * P[i].T, U[i].T, moments[i].T, 1.0, 0.1, 0.0, config.beta2
        want, rounded = (muon_reference(*args, kept=kept)[0].T - P[i] for kept in (exact, in_bfloat16))
        assert 1e-3 < relative_rms(got[i] - P[i], want) < 1.1 * relative_rms(rounded, want)
    (params, state), grads = somewhere(), narrow_tree(ONE_WEIGHTS, ONE, 200)
    after = update_one(dataclasses.replace(ONE, dtype="bfloat16"), params, state, grads, 7)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {"float32"}
    reference = reference_at(params, state)
    reference.step(7, grads)
    errors = errors_of(reference, *after)
    assert not {key: e for key, e in errors.items() if e > ROUNDING[key[0]] and name_of(key[1]) in ADAMW}


# ----------------------------------------------------------------------------------------------------------------------
# Orthogonal updates


def matrix_of(shape, values, rng):
    """A random float64 matrix (in, out) with these singular values."""
    left, right = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return (left * values) @ right.T


def conditioned(shape, condition, rng):
    """A matrix whose singular values fall from 1 to 1 / condition, each by the same factor."""
    return matrix_of(shape, np.geomspace(1, 1 / condition, min(shape)), rng)


SHAPES = [(7, 41), (41, 7), (24, 24), (30, 50), (64, 16)]
BANDS = {"float32": (0.85, 1.15), "bfloat16": (0.75, 1.2)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_are_near_one(dtype):
    """Those above a thousandth of the matrix's norm end within 0.85 to 1.15, in bfloat16 within 0.75 to 1.2.

    If the smallest is below that, it is at least 700 times what it was, as a share of the norm.
    """
    rng, (low, high) = np.random.default_rng(5), BANDS[dtype]
    orthogonalize = jax.jit(speed.orthogonalize)
    for shape in SHAPES:
        drawn = [rng.normal(size=shape), *(conditioned(shape, condition, rng) for condition in (3, 30, 300, 1000))]
        X = jnp.asarray([scale * x for scale in (1e-4, 1e3) for x in drawn], dtype)
        Y = orthogonalize(X)
        assert Y.dtype == dtype and Y.shape == X.shape
        for x, y in zip(np.float64(X), np.float64(Y), strict=True):
            before, after = (np.linalg.svd(a, compute_uv=False) for a in (x, y))
            share = before.min() / np.linalg.norm(before)
            assert after.max() < high, (shape, share, after)
            assert after.min() > min(low, 700 * share), (shape, share, after)


def test_directions_have_the_norm_of_an_orthogonal_matrix():
    """The root of the shorter side, to 1e-5, whatever came in."""
    rng = np.random.default_rng(6)
    for shape in SHAPES:
        U = np.float32([rng.normal(size=shape), 1e-3 * conditioned(shape, 1000, rng)])
        norms = np.linalg.norm(speed.muon_directions(U), axis=(1, 2))
        np.testing.assert_allclose(norms, math.sqrt(min(shape)), rtol=1e-5)


def test_a_matrix_and_its_transpose_have_transposed_updates():
    """Of all but the equilibration, which is of outputs; the second moment is of the longer side, so not if square."""
    rng, near = np.random.default_rng(7), 1e-5
    for shape in ((9, 23), (24, 24), (41, 7)):
        # A square of normal numbers has singular values near 0, and rounding grows with them.
        U = np.float32([matrix_of(shape, rng.uniform(0.2, 1, min(shape)), rng) for _ in range(2)])
        U *= np.float32(np.exp(0.3 * rng.normal(size=(2, 1, shape[1]))))
        flipped = U.swapaxes(1, 2)
        X, Y = speed.orthogonalize(jnp.array(U)), speed.orthogonalize(jnp.array(flipped)).mT
        assert distance(Y, np.float64(X)) < near
        X, Y = speed.muon_directions(U, ("equilibrate",)), speed.muon_directions(flipped, ("equilibrate",)).mT
        assert distance(Y, np.float64(X)) < near
        assert distance(speed.muon_directions(flipped).mT, np.float64(speed.muon_directions(U))) > 0.1
        if shape[0] != shape[1]:
            V = np.ones((2, shape[0], 1) if shape[0] > shape[1] else (2, 1, shape[1]), np.float32)
            (a, v), (b, w) = speed.per_neuron(TINY, U, V), speed.per_neuron(TINY, flipped, V.swapaxes(1, 2))
            assert distance([b.mT, w.mT], [np.float64(a), np.float64(v)]) < near


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_of_zero_gives_no_nan(dtype):
    """All of it, from the first step on: weights only decay. Lines or a matrix of zeros: everything is finite."""
    config = dataclasses.replace(ONE, dtype=dtype)
    params = random_tree(ONE_WEIGHTS, config, 1)
    state, zero = speed.muon_init(config, ONE_WEIGHTS, params), jax.tree.map(np.zeros_like, params)
    new, moments = update_one(config, params, state, zero, 0)
    rates, before, share = peak_rates(config), named(params), 1 / config.warmup_steps
    for path, p in named(new).items():
        name = name_of(path)
        if name in ADAMW:
            shrinks = rates[name] * ADAMW[name][3]
        else:
            shrinks = rates["muon"] * peak_decay(config, before) * (2.0 if name == "c_fc" else 1.0)  # 160 of 40
        np.testing.assert_allclose(p, (1 - share * shrinks) * before[path], rtol=1e-5, err_msg=path)
    assert not any(leaf.any() for leaf in jax.tree.leaves(moments))
    grads = random_tree(ONE_WEIGHTS, config, 2)
    (layer,) = grads["layers"]
    layer["c_fc"][:, 3] = layer["mlp_proj"][5:9] = layer["c_q"][...] = 0
    for it in range(2):
        params, state = update_one(config, params, state, grads, it)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))


# ----------------------------------------------------------------------------------------------------------------------
# State, rates, schedules


def test_the_state_is_two_trees_of_moments_with_one_number_an_output():
    """mu as the parameters; nu of a matrix 1 on its shorter side (its inputs, if square); float32, zeros."""
    params = random_tree(WEIGHTS, TINY, 1)
    state = speed.muon_init(TINY, WEIGHTS, params)
    assert list(state) == ["mu", "nu"]
    assert all(leaf.dtype == jnp.float32 and not leaf.any() for leaf in jax.tree.leaves(state))
    assert jax.tree.map(np.shape, state["mu"]) == jax.tree.map(np.shape, params)
    attention = {"c_q": (1, 4, 10), "c_k": (40, 1, 1), "c_v": (40, 1, 1), "c_proj": (1, 1, 40)}
    layer = {**attention, "c_fc": (1, 160), "mlp_proj": (160, 1)}
    values = {"value_embeds": (31, 20), "value_gate": (12, 1)}
    assert jax.tree.map(np.shape, state["nu"]) == {
        "wte": (31, 40), "lm_head": (40, 31), "layers": [layer | values, layer, layer | values],
        "resid_lambdas": (3,), "x0_lambdas": (3,), "smear_gate": (24,), "smear_lambda": (), "backout_lambda": (),
    }  # fmt: skip


@pytest.mark.slow
def test_embeddings_stored_in_bfloat16_are_updated_in_float32_and_rounded_once():
    """Tables and both their moments are bfloat16; a step leaves what a float32 state would have, rounded."""
    narrow = replace(embed_dtype="bfloat16", learning_rate=3.0)
    mesh = train.make_mesh(jax.local_devices()[:1])
    stored = train.init_state(narrow, mesh, speed.NANOCHAT, speed.MUON)
    tables = lambda tree: [tree["wte"], *(layer["value_embeds"] for layer in tree["layers"] if "value_embeds" in layer)]
    trees = [stored["params"], stored["opt"]["mu"], stored["opt"]["nu"]]
    assert all(table.dtype == jnp.bfloat16 for tree in trees for table in tables(tree))
    narrow_count = sum(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(stored))
    assert narrow_count == 3 * len(tables(stored["params"])) == 9
    wide_step = train.make_train_step(replace(learning_rate=3.0), mesh, speed.NANOCHAT, speed.MUON)
    narrow_step = train.make_train_step(narrow, mesh, speed.NANOCHAT, speed.MUON)
    first = jax.device_get(stored)
    for step in range(3):
        batch = random_batch(TINY, seed=step)
        wide, _ = wide_step(widened(jax.tree.map(jnp.copy, stored)), batch)
        stored, _ = narrow_step(stored, batch)
        for a, b in zip(*map(jax.tree.leaves, (stored, wide)), strict=True):
            step_size = 2.0**-7 if a.dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.51 * step_size, atol=1e-6)
    assert not any(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (stored, first)), strict=True))


DEFAULT = config_with(speed.Config, speed.MuonSettings)

# nanochat's, July 2026: rate at depth 12 and 2^19 tokens, betas, decay
RECIPE = {
    "lm_head": (0.008, 0.8, 0.96, 0.01), "embed": (0.3, 0.8, 0.995, 0.001), "value_embeds": (0.15, 0.8, 0.995, 0.01),
    "resid_lambdas": (0.005, 0.8, 0.95, 0.05), "x0_lambdas": (0.5, 0.96, 0.95, 0.0), "smear": (0.2, 0.8, 0.95, 0.0),
    "backout": (0.2, 0.8, 0.95, 0.0),
}  # fmt: skip


def group_of(name):
    return speed.GROUPS.get(name, speed.OTHERS)


def test_defaults_are_the_recipes():
    """Rates at the reference's width and batch, betas and decays of every group that a weight of 05's can be in."""
    config = DEFAULT()
    assert (config.n_embd, config.total_batch_size * config.seq_len) == (768, 2**19)
    assert speed.group_rate(config, None) == pytest.approx(0.02, rel=1e-12)
    assert (config.beta1, config.beta2, config.eps, config.weight_decay) == (0.97, 0.9, 1e-10, 0.28)
    assert (config.momentum_start, config.momentum_end, config.momentum_warmup) == (0.85, 0.9, 400)
    assert (config.warmup_steps, config.warmdown_ratio, config.final_lr_frac, config.grad_clip) == (40, 0.65, 0.05, 0)
    weights = jax.tree.leaves(speed.nanochat_weights(config))
    assert {w.group for w in weights if not speed.is_muons(w)} == set(RECIPE)
    for name, (rate, beta1, beta2, decay) in RECIPE.items():
        group = group_of(name)
        assert speed.group_rate(config, group) == pytest.approx(rate, rel=1e-12), name
        assert (group.beta1, group.beta2, group.decay) == (beta1, beta2, decay), name


@pytest.mark.parametrize(
    "fields, width, batch",
    [
        ({"depth": 4, "head_dim": 64, "seq_len": 256, "device_batch_size": 8, "total_batch_size": 8}, 256, 2**11),
        ({"depth": 24, "total_batch_size": 1024}, 1536, 2**21),
    ],
)
def test_rates_follow_the_batch_and_the_width_and_learning_rate(fields, width, batch):
    """All but the smear and backout group's by the root of the batch and by learning_rate; embeddings and lm_head by
    one over the root of the width."""
    config = DEFAULT(learning_rate=3.0, num_iterations=10, attn_impl="einsum", **fields)
    assert (config.n_embd, config.total_batch_size * config.seq_len) == (width, batch)
    root = 3.0 * (batch / 2**19) ** 0.5
    assert speed.group_rate(config, None) == pytest.approx(0.02 * root, rel=1e-12)
    for name, (rate, *_) in RECIPE.items():
        factor = {"embed": True, "lm_head": True, "value_embeds": True}.get(name, False)
        want = rate * root * ((width / 768) ** -0.5 if factor else 1)
        want = 0.2 if name in ("smear", "backout") else want
        assert speed.group_rate(config, group_of(name)) == pytest.approx(want, rel=1e-12), name


def test_weight_decay_follows_the_batch_and_the_parameters():
    """0.28 at the reference, times the root of the batch, times N of the reference over N; for any table of weights."""
    config = DEFAULT()
    assert speed.peak_decay(config, speed.nanochat_weights(config)) == pytest.approx(0.28, rel=1e-12)
    # Depth 4: four layers of 12 * 256^2 with two gates of 12 x 4, and 256 x 8192; depth 12 in the same heads
    small, reference = 4 * 12 * 256**2 + 2 * 12 * 4 + 256 * 8192, 12 * 12 * 768**2 + 6 * 12 * 12 + 768 * 8192
    fields = dict(depth=4, head_dim=64, vocab_size=8192, seq_len=256, device_batch_size=8, total_batch_size=8)
    config = DEFAULT(num_iterations=10, weight_decay=0.5, attn_impl="einsum", **fields)
    want = 0.5 * (2**11 / 2**19) ** 0.5 * reference / small
    assert speed.peak_decay(config, speed.nanochat_weights(config)) == pytest.approx(want, rel=1e-12)
    for model, given in ((train.GPT, GPT), (maxtext.SWIGLU, SWIGLU)):
        params = named(jax.tree.map(lambda w, c=given: np.zeros(w.shape(c)), model.weights(given)))
        assert speed.peak_decay(given, model.weights(given)) == pytest.approx(peak_decay(given, params), rel=1e-12)


@pytest.mark.parametrize("steps", [300, 1200, 5568])
def test_schedules_are_the_recipes_at_every_step(steps):
    """Rate factor, momentum and weight decay, to 1e-6 of what they are, or for the decay of what it was at first.

    With 300 steps momentum never stops rising; with 1,200 and 5,568 it stays, and falls with the rates.
    """
    config = DEFAULT(num_iterations=steps, learning_rate=7.0)
    weights, its = speed.nanochat_weights(config), jnp.arange(steps, dtype=jnp.int32)
    rates, momenta = train.learning_rate_at(config, its) / 7.0, speed.momentum_at(config, its)
    decays = speed.decay_at(config, weights, its) / speed.peak_decay(config, weights)
    np.testing.assert_allclose(rates, [rate_factor(steps, it) for it in range(steps)], rtol=1e-6)
    np.testing.assert_allclose(momenta, [momentum(steps, it) for it in range(steps)], rtol=1e-6)
    np.testing.assert_allclose(decays, [decay_factor(steps, it) for it in range(steps)], rtol=0, atol=1e-6)
    corners = {300: (299, 0.94, 0.0548), 1200: (1199, 0.9001, 0.0512), 5568: (5567, 0.9, 0.0503)}
    it, last_momentum, last_rate = corners[steps]
    assert float(momenta[it]) == pytest.approx(last_momentum, abs=3e-4)
    assert float(rates[it]) == pytest.approx(last_rate, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# On the trainer


def with_muon(config_class, config, **fields):
    """A config's model fields with Muon's settings."""
    muons = {field.name for field in dataclasses.fields(speed.MuonSettings)}
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in muons}
    return config_with(config_class, speed.MuonSettings)(**kept | fields)


FIELDS = dict(learning_rate=40.0, weight_decay=0.0, num_iterations=30, warmup_steps=2, grad_clip=0.0)
GPT = with_muon(train.Config, GPT_CONFIG, aspect_ratio=42, **FIELDS)
SWIGLU = with_muon(
    maxtext.Config,
    maxtext.Config(
        n_embd=22, n_layer=2, n_head=6, n_kv_head=2, head_dim=14, mlp_dim=34, tile=1, vocab_size=31, seq_len=18,
        rope_base=50.0, attn_impl="einsum", dtype="float32", device_batch_size=5, total_batch_size=5, loss_slice=13,
    ),
    **FIELDS,
)  # fmt: skip


@pytest.mark.parametrize("model, config", [(train.GPT, GPT), (maxtext.SWIGLU, SWIGLU)], ids=["02", "04"])
def test_other_models_train_with_muon(model, config):
    """The first step moves every matrix that has a gradient by rate * sqrt(shorter side * max(1, outputs / inputs)).

    With 6 steps on one batch the loss falls by a fifth; after eight, rates this high make it jump.
    """
    mesh = train.make_mesh()
    step, state = (
        train.make_train_step(config, mesh, model, speed.MUON),
        train.init_state(config, mesh, model, speed.MUON),
    )
    batch, before, losses = random_batch(config), jax.device_get(state["params"]), []
    for i in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if i == 0:
            after = jax.device_get(state["params"])
    assert losses[-1] < 0.8 * losses[0]
    rate, sizes = peak_rates(config)["muon"] / config.warmup_steps, config.sizes
    sides = {"c_proj": (sizes["N"] * sizes["H"], sizes["D"]), "mlp_proj": (sizes["F"], sizes["D"])}
    for name, (inputs, outputs) in sides.items():
        moved = np.linalg.norm(after["layers"][0][name] - np.float64(before["layers"][0][name]))
        length = math.sqrt(min(inputs, outputs) * max(1, outputs / inputs))
        assert moved == pytest.approx(rate * length, rel=1e-4), name


# ----------------------------------------------------------------------------------------------------------------------
# Four devices, in a process that has them

FOUR = replace(device_batch_size=1, total_batch_size=4, learning_rate=20.0)


def report_run(count, shape=""):
    """Three steps on `count` devices from random parameters: losses, parameters and shapes of shards, as JSON."""
    mesh = train.make_mesh(jax.devices()[:count], shape)
    state = train.init_state(FOUR, mesh, speed.NANOCHAT, speed.MUON)
    step = train.make_train_step(FOUR, mesh, speed.NANOCHAT, speed.MUON)
    drawn = random_tree(WEIGHTS, FOUR, 1, 0.1)
    state["params"] = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), drawn, state["params"])
    losses = []
    for i in range(3):
        state, metrics = step(state, random_batch(FOUR, i))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return {
        "losses": losses,
        "params": {path: np.asarray(p).ravel()[:50].tolist() for path, p in named(state["params"]).items()},
        "shapes": {path: [list(s.data.shape) for s in leaf.addressable_shards] for path, leaf in named(state).items()},
    }


def report_devices():
    """Prints one line of JSON: runs on one device, on four, and on four with the weights split."""
    report = {"one": report_run(1), "four": report_run(4)}
    report["split"] = report_run(4, "data=2,fsdp=2")
    print(json.dumps(report))


@pytest.fixture(scope="module")
def devices():
    """What report_devices prints in a process of four CPU devices."""
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "support")]
    code = f"import sys; sys.path[:0] = {paths}; import test_05_muon; test_05_muon.report_devices()"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["four", "split"])
def test_four_devices_train_as_one_does(devices, kind):
    """Whole on each of four devices, or weights and momenta split over two of them: losses and parameters to 1e-4."""
    run, want = devices[kind], devices["one"]
    np.testing.assert_allclose(run["losses"], want["losses"], rtol=1e-4)
    for path, values in run["params"].items():
        np.testing.assert_allclose(values, want["params"][path], rtol=0, atol=1e-4, err_msg=path)
    whole = {path: shapes[0] for path, shapes in want["shapes"].items()}
    # D = 40 and W = 20; Muon keeps a number for each line of a matrix whole.
    lines = lambda path: "'nu'" in path and 1 in whole[path]
    halves = lambda path: whole[path] if lines(path) else [{40: 20, 20: 10}.get(size, size) for size in whole[path]]
    split = {path: halves(path) if kind == "split" else shape for path, shape in whole.items()}
    assert run["shapes"] == {path: [shape] * 4 for path, shape in split.items()}
    assert sum(split[path] != shape for path, shape in whole.items()) > (40 if kind == "split" else -1)
