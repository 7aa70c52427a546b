"""02's Config, its four attentions, the transformer, its table of weights, counts and loss, against float64 NumPy.

Sizes differ in every dimension, so that a swapped axis cannot pass. The references are in support/reference.py.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import (  # noqa: F401  (fixtures, the second of them for every test)
    TINY,
    B,
    T,
    full_compiler,
    quick_compiler,
    random_batch,
    random_params,
    random_tokens,
    replace,
)
from reference import (
    attention_reference,
    distance,
    gpt_logits,
    losses_of_logits,
    raw_attention_reference,
    relative_rms,
    visible,
    widen,
    windows_reference,
)

from onechip.errors import UserError
from onechip.weights import cast_weights, weight_shapes

train = importlib.import_module("02_train")


# ----------------------------------------------------------------------------------------------------------------------
# Config

REFUSED = [
    (dict(n_head=0), "n_head=0", "positive"),
    (dict(n_head=-2), "n_head=-2", "positive"),
    (dict(n_kv_head=-1), "n_kv_head=-1", "negative"),
    (dict(n_kv_head=3), "n_kv_head=3", "must divide n_head=8"),
    (dict(n_kv_head=16), "n_kv_head=16", "must divide n_head=8"),
    (dict(head_dim=0), "head_dim=0", "positive"),
    (dict(head_dim=33, aspect_ratio=33), "head_dim=33", "even"),
    (dict(aspect_ratio=0), "aspect_ratio=0", "positive"),
    (dict(aspect_ratio=100), "1024", "multiple of aspect_ratio=100"),
    (dict(aspect_ratio=2048), "1024", "multiple of aspect_ratio=2048"),
    (dict(vocab_size=0), "vocab_size=0", "positive"),
    (dict(seq_len=0), "seq_len=0", "at least 2"),
    (dict(seq_len=1), "seq_len=1", "at least 2"),
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
    (dict(total_batch_size=10**12, device_batch_size=10**12), "total_batch_size=1000000000000", "32 bits"),
    (dict(n_head=10**9), "n_layer=2000000000", "at most 4096"),
    (dict(total_batch_size=63), "total_batch_size=63", "multiple of device_batch_size=2"),
    (dict(num_iterations=0), "num_iterations=0", "must be a positive integer"),
    (dict(num_iterations=2**31), "num_iterations=2147483648", "32 bits"),
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
    """A mistake is one line with the field, its value and what would be right, before anything is loaded."""
    with pytest.raises(UserError) as refusal:
        train.Config(**fields)
    message = str(refusal.value)
    assert "\n" not in message and value in message and remedy in message
    assert any(name in message for name in (*fields, "n_layer"))


def test_config_derives_sizes_and_windows():
    """n_head is the one knob; S is half the context, the pattern is tiled, and the last layer sees everything."""
    default = train.Config()
    assert (default.n_embd, default.n_layer, default.mlp_dim, default.n_kv_head) == (1024, 16, 4096, 8)
    assert default.windows == (1024, 1024, 1024, 2048) * 4
    assert (TINY.n_embd, TINY.n_layer, TINY.mlp_dim, TINY.n_kv_head) == (84, 3, 336, 2)
    assert TINY.sizes == {"D": 84, "N": 6, "K": 2, "H": 14, "F": 336, "L": 3, "V": 31}
    for pattern, want in (("S", (9, 9, 18)), ("LS", (18, 9, 18)), ("SLS", (9, 18, 18)), ("L", (18,) * 3)):
        assert replace(window_pattern=pattern).windows == want
    assert replace(seq_len=3, window_pattern="S").windows == (1, 1, 3)
    assert replace(n_kv_head=0).n_kv_head == 6


def test_config_is_static_to_jit():
    """A changed field compiles again, an equal config does not: a stale program would train the old model."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Weights and counts


def test_the_table_says_what_every_array_is():
    """Axes, inputs before the arrow, and kinds of GPT's weights; parameters have the table's structure and shapes."""
    table = train.gpt_weights(TINY)
    layer = {
        "c_q": ("D->NH", "attention"), "c_k": ("D->KH", "attention"), "c_v": ("D->KH", "attention"),
        "c_proj": ("NH->D", "attention"), "c_fc": ("D->F", "mlp"), "mlp_proj": ("F->D", "mlp"),
    }  # fmt: skip
    lambdas = dict.fromkeys(("resid_lambdas", "x0_lambdas"), ("L", "scalar"))
    want = {"wte": ("V->D", "embed"), "lm_head": ("D->V", "lm_head"), "layers": [layer] * 3, **lambdas}
    assert jax.tree.map(lambda weight: (weight.axes, weight.kind), table) == want
    shapes = jax.eval_shape(functools.partial(train.init_params, TINY), jax.random.key(0))
    assert shapes == weight_shapes(TINY, table)
    assert shapes["layers"][2]["c_q"].shape == (84, 6, 14) and shapes["layers"][2]["c_proj"].shape == (6, 14, 84)


WIDE = replace(vocab_size=997)


def test_initial_parameters_are_distributed_as_designed():
    """wte N(0, 1), lm_head N(0, 0.001), inputs uniform within sqrt(3 / n_embd), outputs 0, lambdas 1 and 0.1."""
    params = train.init_params(WIDE, jax.random.key(7))
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
    other = train.init_params(WIDE, jax.random.key(8))
    assert not np.array_equal(other["wte"], params["wte"])


def test_initial_parameters_are_those_of_earlier_runs():
    """Bit for bit what a seed gave before there was a table: two keys, then one a layer, split in four."""
    D, N, K, H, F = 84, 6, 2, 14, 336
    embed, head, *layers = jax.random.split(jax.random.key(42), 3 + 2)
    params = train.init_params(WIDE, jax.random.key(42))
    np.testing.assert_array_equal(params["wte"], jax.random.normal(embed, (997, D)))
    np.testing.assert_array_equal(params["lm_head"], 0.001 * jax.random.normal(head, (D, 997)))
    shapes = {"c_q": (D, N, H), "c_k": (D, K, H), "c_v": (D, K, H), "c_fc": (D, F)}
    for layer, key in zip(params["layers"], layers, strict=True):
        for (name, shape), one in zip(shapes.items(), jax.random.split(key, 4), strict=True):
            want = jax.random.uniform(one, shape, jnp.float32, -math.sqrt(3 / D), math.sqrt(3 / D))
            np.testing.assert_array_equal(layer[name], want, err_msg=name)


def test_count_params_counts_each_kind():
    """The default is the 268.4M model of the design, by its own dimensions; each kind has what its name says."""
    V, D, L = 32768, 1024, 16
    want = {"embed": V * D, "attention": 4 * D * D * L, "mlp": 8 * D * D * L, "lm_head": D * V, "scalar": 2 * L}
    assert train.count_params(train.Config()) == {**want, "total": 268_435_488}
    D, N, K, H, F, L, V = 84, 6, 2, 14, 336, 3, 31
    want = {"embed": V * D, "attention": L * (2 * D * N * H + 2 * D * K * H), "mlp": L * 2 * D * F, "lm_head": D * V}
    want["scalar"] = 2 * L
    assert train.count_params(TINY) == {**want, "total": sum(want.values())}
    assert train.count_params(TINY)["total"] == sum(leaf.size for leaf in jax.tree.leaves(random_params(TINY)))


@pytest.mark.parametrize("length, window", [(13, 1), (13, 5), (13, 13), (18, 9), (1, 1)])
def test_mean_keys_is_what_counting_gives(length, window):
    """Keys seen on average under causality and a window, counted pair by pair."""
    assert train.mean_keys(length, window) == pytest.approx(visible(length, window).sum() / length, rel=1e-12)


def test_flops_are_counted_multiplication_by_multiplication():
    """MFU rests on this: 2 FLOPs per multiply-add, three passes, and only the pairs that a query really sees."""
    D, N, K, H, F, V, length = 84, 6, 2, 14, 336, 31, 18
    macs = full = 0
    for window in windows_reference(TINY):
        per_token = D * N * H + 2 * D * K * H + N * H * D + 2 * D * F
        macs += length * per_token + visible(length, window).sum() * N * 2 * H  # q k and weights v
        full += length * per_token + length * length * N * 2 * H
    head = length * D * V
    assert train.flops_per_token(TINY) == pytest.approx(3 * 2 * (macs + head) / length, rel=1e-12)
    assert train.flops_per_token(TINY, full_attention=True) == pytest.approx(3 * 2 * (full + head) / length, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Attention

# (T, N, K, H): grouped, one head each, one for all; kernels work on blocks of 128 tokens, ours on 128 channels too.
# einsum takes 256 queries at a time, so one of its cases is longer than two blocks.
SMALL = {"GQA": (13, 6, 3, 10), "MHA": (11, 5, 5, 6), "MQA": (17, 7, 1, 4), "long": (521, 4, 2, 8)}
BLOCKS = {"GQA": (256, 6, 3, 10), "MHA": (384, 2, 2, 6), "MQA": (128, 5, 1, 14)}
LANES = {"GQA": (384, 6, 3, 128), "MHA": (512, 2, 2, 256), "MQA": (768, 3, 1, 128)}
WINDOWS = (1, 5, "half", "all")
SCALES = {"GQA": 1.44, "MHA": 1.0, "MQA": 0.6, "long": 1.2}  # of the scores, in units of 1 / sqrt(H)
BASE = 50.0
CASES = [
    *itertools.product(("einsum", "jax"), SMALL, WINDOWS),
    *(("splash", "GQA", window) for window in (1, 77, "half", "all")),
    *(("splash", *case) for case in (("MHA", 77), ("MHA", "all"), ("MQA", 1), ("MQA", "half"))),
    *(("pallas", "GQA", window) for window in (1, 77, 128, 129, "half", "all")),
    *(("pallas", *case) for case in (("MHA", "half"), ("MHA", "all"), ("MQA", 300), ("MQA", "all"))),
]
QUICK = [
    *itertools.product(("einsum", "jax"), ["GQA"], WINDOWS),
    *(("einsum", "MHA", 5), ("jax", "MQA", 5)),
    *(("einsum", "long", "half"), ("splash", "GQA", 77), ("pallas", "GQA", 129)),
]
slow_case = functools.partial(pytest.param, marks=[pytest.mark.slow, pytest.mark.colab])


def attention_case(impl, heads, window):
    """(q, k, v, an output gradient), window in keys; a batch of 2, or 3 where a head is small."""
    length, N, K, H = {"splash": BLOCKS, "pallas": LANES}.get(impl, SMALL)[heads]
    batch = 2 if N != 2 else 3
    rng = np.random.default_rng(3)
    q, k, v, g = (rng.normal(size=(batch, length, n, H)).astype(np.float32) for n in (N, K, K, N))
    return (1.5 * q, k, v, g), {"half": length // 2, "all": length}.get(window, window)


def rope_of(length, channels):
    """cos, sin (length, channels)."""
    shape = train.Config(
        n_head=2, head_dim=channels, aspect_ratio=channels, seq_len=length, attn_impl="einsum", rope_base=BASE
    )
    return train.rope_tables(shape)


def attend_by(impl, length, channels, window, factor=1.0):
    """The attention `impl` as the model calls it: a function of q, k and v as they leave their products.

    factor: of the scores, in units of 1 / sqrt(H).
    """
    rope = rope_of(length, channels)
    return lambda q, k, v: train.ATTENTIONS[impl](q, k, v, rope, window, factor * channels**-0.5)


def test_rope_at_is_a_piece_of_the_tables():
    """Positions 5 to 8 of the context, for a start that is known when the program runs."""
    pieces = jax.jit(lambda start: train.rope_at(TINY, start, 4))(5)
    for piece, table in zip(pieces, train.rope_tables(TINY), strict=True):
        assert table.shape == (18, 14) and table.dtype == np.float32
        np.testing.assert_array_equal(piece, table[5:9])


def test_the_attention_reference_is_differentiated_rightly():
    """The float64 reference's gradients are its central differences, so what is compared with them is right too."""
    (q, k, v, g), window = attention_case("einsum", "GQA", 5)
    _, grads = raw_attention_reference(q, k, v, window, BASE, g)
    rng, step = np.random.default_rng(4), 1e-6
    for i, grad in enumerate(grads):
        change = rng.normal(size=grad.shape)
        args = [np.float64(a) for a in (q, k, v)]
        ends = [[a + s * step * change if i == j else a for j, a in enumerate(args)] for s in (1, -1)]
        high, low = ((raw_attention_reference(*end, window, BASE)[0] * g).sum() for end in ends)
        assert (high - low) / (2 * step) == pytest.approx((grad * change).sum(), rel=1e-6)


def test_every_attention_has_its_cases_and_is_a_choice():
    """One that is added to the table is held to the reference, and attn_impl takes it, in --help's order too."""
    [field] = [field for field in dataclasses.fields(train.Config) if field.name == "attn_impl"]
    assert field.metadata["rule"].choices == tuple(train.ATTENTIONS)
    assert all(name in field.metadata["help"] for name in train.ATTENTIONS)
    assert {impl for impl, *_ in CASES} == {impl for impl, *_ in QUICK} == set(train.ATTENTIONS)
    assert set(QUICK) < set(CASES)


@pytest.mark.parametrize("impl, heads, window", [c if c in QUICK else slow_case(*c) for c in CASES])
def test_attention_equals_the_reference(impl, heads, window):
    """Four attentions are one function, to 2e-6 in value and 5e-6 in gradients, relative to each array's largest.

    Whatever the scale of the scores: 1 / sqrt(H), more, or less.
    """
    (q, k, v, g), window = attention_case(impl, heads, window)
    scale = SCALES[heads] / math.sqrt(q.shape[3])
    want, want_grads = raw_attention_reference(q, k, v, window, BASE, g, scale)
    attend = attend_by(impl, q.shape[1], q.shape[3], window, SCALES[heads])

    def weighted(q, k, v):
        out = attend(q, k, v)
        return (out * g).sum(), out

    grads, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    assert out.shape == q.shape and out.dtype == jnp.float32
    assert distance(out, want) < 2e-6
    for grad, want_grad in zip(grads, want_grads, strict=True):
        largest = np.abs(want_grad).max()  # zero for q and k at window 1, where the one weight is 1
        np.testing.assert_allclose(grad, want_grad, rtol=0, atol=5e-6 * max(largest, SCALES[heads], 1.0))


@pytest.mark.parametrize("impl, heads", [("einsum", "GQA"), ("pallas", "GQA"), slow_case("pallas", "MHA")])
def test_gated_rows_are_added_to_the_values(impl, heads):
    """gate * rows, the heads of a row side by side: attention of v + gate * rows, and the gradients of all five."""
    (q, k, v, g), window = attention_case(impl, heads, 129)
    (B, T, K, H), factor = v.shape, SCALES[heads]
    rng = np.random.default_rng(5)
    gate, rows = np.float32(rng.uniform(0, 3, (B, T, K))), np.float32(rng.normal(size=(B, T, K * H)))
    values = v + np.float64(gate)[..., None] * rows.reshape(v.shape)
    want, (dq, dk, dv) = raw_attention_reference(q, k, values, window, BASE, g, factor / math.sqrt(H))
    d_rows, d_gate = (np.float64(gate)[..., None] * dv).reshape(rows.shape), (dv * rows.reshape(v.shape)).sum(-1)
    config = SimpleNamespace(attn_impl=impl, windows=(window,), score_scale=factor / math.sqrt(H))

    def weighted(q, k, v, gate, rows):
        out, _ = train.attend(config, 0, rope_of(T, H), 0, None, q, k, v, (gate, rows))
        return (out * g).sum(), out

    grads, out = jax.jit(jax.grad(weighted, (0, 1, 2, 3, 4), has_aux=True))(q, k, v, gate, rows)
    assert distance(out, want) < 2e-6
    for grad, want_grad in zip(grads, (dq, dk, dv, d_gate, d_rows), strict=True):
        np.testing.assert_allclose(grad, want_grad, rtol=0, atol=5e-6 * np.abs(want_grad).max())


@pytest.mark.parametrize("window, share", [(2048, 36 / 64), (1024, 0.4685), (100, 0.1673)])
def test_einsum_computes_only_keys_that_a_block_sees(window, share):
    """Of 2,048 keys for each of 2,048 queries, by XLA's count of FLOPs: 36 of 64 squares of 256 in a causal layer."""
    rope = rope_of(2048, 16)

    def flops(attend):
        arrays = [jax.ShapeDtypeStruct((1, 2048, heads, 16), jnp.float32) for heads in (4, 2, 2)]
        return jax.jit(attend).lower(*arrays).cost_analysis()["flops"]

    def everything(q, k, v):
        q, k = train.rope_and_norm(q, *rope), train.rope_and_norm(k, *rope)
        return train.masked_attention(q, k, v, np.ones((2048, 2048), bool), 0.25)

    computed = flops(lambda q, k, v: train.attention_einsum(q, k, v, rope, window, 0.25))
    assert computed / flops(everything) == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("impl, window", [("einsum", 5), ("jax", 5), ("splash", 77), ("pallas", 200)])
def test_a_key_is_seen_by_window_queries_and_no_other(impl, window):
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


@pytest.mark.parametrize("impl", ["einsum", "jax"])
def test_attention_in_bfloat16_takes_its_softmax_in_float32(impl):
    """Scores rounded to bfloat16 before the softmax lose 3 more bits: the error stays near that of the inputs' type."""
    (q, k, v, _), window = attention_case("einsum", "GQA", 5)
    q, k, v = (jnp.asarray(a * 2, jnp.bfloat16) for a in (q, k, v))
    length, channels = q.shape[1], q.shape[3]
    rope = rope_of(length, channels)
    turned = [np.float64(train.rope_and_norm(a, *rope)) for a in (q, k)]  # rounded as attention gets them
    want, _ = attention_reference(*turned, np.float64(v), window)
    out = jax.jit(attend_by(impl, length, channels, window))(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert relative_rms(out, want) < 2.5e-3


@functools.cache
def bfloat16_case():
    """q, k, v and an output gradient in bfloat16, a window, and what the reference makes of them."""
    (q, k, v, g), window = attention_case("pallas", "GQA", 200)
    q, k, v, g = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v, g))
    wide = (np.float64(a) for a in (q, k, v))
    return (q, k, v, g), window, raw_attention_reference(*wide, window, BASE, np.float64(g))


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("impl", ["einsum", "jax", "splash", "pallas"])
def test_attention_in_bfloat16_stays_near_its_inputs_precision(impl):
    """bfloat16 keeps 8 bits, 1.7e-3 rms: scores rounded before the softmax, or sums kept in it, would lose 3 more."""
    (q, k, v, g), window, (want, want_grads) = bfloat16_case()
    attend = attend_by(impl, q.shape[1], q.shape[3], window)

    @jax.jit
    def value_and_grads(q, k, v, g):
        out, back = jax.vjp(attend, q, k, v)
        return out, back(g)

    out, grads = value_and_grads(q, k, v, g)
    assert out.dtype == jnp.bfloat16
    assert relative_rms(out, want) < 3.5e-3
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert relative_rms(grad, want_grad) < 5e-3


# ----------------------------------------------------------------------------------------------------------------------
# The whole model


@pytest.mark.parametrize("impl", ["einsum", "jax"])
@pytest.mark.parametrize("kv_heads, pattern", [(2, "SLS"), (0, "LS"), (1, "S")])
def test_forward_equals_a_float64_transformer(impl, kv_heads, pattern):
    """Logits equal the float64 transformer, every parameter away from its initial value, to 2e-5 of softcap 7."""
    config = replace(n_kv_head=kv_heads, window_pattern=pattern, attn_impl=impl)
    params, tokens = random_params(config), random_tokens(config, B, T)
    logits = jax.jit(functools.partial(train.forward, config))(params, tokens)
    want = gpt_logits(config, widen(params), tokens)
    assert logits.shape == (B, T, config.vocab_size) and logits.dtype == jnp.float32
    assert np.abs(want).max() > 0.6 * config.softcap  # the cap bends what is compared
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("full_compiler")
@pytest.mark.parametrize("impl, channels, atol", [slow_case("splash", 14, 2e-5), ("pallas", 128, 4e-5)])
def test_forward_with_a_kernel_equals_a_float64_transformer(impl, channels, atol):
    """The kernels take the place of the readable attention, each layer with its own window.

    With heads of 128 channels the readable attention is itself 1.8e-5 off, and 2.2e-5 with other tokens or another CPU.
    """
    shape = dict(n_head=2, n_kv_head=1, head_dim=channels, aspect_ratio=channels, seq_len=128)
    config = replace(attn_impl=impl, window_pattern="S", **shape)
    params, tokens = random_params(config), random_tokens(config, 3, 128)
    logits = jax.jit(functools.partial(train.forward, config))(params, tokens)
    np.testing.assert_allclose(logits, gpt_logits(config, widen(params), tokens), rtol=0, atol=atol)


@pytest.mark.parametrize("name, old, new", [("resid_lambdas", 1.0, 1.001), ("x0_lambdas", 0.1, 0.1002)])
def test_bfloat16_does_not_round_the_lambdas(name, old, new, bfloat16_forward):
    """Rounded to bfloat16, 1.001 is 1 and 0.1002 is 0.1: an optimizer's small steps would have no effect."""
    params, tokens = random_params(TINY), random_tokens(TINY, B, T)
    values = (np.full(TINY.n_layer, value, np.float32) for value in (old, new))
    before, after = (np.asarray(bfloat16_forward({**params, name: value}, tokens)) for value in values)
    assert before.dtype == np.float32
    assert (before != after).any()


@pytest.fixture(scope="module")
def bfloat16_forward():
    return jax.jit(functools.partial(train.forward, replace(dtype="bfloat16")))


# ----------------------------------------------------------------------------------------------------------------------
# Loss


@functools.cache
def compiled_loss(config):
    """A jitted (params, batch) -> (cross_entropy, its gradients)."""

    def loss(params, batch):
        params = cast_weights(train.gpt_weights(config), params, config.dtype)
        return train.cross_entropy(config, train.GPT, params, batch)

    return jax.jit(jax.value_and_grad(loss))


def loss_and_grads(config, params, batch):
    return jax.device_get(compiled_loss(config)(params, batch))


@pytest.fixture(scope="module")
def batch():
    """x, y: (B, T) each."""
    return random_batch(TINY, 1, B, T)


@pytest.fixture(scope="module")
def tiny_loss_and_grads(batch):
    return loss_and_grads(TINY, random_params(TINY), batch)


def reference_losses(wide, batch):
    """TINY's cross-entropy of every target in float64: (B, T)."""
    return losses_of_logits(gpt_logits(TINY, wide, batch["x"]), batch["y"])


def assert_slopes(grads, loss, wide):
    """Every gradient, at its largest and at two random entries, is the central difference of loss() to 1e-4.

    loss: a function of no argument of the float64 parameters `wide`, which are changed in place meanwhile.
    """
    rng, step = np.random.default_rng(5), 1e-5
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wide), strict=True)
    for (path, grad), leaf in leaves:
        grad, flat = np.asarray(grad).ravel(), leaf.reshape(-1)  # a view: what is written to it is in `wide`
        for i in {int(np.abs(grad).argmax()), *rng.integers(0, flat.size, 2).tolist()}:
            ends = []
            for sign in (1, -1):
                flat[i] += sign * step
                ends.append(loss())
                flat[i] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            assert grad[i] == pytest.approx(slope, rel=1e-4, abs=1e-4 * float(np.abs(grad).max())), path


@pytest.mark.parametrize("remat", ["dots", "all"])
def test_remat_changes_no_loss_and_no_gradient(remat, batch, tiny_loss_and_grads):
    """What is computed again is the same."""
    found = loss_and_grads(replace(remat=remat), random_params(TINY), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, tiny_loss_and_grads)


def test_remat_computes_again_what_it_does_not_keep(batch):
    """Products in the gradient: attention's two are computed again for `dots`, all eight of a layer for `all`."""

    def products(remat):
        config = replace(remat=remat)
        text = str(jax.make_jaxpr(compiled_loss(config))(random_params(config), batch))
        return text.count("dot_general[")

    none, dots, all_of_it = map(products, ("none", "dots", "all"))
    assert none + 2 * TINY.n_layer <= dots < none + 4 * TINY.n_layer
    assert all_of_it >= none + 7 * TINY.n_layer  # nothing needs the output of the last one


def test_loss_equals_the_reference_token_by_token(batch, tiny_loss_and_grads):
    """Cross-entropy per token and its mean equal float64 to 2e-5: targets are picked from the right row and column."""
    params = random_params(TINY)
    want = reference_losses(widen(params), batch)
    losses = jax.jit(lambda params: train.token_losses(TINY, train.GPT, params, batch["x"], batch["y"]))(params)
    assert losses.shape == (B, T) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, want, rtol=0, atol=2e-5)
    loss, _ = tiny_loss_and_grads
    assert loss.dtype == np.float32 and float(loss) == pytest.approx(want.mean(), abs=1e-5)


def test_gradients_are_those_of_the_float64_loss(batch, tiny_loss_and_grads):
    """Every parameter's gradient, at its largest and at random entries, is that of the float64 loss to 1e-4."""
    (_, grads), wide = tiny_loss_and_grads, widen(random_params(TINY))
    assert_slopes(grads, lambda: reference_losses(wide, batch).mean(), wide)


@pytest.mark.slow
@pytest.mark.colab
def test_bfloat16_stays_near_float32_in_loss_and_gradient(batch, tiny_loss_and_grads):
    """bfloat16 has 8 bits: its loss is within 1 % of float32's and every gradient, kept in float32, within 10 %."""
    loss, grads = tiny_loss_and_grads
    half_loss, half_grads = loss_and_grads(replace(dtype="bfloat16"), random_params(TINY), batch)
    assert half_loss != loss  # it does compute in bfloat16
    assert half_loss == pytest.approx(float(loss), rel=0.01)
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(half_grads), strict=True)
    for (path, grad), half_grad in leaves:
        assert half_grad.dtype == np.float32
        assert np.linalg.norm(half_grad - grad) < 0.1 * np.linalg.norm(grad), path


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("size", [5, 65])
def test_loss_slices_change_neither_loss_nor_gradient(size, batch, tiny_loss_and_grads):
    """The loss goes slice by slice to save memory: one slice of 65 tokens gives what 5 of 13 and 13 of 5 give."""
    loss, grads = tiny_loss_and_grads
    sliced_loss, sliced_grads = loss_and_grads(replace(loss_slice=size), random_params(TINY), batch)
    assert sliced_loss == pytest.approx(float(loss), rel=1e-6)
    assert distance(sliced_grads, grads) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Loss with a mask


@pytest.fixture(scope="module")
def mask():
    """(B, T) int32: a third of the targets count; of the first row, which is one slice of the loss, none."""
    mask = np.random.default_rng(7).integers(0, 3, (B, T), dtype=np.int32) == 0
    mask[0] = False
    return mask.astype(np.int32)


@pytest.fixture(scope="module")
def masked_loss_and_grads(batch, mask):
    return loss_and_grads(TINY, random_params(TINY), {**batch, "mask": mask})


def test_a_masked_loss_is_the_mean_of_the_targets_that_count(batch, mask, masked_loss_and_grads):
    """In value and gradient that of the float64 loss, to the bounds of the whole loss."""
    (loss, grads), wide = masked_loss_and_grads, widen(random_params(TINY))
    masked_mean = lambda: reference_losses(wide, batch)[mask == 1].mean()
    assert 0 < mask.mean() < 0.5 and not mask[0].any()
    assert loss.dtype == np.float32 and float(loss) == pytest.approx(masked_mean(), abs=1e-5)
    assert_slopes(grads, masked_mean, wide)


def test_a_masked_target_changes_nothing(batch, mask, masked_loss_and_grads):
    """Other targets where the mask is 0: loss and gradients are the same to the last bit."""
    other = np.where(mask, batch["y"], (batch["y"] + 3) % TINY.vocab_size)
    assert (other != batch["y"]).sum() == (mask == 0).sum()
    again = loss_and_grads(TINY, random_params(TINY), {"x": batch["x"], "y": other, "mask": mask})
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(masked_loss_and_grads), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mask_of_ones_is_no_mask(batch, tiny_loss_and_grads):
    """Where every target counts, loss and gradients are those without a mask, to rounding."""
    loss, grads = tiny_loss_and_grads
    masked, masked_grads = loss_and_grads(TINY, random_params(TINY), {**batch, "mask": np.ones((B, T), np.int32)})
    assert masked == pytest.approx(float(loss), rel=1e-6)
    assert distance(masked_grads, grads) < 1e-5
