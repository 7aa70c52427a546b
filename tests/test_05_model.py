"""05's model against a float64 NumPy reference, its dial, and its runs: with either optimizer, interrupted, opened.

Sizes differ in every dimension, no weight is silent, and the text is longer than the short window. The reference is in
support/reference_05.py.
"""

import dataclasses
import functools
import importlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import draw_params, quick_compiler, random_tokens  # noqa: F401  (a fixture for every test)
from corpus import TINY as TINY_RUN
from corpus import is_one_line, list_checkpoints, newest, read_rows, tiny, train_tiny
from reference import distance, losses_of_logits, widen
from reference_05 import nanochat_logits, scaling_params_reference

from onechip import fit
from onechip.doors import config_with
from onechip.errors import UserError
from onechip.stages import count_tokens, stages_of
from onechip.weights import cast_weights, weight_shapes

train = importlib.import_module("02_train")
speedrun = importlib.import_module("05_speedrun")

# B 3 | T 150 of 170 | D 40 | N 4 | K 2 | H 10 | F 160 | L 5 | V 31; gates read 12 and 24; S layers see 129 keys
B, T, CONTEXT = 3, 150, 170
SMALL = speedrun.Config(
    depth=5, n_embd=40, head_dim=10, n_kv_head=2, vocab_size=31, seq_len=CONTEXT, attn_impl="einsum", dtype="float32",
    device_batch_size=3, total_batch_size=3, num_iterations=40, loss_slice=90,
)  # fmt: skip
WITH_MUON = config_with(speedrun.Config, speedrun.MuonSettings)


def replace(**fields):
    """SMALL with other fields."""
    return dataclasses.replace(SMALL, **fields)


@functools.cache
def random_params(config, seed=0):
    """Nothing at its initial value: every part of the model adds about as much as the stream has."""
    D = config.n_embd
    scales = {
        "wte": 1.0, "lm_head": 1.0, "c_q": D**-0.5, "c_k": D**-0.5, "c_v": 1.5 * D**-0.5, "c_proj": 1.2 * D**-0.5,
        "c_fc": D**-0.5, "mlp_proj": 0.5 * D**-0.5, "value_embeds": 1.0, "value_gate": 0.4, "smear_gate": 0.5,
        "resid_lambdas": 0.2, "x0_lambdas": 0.6, "smear_lambda": 0.1, "backout_lambda": 0.1,
    }  # fmt: skip
    params = draw_params(config, speedrun.nanochat_weights(config), scales, seed)
    middles = {"resid_lambdas": 1.0, "smear_lambda": 0.8, "backout_lambda": -0.5}
    return params | {name: np.float32(params[name] + value) for name, value in middles.items() if name in params}


@functools.cache
def compiled_forward(config):
    return jax.jit(functools.partial(train.forward, config, model=speedrun.NANOCHAT))


@functools.cache
def compiled_loss(config):
    """A jitted (params, batch) -> (cross_entropy, its gradients)."""

    def loss(params, batch):
        params = cast_weights(speedrun.nanochat_weights(config), params, config.dtype)
        return train.cross_entropy(config, speedrun.NANOCHAT, params, batch)

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def batch():
    """x, y: (B, T) each."""
    tokens = random_tokens(SMALL, B, T + 1)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


# ----------------------------------------------------------------------------------------------------------------------
# Logits and gradients


@pytest.mark.parametrize(
    "fields", [{}, {"attn_impl": "jax", "depth": 6}, {"depth": 7, "n_kv_head": 1, "window_pattern": "SL"}], ids=str
)
def test_forward_equals_a_float64_model(fields):
    """Logits equal the float64 model to 5e-6 of the largest: an odd and an even number of layers, grouped heads."""
    config = replace(**fields)
    params, tokens = random_params(config), random_tokens(config, B, T)
    want = nanochat_logits(widen(params), tokens, CONTEXT, config.window_pattern)
    logits = compiled_forward(config)(params, tokens)
    assert logits.shape == (B, T, 31) and logits.dtype == jnp.float32
    assert np.abs(want).max() > 0.6 * 15  # the cap bends what is compared
    assert distance(logits, want) < 5e-6


@pytest.fixture(scope="module")
def loss_and_grads(batch):
    return jax.device_get(compiled_loss(SMALL)(random_params(SMALL), batch))


@pytest.mark.slow
def test_gradients_are_those_of_the_float64_loss(batch, loss_and_grads):
    """Every array's gradient, in two random directions, is the central difference of the float64 loss to 1e-4."""
    (loss, grads), wide, rng, step = loss_and_grads, widen(random_params(SMALL)), np.random.default_rng(5), 1e-5
    reference = lambda: losses_of_logits(nanochat_logits(wide, batch["x"], CONTEXT), batch["y"]).mean()
    assert float(loss) == pytest.approx(reference(), abs=2e-5)
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wide), strict=True)
    for (path, grad), leaf in leaves:
        for _ in range(2):
            direction, kept, ends = rng.normal(size=leaf.shape), leaf.copy(), []
            for sign in (1, -1):
                leaf[...] = kept + sign * step * direction  # in place: it is an array of `wide`
                ends.append(reference())
            leaf[...] = kept
            slope, size = (ends[0] - ends[1]) / (2 * step), float(np.linalg.norm(grad))
            assert size > 1e-4, f"{path} is silent"
            assert np.sum(grad * direction) == pytest.approx(slope, abs=1e-4 * size), path


def test_the_gradient_is_that_of_the_other_attention(batch, loss_and_grads):
    """einsum and jax give the same loss and gradients to 1e-5 of each array's largest."""
    loss, grads = jax.device_get(compiled_loss(replace(attn_impl="jax"))(random_params(SMALL), batch))
    assert loss == pytest.approx(float(loss_and_grads[0]), rel=1e-6)
    assert distance(grads, loss_and_grads[1]) < 1e-5


@pytest.mark.slow
def test_the_kernels_take_windows_and_scale_as_they_are():
    """pallas on 256 tokens: 129 keys, scores times 1.44 / sqrt(128); loss and gradients are einsum's."""
    fields = dict(depth=2, n_embd=256, head_dim=128, n_kv_head=1, seq_len=256, backout=False)
    configs = [replace(attn_impl=impl, **fields) for impl in ("einsum", "pallas")]
    assert configs[1].windows == (129, 256) and configs[1].score_scale == pytest.approx(1.44 / math.sqrt(128))
    params, tokens = random_params(configs[0]), random_tokens(configs[0], 1, 257)
    batch = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
    results = [jax.device_get(compiled_loss(config)(params, batch)) for config in configs]
    assert results[1][0] == pytest.approx(float(results[0][0]), rel=1e-6)
    assert distance(results[1][1], results[0][1]) < 2e-5


@pytest.mark.slow
def test_bfloat16_stays_near_float32(batch, loss_and_grads):
    """8 bits: the loss is within 1 % of float32's, every gradient, kept in float32, within 10 %."""
    loss, grads = jax.device_get(compiled_loss(replace(dtype="bfloat16"))(random_params(SMALL), batch))
    assert loss != loss_and_grads[0] and loss == pytest.approx(float(loss_and_grads[0]), rel=0.01)
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(loss_and_grads[1]), strict=True)
    for (path, half), grad in leaves:
        assert half.dtype == np.float32 and np.linalg.norm(half - grad) < 0.1 * np.linalg.norm(grad), path


def test_no_token_sees_a_later_one():
    """Another token at 140 changes no logit before it, to the last bit, and the one at it and the next."""
    params, tokens = random_params(SMALL), random_tokens(SMALL, B, T)
    other = tokens.copy()
    other[:, 140] = (other[:, 140] + 1) % 31
    before, after = (np.asarray(compiled_forward(SMALL)(params, ids)) for ids in (tokens, other))
    np.testing.assert_array_equal(before[:, :140], after[:, :140])
    assert (before[:, 140:142] != after[:, 140:142]).any(axis=(0, 2)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Parts that can be switched off

PARTS = {
    "value_embeds": ("value_embeds", "value_gate"),
    "smear": ("smear_gate", "smear_lambda"),
    "backout": ("backout_lambda",),
    "lambdas": ("resid_lambdas", "x0_lambdas"),
}


def without(params, names):
    """Parameters without those of these names, in layers too."""
    kept = lambda arrays: {name: value for name, value in arrays.items() if name not in names}
    return kept(params) | {"layers": [kept(layer) for layer in params["layers"]]}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_off_has_no_weights_and_no_effect(part):
    """Its weights are gone, and only they; logits are those of the float64 model without it, and others than with."""
    config, params, tokens = replace(**{part: False}), random_params(SMALL), random_tokens(SMALL, B, T)
    left, wide = without(params, PARTS[part]), widen(params)
    names = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    assert names(weight_shapes(config, speedrun.nanochat_weights(config))) == names(left) != names(params)
    want = nanochat_logits(without(wide, PARTS[part]), tokens, CONTEXT)
    assert np.abs(want - nanochat_logits(wide, tokens, CONTEXT)).max() > 1
    assert distance(compiled_forward(config)(left, tokens), want) < 5e-6


def test_sharper_attention_can_be_switched_off():
    """qk_scale 1: the float64 model with queries and keys as they are normed."""
    config, params, tokens = replace(qk_scale=1.0), random_params(SMALL), random_tokens(SMALL, B, T)
    want = nanochat_logits(widen(params), tokens, CONTEXT, sharpness=1.0)
    assert np.abs(want - nanochat_logits(widen(params), tokens, CONTEXT)).max() > 1
    assert distance(compiled_forward(config)(params, tokens), want) < 5e-6


def test_windows_are_a_quarter_of_the_context_and_the_query():
    """In whole 128s, rounded up, plus one key; never more than the context; the last layer sees all of it."""
    windows = lambda **fields: replace(**fields).windows
    assert windows(depth=9, seq_len=2048) == (513, 513, 513, 2048, 513, 513, 513, 2048, 2048)
    assert windows(depth=3, seq_len=2049, window_pattern="SL") == (641, 2049, 2049)
    assert windows(depth=2, seq_len=513) == (257, 513) and windows(depth=2, seq_len=512) == (129, 512)
    assert windows(depth=2, seq_len=128) == (128, 128) and windows(depth=2, seq_len=130) == (129, 130)
    assert windows(depth=1, seq_len=512) == (512,)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


PROMPT_SEEDS = {1: 7, 3: 7, 16: 3, 17: 4, 141: 1}  # by length; those that lead to many different tokens


@functools.cache
def sampler():
    return train.make_sampler(SMALL, 9, model=speedrun.NANOCHAT)


@pytest.mark.parametrize("length", PROMPT_SEEDS)
def test_it_samples_with_a_cache_as_without(length):
    """Greedily, token for token, what the float64 model says of the whole text.

    Also where the prompt is padded: the first new token is smeared with the prompt's last one.
    """
    params, prompt = random_params(SMALL), random_tokens(SMALL, 1, length, PROMPT_SEEDS[length])[0].tolist()
    written = train.generate(SMALL, params, prompt, 9, model=speedrun.NANOCHAT, sampler=sampler())
    logits = nanochat_logits(widen(params), np.array([prompt + written]), CONTEXT)
    assert len(set(written)) > 6  # a model stuck on one token would agree with anything
    assert logits[0, length - 1 : -1].argmax(axis=-1).tolist() == written


@pytest.mark.parametrize("pieces", [(1, 135, 1, 13), (140, 10)], ids=str)
def test_a_cache_gives_what_the_whole_pass_gives(pieces):
    """Hidden states of three texts, piece by piece across the window's end, are those of one pass."""
    params, tokens = random_params(SMALL), random_tokens(SMALL, B, T)
    run = jax.jit(functools.partial(train.backbone, SMALL, speedrun.NANOCHAT))
    want, _ = run(params, tokens)
    cache, parts, seen = train.empty_cache(SMALL, B, CONTEXT), [], 0
    for size in pieces:
        hidden, cache = run(params, tokens[:, seen : seen + size], cache)
        parts.append(hidden)
        seen += size
    assert distance(np.concatenate(parts, axis=1), np.asarray(want)) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# First values and counts


@pytest.fixture(scope="module")
def first():
    """(config, its initial parameters) with enough words for statistics."""
    config = replace(vocab_size=997)
    state = train.new_state(config, speedrun.NANOCHAT, train.ADAMW, jax.random.key(7))
    return config, jax.device_get(state["params"])


def test_weights_start_as_nanochats(first):
    """Normal tables, uniform inputs with deviation 1 / sqrt(n_embd), the MLP's 0.4 of it, outputs 0, gates just above.

    Value embeddings start as c_v does, whatever their own number of rows.
    """
    config, params = first
    for name, deviation in (("wte", 0.8), ("lm_head", 0.001)):
        values = params[name] / deviation
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
        assert 0.66 < (np.abs(values) < 1).mean() < 0.70  # of a normal distribution, 68.3 %
    seen = []
    for layer in params["layers"]:
        assert not layer["c_proj"].any() and not layer["mlp_proj"].any()
        scales = {"c_q": 1.0, "c_k": 1.0, "c_v": 1.0, "c_fc": 0.4, "value_embeds": 1.0}
        for name, scale in scales.items():
            if name in layer:
                values = layer[name] / (scale * 40**-0.5)
                assert abs(values.mean()) < 0.08 and values.std() == pytest.approx(1, rel=0.05)
                assert 0.97 * math.sqrt(3) < np.abs(values).max() <= math.sqrt(3) * 1.000001
                seen.append(values.ravel()[:3].tolist())
    assert len(set(map(tuple, seen))) == len(seen) == 5 * 4 + 3  # no two of them drawn with the same key
    gates = [params["smear_gate"], *(layer["value_gate"].ravel() for layer in params["layers"][::2])]
    assert [gate.size for gate in gates] == [24, 24, 24, 24]
    for gate in gates:
        assert 0 <= gate.min() < 0.004 and 0.016 < gate.max() <= 0.02 and 0.006 < gate.mean() < 0.014
    assert len({gate.tobytes() for gate in gates}) == 4


def test_fc_init_scales_the_mlps_first_matrix_and_nothing_else(first):
    """1 instead of 0.4: the same draws, 2.5 times as large."""
    config, params = first
    other = train.new_state(dataclasses.replace(config, fc_init=1.0), speedrun.NANOCHAT, train.ADAMW, jax.random.key(7))
    for layer in other["params"]["layers"]:
        layer["c_fc"] *= 0.4
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), other["params"], params)


def test_every_other_layer_has_value_embeddings_the_last_one_always():
    """With their gates, whatever the number of layers."""
    for depth, want in ((1, [0]), (2, [1]), (5, [0, 2, 4]), (6, [1, 3, 5])):
        layers = speedrun.nanochat_weights(replace(depth=depth))["layers"]
        for name in ("value_embeds", "value_gate"):
            assert [i for i, layer in enumerate(layers) if name in layer] == want


def test_scalars_start_as_nanochats(first):
    """Two falling lines over the layers, no smear, a fifth of the middle layer taken out.

    A single layer has the beginning of each line.
    """
    params = first[1]
    np.testing.assert_allclose(params["resid_lambdas"], [1.15, 1.125, 1.1, 1.075, 1.05], rtol=1e-6)
    np.testing.assert_allclose(params["x0_lambdas"], [0.2, 0.1625, 0.125, 0.0875, 0.05], rtol=1e-6)
    assert params["smear_lambda"] == 0 and params["backout_lambda"] == np.float32(0.2)
    one = jax.tree.map(lambda w: w.init, speedrun.nanochat_weights(replace(depth=1)))
    assert [one[name](None, (1,), 1).tolist() for name in ("resid_lambdas", "x0_lambdas")] == [
        [np.float32(1.15)], [np.float32(0.2)],
    ]  # fmt: skip


def test_the_first_loss_is_that_of_no_opinion(first):
    """log(V) to 0.01."""
    config, params = first
    tokens = random_tokens(config, B, T + 1)
    loss, _ = compiled_loss(config)(params, {"x": tokens[:, :-1], "y": tokens[:, 1:]})
    assert float(loss) == pytest.approx(math.log(997), abs=0.01)


def test_embeddings_are_most_of_the_parameters_and_none_of_the_work():
    """Depth 12: 151M of value embeddings, 85M in the blocks; FLOPs are of matrices, gates and the keys of windows."""
    config, off = speedrun.Config(), speedrun.Config(value_embeds=False)
    counts, fewer = (train.count_params(c, speedrun.NANOCHAT) for c in (config, off))
    D, V, L = 768, 32768, 12
    assert counts["embed"] - fewer["embed"] == 6 * V * D == 150_994_944 and fewer["embed"] == V * D
    gates = 6 * 12 * 6 + 24
    assert counts["attention"] + counts["mlp"] == 12 * D * D * L + gates and counts["lm_head"] == V * D
    assert counts["scalar"] == 2 * L + 2 and counts["total"] == 286_261_730
    assert config.scaling_params == 12 * D * D * L + gates - 24 + V * D == 110_100_912
    keys = 9 * (513 * 514 / 2 + (2048 - 513) * 513) / 2048 + 3 * 2049 / 2
    work = 6 * (config.scaling_params + 24) + 12 * D * keys
    assert train.flops_per_token(config, speedrun.NANOCHAT) == pytest.approx(work, rel=1e-12)
    assert speedrun.window_flops(config) == 6 * (config.scaling_params + 24) + 12 * D * (9 * 512 + 3 * 2048)
    assert speedrun.window_flops(off) == speedrun.window_flops(config) - 6 * 6 * 12 * 6


@pytest.mark.parametrize("fields", [{}, {"smear": False}, {"value_embeds": False}, {"n_kv_head": 4}, {"depth": 8}])
def test_n_is_what_the_table_counts(fields):
    """Everything in the blocks and lm_head, without the smear's gate, in the reference's count and the table's."""
    config = replace(**fields)
    counts = train.count_params(config, speedrun.NANOCHAT)
    matrices = counts["attention"] + counts["mlp"] + counts["lm_head"] - (24 if config.smear else 0)
    gated = None if config.value_embeds else 0
    sizes = (config.depth, 40, 10 * config.n_kv_head, config.n_kv_head, 31)
    assert config.scaling_params == matrices == scaling_params_reference(*sizes, gated)


# ----------------------------------------------------------------------------------------------------------------------
# The dial

BATCHES = {  # log2 of the tokens of a step, as nanochat's dial has them
    **{8: 18}, **dict.fromkeys(range(10, 17, 2), 19), **dict.fromkeys(range(18, 27, 2), 20),
    **dict.fromkeys(range(32, 51, 2), 21),
}  # fmt: skip


@pytest.mark.parametrize("depth", BATCHES)
def test_depth_decides_width_batch_and_steps(depth):
    """64 channels a layer in whole heads; nanochat's batches; 12 tokens a parameter, no step too many."""
    config = speedrun.Config(depth=depth)
    heads = math.ceil(64 * depth / 128)
    assert (config.n_layer, config.n_head, config.n_embd, config.n_kv_head) == (depth, heads, 128 * heads, heads)
    assert config.total_batch_size * 2048 == 2 ** BATCHES[depth]
    tokens = 12 * scaling_params_reference(depth, 128 * heads, 128 * heads, heads, 32768)
    assert config.num_iterations == tokens // 2 ** BATCHES[depth]


def test_the_reference_run():
    """Depth 12: N 110M, 2,520 steps of 2^19 tokens, 1.32B tokens in all."""
    config = speedrun.Config()
    assert (config.depth, config.total_batch_size, config.num_iterations) == (12, 256, 2520)
    assert config.num_iterations * 2**19 / config.scaling_params == pytest.approx(12, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.5, 8, 10.5, 20])
def test_the_ratio_sets_the_steps_and_nothing_else(ratio):
    """The batch follows depth alone: its tokens are compared with the reference's at the same ratio."""
    config, usual = speedrun.Config(depth=20, ratio=ratio), speedrun.Config(depth=20)
    assert config.num_iterations == int(ratio * config.scaling_params) // 2**20
    assert dataclasses.replace(config, ratio=12.0, num_iterations=usual.num_iterations) == usual


def test_flops_or_steps_that_are_given_win_over_the_ratio():
    """target_flops before ratio, num_iterations before both; the batch stays that of the depth."""
    config = speedrun.Config(target_flops=1e18)
    per_token = 6 * (110_100_912 + 24) + 12 * 768 * (9 * 512 + 3 * 2048)
    assert config.num_iterations == round(1e18 / (per_token * 2**19)) and config.total_batch_size == 256
    both = speedrun.Config(target_flops=1e18, num_iterations=77)
    assert (both.num_iterations, both.total_batch_size) == (77, 256)
    assert speedrun.Config(target_flops=1.0).num_iterations == 1


def test_a_field_that_is_set_wins_and_what_follows_it_follows():
    """Width sets heads, N and steps; a batch sets the steps; another context keeps the tokens of a step."""
    wide = speedrun.Config(n_embd=1024)
    assert (wide.n_layer, wide.n_head, wide.n_kv_head) == (12, 8, 8)
    assert wide.num_iterations == int(12 * wide.scaling_params) // (wide.total_batch_size * 2048)
    half = speedrun.Config(total_batch_size=128)
    assert half.num_iterations == int(12 * 110_100_912) // 2**18
    short = speedrun.Config(seq_len=512)
    assert (short.total_batch_size, short.num_iterations) == (1024, 2520)
    assert speedrun.Config(head_dim=64, attn_impl="jax").n_kv_head == 12
    assert speedrun.Config(n_kv_head=2).scaling_params < speedrun.Config().scaling_params
    assert speedrun.Config(depth=1, device_batch_size=3, total_batch_size=0).total_batch_size % 3 == 0
    assert speedrun.Config(depth=1, seq_len=1 << 12, device_batch_size=512).total_batch_size == 512


def test_a_config_made_again_is_the_same():
    """From its own fields, as open_model does, and by dataclasses.replace: what was derived stays as it was."""
    config = WITH_MUON(depth=6, ratio=8, target_flops=3e17)
    assert WITH_MUON(**dataclasses.asdict(config)) == config == dataclasses.replace(config)
    again = dataclasses.replace(config, matrix_lr=0.03)
    assert again != config and dataclasses.replace(again, matrix_lr=0.02) == config
    assert dataclasses.replace(config, depth=7).n_embd == config.n_embd
    turned = dataclasses.replace(config, depth=7, n_embd=0, n_kv_head=0, total_batch_size=0, num_iterations=0)
    assert turned == WITH_MUON(depth=7, ratio=8, target_flops=3e17)


def test_smaller_models_turn_the_dial_and_keep_what_was_set():
    """Nearest first, down to depth 1; each is what the dial gives, but for the fields that the user set."""
    for fields in ({}, {"total_batch_size": 32}, {"num_iterations": 99, "n_embd": 512}, {"ratio": 3.0}):
        smaller = list(speedrun.Config(depth=6, **fields).smaller_models())
        assert smaller == [speedrun.Config(depth=depth, **fields) for depth in range(5, 0, -1)]


def test_all_that_the_dial_decided_is_printed():
    """Each derived field and rate, and what the dial would have said of a field that was set."""
    config = WITH_MUON(depth=8, total_batch_size=32, learning_rate=3.0, x0_lr=0.5 / 3)
    lines = speedrun.describe_dial(config, speedrun.nanochat_weights(config)).splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert f"{config.num_iterations:,}" in rows["num_iterations"] and "by depth" not in rows["num_iterations"]
    assert "512" in rows["n_embd"] and "32" in rows["total_batch_size"] and "by depth: 128" in rows["total_batch_size"]
    for name in ("matrix_lr", "lm_head_lr", "embed_lr", "value_embed_lr", "resid_lr"):  # printed to three digits
        rate, own = rows[name].split()[1], rows[name].split()[-1]
        assert "by depth:" in rows[name] and float(rate) == pytest.approx(3 * float(own), rel=0.01)
    assert rows["x0_lr"].split() == ["x0_lr", "0.177"]  # three times a third of what the dial has
    assert rows["gate_lr"].split() == ["gate_lr", "0.2"] and "weight_decay" in rows


REFUSED = [
    ({"depth": 0}, "depth=0", "must lie in [1, 256]"),
    ({"depth": -3}, "depth=-3", "must lie in [1, 256]"),
    ({"depth": 257}, "depth=257", "must lie in [1, 256]"),
    ({"ratio": 0}, "ratio=0", "must lie in (0, 1000000.0]"),
    ({"ratio": -1.0}, "ratio=-1.0", "must lie in (0, 1000000.0]"),
    ({"n_embd": 100}, "n_embd=100", "multiple of head_dim=128"),
    ({"n_embd": 16, "head_dim": 8, "attn_impl": "jax"}, "n_embd=16", "the gates read 24 channels"),
    ({"n_embd": 8, "head_dim": 8, "attn_impl": "jax", "smear": False}, "n_embd=8", "the gates read 12 channels"),
    ({"n_embd": -128}, "n_embd=-128", "negative"),
    ({"n_kv_head": 4}, "n_kv_head=4", "must divide n_head=6"),
    ({"head_dim": 33, "attn_impl": "jax"}, "head_dim=33", "even"),
    ({"total_batch_size": 63}, "total_batch_size=63", "multiple of device_batch_size=2"),
    ({"target_flops": -1.0}, "target_flops=-1.0", "must lie in [0"),
    ({"qk_scale": 0.0}, "qk_scale=0.0", "must lie in (0, 2]"),
    ({"window_pattern": ""}, "window_pattern=''", "S and L"),
    ({"window_pattern": "SXL"}, "window_pattern='SXL'", "S and L"),
    ({"ratio": 1e6, "depth": 200}, "num_iterations=", "32 bits"),
]


@pytest.mark.parametrize("fields, value, remedy", REFUSED, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_config_refuses_what_cannot_run(fields, value, remedy):
    """A mistake is one line with the field, its value and what would be right."""
    with pytest.raises(UserError) as refusal:
        speedrun.Config(**fields)
    said = str(refusal.value)
    assert is_one_line(said) and said.startswith(value) and remedy in said


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def test_a_depth_that_does_not_fit_is_answered_with_the_nearest_that_does(monkeypatch):
    """One line: what it needs, and the dial turned to the nearest depth that fits; the next one needs too much."""
    config = WITH_MUON(
        depth=7, head_dim=16, vocab_size=61, seq_len=32, attn_impl="einsum", dtype="float32", device_batch_size=1,
        loss_slice=32,
    )  # fmt: skip
    work = train.workload(train.make_mesh(jax.local_devices()[:1]), speedrun.NANOCHAT, speedrun.MUON)
    compiled = []
    work = work._replace(lower=lambda config: compiled.append(config.depth) or train.lower_step(
        config, work.mesh, speedrun.NANOCHAT, speedrun.MUON
    ))  # fmt: skip
    smaller = list(config.smaller_models())
    needs = {c.depth: fit.least_bytes(c, work.count(c)) for c in (config, *smaller)}
    monkeypatch.setattr(fit, "memory_limit", lambda device: needs[3] - 1)
    with pytest.raises(fit.DoesNotFit) as refusal:
        fit.require_fit(work, config)
    said = str(refusal.value)
    found = next(c for c in smaller if f"depth={c.depth}," in said)
    assert is_one_line(said) and said.startswith("device_batch_size=1: a step needs at least ")
    assert found.depth <= 2 and found == WITH_MUON(**{**as_set(config), "depth": found.depth})
    changed = [name for name in ("n_embd", "n_kv_head", "num_iterations") if f"{name}={getattr(found, name)}" in said]
    assert changed == ["n_embd", "n_kv_head", "num_iterations"] and "fits, with" in said
    assert 3 not in compiled and 7 not in compiled  # by arithmetic alone


def as_set(config):
    """The fields of a config, with 0 for what follows its depth."""
    return dataclasses.asdict(config) | dict.fromkeys(speedrun.DIALED, 0)


# ----------------------------------------------------------------------------------------------------------------------
# With either optimizer


@pytest.fixture
def script(monkeypatch):
    """choose_parts as a script without flags calls it, whatever pytest was started with."""
    monkeypatch.setattr(sys, "argv", ["script"])
    return train.choose_parts


def test_an_optimizer_brings_its_own_settings(script):
    """05 with AdamW has AdamW's rate and no fields of Muon's; 02 and 04 with Muon have Muon's rate and fields."""
    muons = speedrun.MUON.presets["laptop"]["learning_rate"]
    _, config, optimizer = script(speedrun.NANOCHAT, "--preset laptop", optimizer=speedrun.MUON)
    assert optimizer is speedrun.MUON and (config.learning_rate, config.matrix_lr, config.beta1) == (muons, 0.02, 0.97)
    assert (config.depth, config.head_dim, config.total_batch_size, config.seq_len) == (4, 64, 8, 256)
    words = "--preset laptop --optimizer adamw"
    _, config, optimizer = script(speedrun.NANOCHAT, words, optimizer=speedrun.MUON)
    assert optimizer is train.ADAMW and type(config) is speedrun.Config and not hasattr(config, "matrix_lr")
    assert (config.learning_rate, config.weight_decay, config.beta1, config.eps) == (3e-3, 0.1, 0.9, 1e-8)
    for model in (train.GPT, importlib.import_module("04_maxtext").SWIGLU):
        _, config, optimizer = script(model, "--preset laptop --optimizer muon --gate_lr 0.3")
        assert optimizer is speedrun.MUON and isinstance(config, model.config)
        assert (config.learning_rate, config.matrix_lr, config.gate_lr, config.eps) == (muons, 0.02, 0.3, 1e-10)
        _, config, optimizer = script(model, "--preset laptop")
        assert optimizer is train.ADAMW and type(config) is model.config and config.learning_rate == 3e-3


def test_what_the_user_sets_wins_over_preset_and_dial(script):
    """Rates, batch and width, on top of what depth and preset say."""
    words = "--preset laptop --depth 3 --learning_rate 2 --total_batch_size 16 --n_embd 320"
    _, config, _ = script(speedrun.NANOCHAT, words, optimizer=speedrun.MUON)
    assert (config.depth, config.learning_rate, config.total_batch_size, config.n_embd) == (3, 2.0, 16, 320)
    _, config, _ = script(train.GPT, "--preset laptop --optimizer muon --learning_rate 3")
    assert config.learning_rate == 3


def test_the_day_is_depth_24_on_packed_climbmix(script):
    """5.84 billion tokens at 2^20 a step, embeddings stored in bfloat16, and shards for what packing leaves of them."""
    run, config, _ = script(speedrun.NANOCHAT, "--preset day --preflight v6e:1x1", optimizer=speedrun.MUON)
    assert (run.data, config.packing, config.embed_dtype, config.depth) == ("climbmix", "best-fit", "bfloat16", 24)
    assert config.total_batch_size * config.seq_len == 2**20 and count_tokens(config) == pytest.approx(5.84e9, rel=2e-3)
    assert run.num_shards * 30e6 >= count_tokens(config) > (run.num_shards - 1) * 30e6
    assert script(speedrun.NANOCHAT, "--preset day --data offline", optimizer=speedrun.MUON)[0].data == "offline"


def test_the_preset_for_328_has_the_published_size_and_tokens(script):
    """124M parameters without lm_head, GPT-2's vocabulary, the tokens of 3,250 steps of 524,288, in three stages."""
    run, config, _ = script(speedrun.NANOCHAT, "--preset 3.28 --preflight v6e:1x1", optimizer=speedrun.MUON)
    counts = train.count_params(config, speedrun.NANOCHAT)
    assert counts["total"] - counts["lm_head"] == pytest.approx(124e6, rel=5e-3)
    assert (run.data, config.vocab_size, config.seq_len) == ("fineweb10b", 50257, 1024)
    assert count_tokens(config) == 3250 * 2**19 and run.num_shards == 18
    stages = [(c.total_batch_size, c.seq_len, c.device_batch_size * c.seq_len) for _, c in stages_of(config)]
    assert stages == [(256, 512, 4096), (256, 1024, 4096), (512, 1024, 4096)]


def test_a_wrong_optimizer_or_anothers_setting_is_refused(script):
    """One line with the names there are; a rate of Muon's is unknown to AdamW."""
    for model in (train.GPT, speedrun.NANOCHAT):
        with pytest.raises(UserError, match=r"^optimizer='sgd': use adamw or muon$"):
            script(model, "--preset laptop --optimizer sgd")
    with pytest.raises(UserError, match="unknown setting '--matrix_lr'") as refusal:
        script(speedrun.NANOCHAT, "--preset laptop --optimizer adamw --matrix_lr 0.01", optimizer=speedrun.MUON)
    assert is_one_line(refusal.value)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def recipe(**changes):
    """05's model and optimizer on the small corpus: S layers of 24 tokens see all, so that only sizes are small."""
    fields = {k: v for k, v in TINY_RUN.items() if k not in ("n_head", "aspect_ratio")}
    fields |= dict(depth=3, n_embd=32, learning_rate=30.0, warmup_steps=3, save_every=5, eval_every=9)
    return WITH_MUON(**fields | changes)


OPTIONS = {"model": speedrun.NANOCHAT, "optimizer": speedrun.MUON}


@pytest.fixture(scope="module")
def whole(corpus, tokenizer, tmp_path_factory, compiled_once):
    """The Result of 26 steps of the recipe, left alone."""
    return train_tiny(corpus, tokenizer, tmp_path_factory.mktemp("runs") / "whole", config=recipe(), **OPTIONS)


@pytest.mark.usefixtures("compiled_once", "interruptible")
@pytest.mark.slow
def test_the_recipe_trains_and_resumes_to_the_last_bit(whole, corpus, tokenizer, tmp_path):
    """It learns; interrupted in the warm-down, it ends with the same bits in every array, and the same metrics."""

    def stop(row):
        if row["step"] == 12:
            raise KeyboardInterrupt

    cut = train_tiny(corpus, tokenizer, tmp_path / "cut", config=recipe(), on_log=stop, **OPTIONS)
    again = train_tiny(corpus, tokenizer, tmp_path / "cut", config=recipe(), **OPTIONS)
    assert 12 <= cut.step < 26 == again.step == whole.step and whole.val_loss < math.log(300) - 0.7
    assert read_rows(whole.run_dir) == read_rows(again.run_dir)
    for name in ("params.safetensors", "opt.safetensors"):
        assert (newest(whole.run_dir) / name).read_bytes() == (newest(again.run_dir) / name).read_bytes()


def test_a_run_of_05_opens_by_the_names_in_its_config(whole):
    """open_model finds model and settings from the run's folder alone; parameters are the run's, to the last bit."""
    opened = train.open_model(whole.run_dir)
    assert opened.model is speedrun.NANOCHAT and opened.config == recipe() and type(opened.config) is WITH_MUON
    jax.tree.map(np.testing.assert_array_equal, opened.params, whole.params)
    exported = train.open_model(train.export_model(whole, opened.tokenizer))
    assert exported.config == recipe()
    [(prompt, text)] = train.make_sample_writer(exported.config, exported.tokenizer, ["the"], exported.model)(
        exported.params
    )
    assert prompt == "the" and text


@pytest.fixture(scope="module")
def gpt_with_muon(corpus, tokenizer, tmp_path_factory, compiled_once):
    """(config, Result) of three steps of 02's model with 05's optimizer."""
    config = config_with(train.Config, speedrun.MuonSettings)(**TINY_RUN | {"num_iterations": 3, "learning_rate": 9.0})
    run_dir = tmp_path_factory.mktemp("runs") / "gpt"
    return config, train_tiny(corpus, tokenizer, run_dir, config=config, optimizer=speedrun.MUON)


@pytest.mark.slow
def test_02s_model_trained_with_muon_opens(gpt_with_muon):
    """Its config.json names an optimizer of another notebook, whose settings are fields of the run's."""
    config, result = gpt_with_muon
    opened = train.open_model(result.run_dir)
    assert opened.model is train.GPT and opened.config == config and opened.config.matrix_lr == 0.02
    jax.tree.map(np.testing.assert_array_equal, opened.params, result.params)


@pytest.mark.usefixtures("compiled_once", "interruptible")
@pytest.mark.slow
def test_another_optimizer_does_not_resume_a_run(whole, gpt_with_muon, corpus, tokenizer, tmp_path):
    """One line with both names, of 05's run and of 02's; the folder stays as it was, and trains on with its own."""
    adamw = speedrun.Config(**{f.name: getattr(recipe(), f.name) for f in dataclasses.fields(speedrun.Config)})
    with_muon, with_adamw = gpt_with_muon[1].run_dir, train_tiny(corpus, tokenizer, tmp_path).run_dir
    cases = [
        (whole.run_dir, adamw, {"model": speedrun.NANOCHAT}, "adamw", "05_speedrun.MUON"),
        (with_muon, tiny(), {}, "adamw", "05_speedrun.MUON"),
        (with_adamw, gpt_with_muon[0], {"optimizer": speedrun.MUON}, "05_speedrun.MUON", "adamw"),
    ]
    for folder, config, options, now, before in cases:
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UserError) as refusal:
            train_tiny(corpus, tokenizer, folder, config=config, **options)
        said = str(refusal.value)
        assert is_one_line(said) and said.startswith(f"optimizer='{now}': ") and f"'{before}'; use that" in said
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
    assert train_tiny(corpus, tokenizer, whole.run_dir, config=recipe(), **OPTIONS).step == 26
    assert list_checkpoints(whole.run_dir)[-1] == "step_00000026"


def test_a_depth_that_does_not_go_with_what_was_set_is_passed_over():
    """Three key/value heads divide the heads of depths 9, 6 and 3 only."""
    config = speedrun.Config(depth=12, n_kv_head=3, head_dim=64, attn_impl="jax")
    assert [smaller.depth for smaller in config.smaller_models()] == [9, 6, 3]


def test_scores_that_would_overflow_are_refused():
    """The TPU kernels subtract no maximum: 512 channels with queries and keys times 2 could reach exp(90)."""
    with pytest.raises(UserError, match="head_dim . score_scale"):
        speedrun.Config(head_dim=512, qk_scale=2.0, seq_len=1024)
    assert speedrun.Config(head_dim=512, qk_scale=2.0, seq_len=1024, attn_impl="splash").head_dim == 512


def test_a_warm_up_in_steps_leaves_the_whole_run_to_the_warm_down():
    """warmup_ratio counts for nothing where warmup_steps is set."""
    assert speedrun.Config(warmdown_ratio=1.0).warmdown_ratio == 1.0
