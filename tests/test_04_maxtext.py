"""04: the gated model against float64 NumPy, on 02's loop, and what another library makes of its weights.

Sizes differ in every dimension. The transformer below norms queries and keys before it turns them, as Qwen3 does.
"""

import dataclasses
import functools
import importlib
import json
import math
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import draw_params, quick_compiler, random_batch, random_tokens  # noqa: F401  (one is a fixture)
from corpus import assert_same_end, read_rows, train_tiny
from reference import (
    attention_reference,
    distance,
    greedy_reference,
    losses_of_logits,
    norm_reference,
    rope_reference,
    visible,
    widen,
    windows_reference,
)
from safetensors.numpy import load_file

from onechip import resume
from onechip.checkpoints import flatten
from onechip.errors import UserError
from onechip.result import Result
from onechip.session import Session
from onechip.settings import fixed_fields
from onechip.weights import cast_weights, draw_weights, weight_shapes

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
maxtext = importlib.import_module("04_maxtext")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

# B 5 | T 13 | D 22 | N 6 | K 2 | H 14 | F 34 | L 3 | V 31; context 18, so that an S layer sees 9 keys
TINY = maxtext.Config(
    n_embd=22, n_layer=3, n_head=6, n_kv_head=2, head_dim=14, mlp_dim=34, tile=1, vocab_size=31, seq_len=18,
    rope_base=50.0, attn_impl="einsum", dtype="float32", device_batch_size=5, total_batch_size=5, loss_slice=13,
)  # fmt: skip
B, T = 5, 13


def replace(**fields):
    return dataclasses.replace(TINY, **fields)


# ----------------------------------------------------------------------------------------------------------------------
# The model in float64


def swiglu_logits(config, params, tokens):
    """The whole transformer in float64: logits (B, T, V)."""
    x = params["wte"][tokens]
    for layer, window in zip(params["layers"], windows_reference(config), strict=True):
        h = norm_reference(x)
        q, k, v = (np.tensordot(h, layer[name], 1) for name in ("c_q", "c_k", "c_v"))
        q, k = (rope_reference(norm_reference(a), config.rope_base) for a in (q, k))
        x = x + np.tensordot(attention_reference(q, k, v, window)[0], layer["c_proj"], 2)
        h = norm_reference(x)
        gate = h @ layer["c_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["c_fc"])) @ layer["mlp_proj"]
    logits = norm_reference(x) @ params["lm_head"]
    return config.softcap * np.tanh(logits / config.softcap) if config.softcap else logits


def loss_reference(config, params, batch):
    """The mean cross-entropy in float64."""
    return losses_of_logits(swiglu_logits(config, params, batch["x"]), batch["y"]).mean()


@functools.cache
def random_params(config, seed=0):
    """Parameters with nothing at its initial value; every branch adds about as much as the stream has."""
    D, F = config.n_embd, config.mlp_dim
    scales = dict.fromkeys(("c_q", "c_k", "c_v", "c_gate", "c_fc"), 1.3 * D**-0.5)
    scales |= {"wte": 1.5, "lm_head": 0.6, "c_proj": 0.2, "mlp_proj": 1.5 * F**-0.5}
    return draw_params(config, maxtext.swiglu_weights(config), scales, seed)


@functools.cache
def compile_forward(config):
    """A jitted (params, tokens) -> logits."""
    return jax.jit(functools.partial(train.forward, config, model=maxtext.SWIGLU))


@functools.cache
def compiled_loss(config):
    """A jitted (params, batch) -> (loss, gradients); float32."""
    return jax.jit(jax.value_and_grad(functools.partial(train.cross_entropy, config, maxtext.SWIGLU)))


def loss_and_grads(config, params, batch):
    return jax.device_get(compiled_loss(config)(params, batch))


@pytest.fixture(scope="module")
def batch():
    """x, y: (B, T) each."""
    return random_batch(TINY, 1, B, T)


@pytest.fixture(scope="module", params=[0.0, pytest.param(2.5, marks=pytest.mark.slow)])
def whole(request, batch):
    """(config, loss, gradients) without a softcap and with one, the loss in one slice."""
    config = replace(softcap=request.param, loss_slice=B * T)
    return config, *loss_and_grads(config, random_params(TINY), batch)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(n_kv_head=6, window_pattern="SL"),
        dict(n_kv_head=1, window_pattern="LS", attn_impl="jax"),
        dict(softcap=2.5, n_kv_head=3, window_pattern="S"),
    ],
    ids=str,
)
def test_forward_equals_a_float64_transformer(fields):
    """Logits equal the float64 transformer to 1e-5 of their largest: grouped heads, windows, with a cap and without."""
    config = replace(**fields)
    params, tokens = random_params(config), random_tokens(config, B, config.seq_len)
    logits = compile_forward(config)(params, tokens)
    want = swiglu_logits(config, widen(params), tokens)
    assert logits.shape == want.shape and logits.dtype == jnp.float32
    assert np.abs(want).max() > 2
    assert distance(logits, want) < 1e-5


@pytest.mark.slow
def test_forward_with_splash_equals_a_float64_transformer():
    """The kernel takes the place of the readable attention, with grouped heads and each layer's own window."""
    config = replace(n_head=2, n_kv_head=1, seq_len=128, attn_impl="splash", window_pattern="SL")
    params, tokens = random_params(config), random_tokens(config, 2, 128)
    logits = compile_forward(config)(params, tokens)
    assert distance(logits, swiglu_logits(config, widen(params), tokens)) < 1e-5


@pytest.mark.parametrize("pattern", ["L", "SL"])
def test_no_logit_depends_on_a_later_token(pattern):
    """Another token at t changes the logits of t and leaves every earlier one as it is, to the last bit."""
    config = replace(window_pattern=pattern)
    params, tokens = random_params(config), random_tokens(config, B, config.seq_len)
    forward = compile_forward(config)
    before = np.asarray(forward(params, tokens))
    for t in (0, 7, config.seq_len - 1):
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % config.vocab_size
        after = np.asarray(forward(params, other))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).all(-1).all()


def test_loss_and_gradients_are_those_of_the_float64_loss(batch, whole):
    """The loss to 1e-5; every parameter's gradient along a random direction and at its largest entry, to 1e-4."""
    config, loss, grads = whole
    wide = widen(random_params(TINY))
    assert float(loss) == pytest.approx(loss_reference(config, wide, batch), rel=1e-5)
    rng, step = np.random.default_rng(5), 1e-5
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wide), strict=True)
    for (path, grad), leaf in leaves:
        one = np.zeros(leaf.shape)
        one.reshape(-1)[np.abs(grad).argmax()] = 1.0
        for direction in (one, rng.normal(size=leaf.shape)):
            ends = []
            for sign in (1, -1):
                leaf += sign * step * direction
                ends.append(loss_reference(config, wide, batch))
                leaf -= sign * step * direction
            slope = (ends[0] - ends[1]) / (2 * step)
            tolerance = 1e-4 * float(np.linalg.norm(grad))
            assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=tolerance), path


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 13])
def test_loss_slices_change_neither_loss_nor_gradient(size, batch, whole):
    """65, 13 and 5 slices give what one gives, capped and not: each slice takes its own maximum and its own targets."""
    config, loss, grads = whole
    sliced = dataclasses.replace(config, loss_slice=size)
    sliced_loss, sliced_grads = loss_and_grads(sliced, random_params(TINY), batch)
    assert sliced_loss == pytest.approx(float(loss), rel=1e-6)
    assert distance(sliced_grads, grads) < 1e-5


def test_uncapped_logits_of_any_size_do_not_overflow(batch):
    """exp(89) is infinite in float32: with no cap, logits of hundreds need the maximum taken off first."""
    params = random_params(TINY)
    params = {**params, "lm_head": 80 * params["lm_head"]}
    assert np.abs(swiglu_logits(TINY, widen(params), batch["x"])).max() > 300
    loss, grads = loss_and_grads(replace(loss_slice=B * T), params, batch)
    assert float(loss) == pytest.approx(loss_reference(TINY, widen(params), batch), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_swiglu_and_its_own_gradient():
    """silu(g) u and both derivatives in float64, from deep in the gate's flat side to where it is the identity."""
    rng = np.random.default_rng(8)
    g, u, d = (np.float32(scale * rng.normal(size=(7, 11))) for scale in (6.0, 1.0, 1.0))
    out, pull = jax.vjp(maxtext.swiglu, g, u)
    wide, s = np.float64(g), 1 / (1 + np.exp(-np.float64(g)))
    assert distance(out, wide * s * u) < 1e-6
    dg, du = pull(jnp.asarray(d))
    assert distance(dg, d * u * (s + wide * s * (1 - s))) < 1e-6
    assert distance(du, d * wide * s) < 1e-6
    half = [jnp.asarray(a, jnp.bfloat16) for a in (g, u)]
    assert {a.dtype.name for a in (maxtext.swiglu(*half), *jax.vjp(maxtext.swiglu, *half)[1](half[0]))} == {"bfloat16"}


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def test_the_default_has_369_million_parameters_by_group():
    """Printed by group: 2 x 32768 x 1024, and 24 layers of 3 x 1024 x 1024 and of three 1024 x 3072."""
    want = {"embed": 32768 * 1024, "attention": 24 * 3 * 1024 * 1024, "mlp": 24 * 3 * 1024 * 3072}
    want |= {"lm_head": 32768 * 1024, "scalar": 0, "total": 369_098_752}
    assert train.count_params(maxtext.Config(), maxtext.SWIGLU) == want
    printed = train.describe_model(maxtext.Config(), maxtext.SWIGLU)
    for group in ("embed", "attention", "mlp", "lm_head", "total"):
        assert re.search(rf"{group}\s+{want[group]:,}", printed)
    assert "scalar" not in printed


def test_flops_count_the_heads_and_not_the_width():
    """Attention's products are n_head * head_dim wide, which here is not n_embd: 84 against 22."""
    D, N, K, H, F, V, length = 22, 6, 2, 14, 34, 31, 18
    macs = length * D * V
    for window in (9, 18, 18):
        macs += length * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + visible(length, window).sum() * N * 2 * H
    flops = train.flops_per_token(replace(window_pattern="SL"), maxtext.SWIGLU)
    assert flops == pytest.approx(6 * macs / length, rel=1e-12)


def test_initial_weights_are_02s_and_the_gate_is_like_its_neighbour():
    """wte N(0, 1), lm_head N(0, 0.001), into a block uniform of variance 1 / D, out of it zero; no two alike."""
    config = replace(n_embd=66, vocab_size=431)
    params = jax.jit(functools.partial(draw_weights, config, maxtext.swiglu_weights(config)))(jax.random.key(3))
    D, N, K, H, F, L, V = 66, 6, 2, 14, 34, 3, 431
    assert set(params) == {"wte", "lm_head", "layers"} and len(params["layers"]) == L
    assert params["wte"].shape == (V, D) and params["lm_head"].shape == (D, V)
    for name, scale in (("wte", 1.0), ("lm_head", 0.001)):
        values = np.asarray(params[name]) / scale
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
        assert 0.66 < (np.abs(values) < 1).mean() < 0.70  # of a normal distribution, 68.3 %
    shapes = {"c_q": (D, N, H), "c_k": (D, K, H), "c_v": (D, K, H), "c_gate": (D, F), "c_fc": (D, F)}
    seen = []
    for layer in params["layers"]:
        assert {name: layer[name].shape for name in layer} == {**shapes, "c_proj": (N, H, D), "mlp_proj": (F, D)}
        assert not layer["c_proj"].any() and not layer["mlp_proj"].any()
        for name in shapes:
            values = np.asarray(layer[name])
            assert values.std() == pytest.approx(D**-0.5, rel=0.03) and np.abs(values).max() <= math.sqrt(3 / D)
            seen.append(tuple(values.ravel()[:3].tolist()))
    assert len(set(seen)) == len(seen)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(n_embd=1000), "n_embd=1000: must be a multiple of tile=256"),
        (dict(head_dim=128), "head_dim=128: must be a multiple of tile=256"),
        (dict(mlp_dim=3000), "mlp_dim=3000: must be a multiple of tile=256"),
        (dict(vocab_size=50257), "vocab_size=50257: must be a multiple of tile=256"),
        (dict(n_layer=0), "n_layer=0: must be a positive integer"),
        (dict(mlp_dim=-256), "mlp_dim=-256: must be a positive integer"),
        (dict(tile=0), "tile=0: must be a positive integer"),
        (dict(n_kv_head=3), "n_kv_head=3: must divide n_head=4"),
        (dict(n_kv_head=0), "n_kv_head=0: must be a positive integer"),
        (dict(n_embd=1024.0), "n_embd=1024.0: must be a finite int"),
        (dict(softcap=-1.0), "softcap=-1.0: must lie in [0, 60]"),
        (dict(seq_len=1000), "seq_len=1000: "),
        (dict(tile=1, head_dim=33), "head_dim=33: must be even"),
    ],
    ids=str,
)
def test_config_refuses_what_does_not_fit_the_tiles(fields, said):
    """One line with the field, its value and the remedy, whether the rule is 02's or this model's own."""
    with pytest.raises(UserError) as refusal:
        maxtext.Config(**fields)
    assert str(refusal.value).startswith(said) and "\n" not in str(refusal.value)


def test_every_side_of_a_matrix_is_a_multiple_of_256():
    """The rule, on the arrays themselves: heads taken together with their channels, in the chip and laptop presets."""
    for preset in maxtext.PRESETS.values():
        config = maxtext.Config(**preset)
        for leaf in jax.tree.leaves(weight_shapes(config, maxtext.swiglu_weights(config))):
            sides = [side for side in leaf.shape if side not in (config.n_head, config.n_kv_head)]
            assert len(sides) == 2 and all(side % 256 == 0 for side in sides), leaf.shape


def test_config_is_static_to_jit_and_its_model_is_fixed():
    """Every size of the model is fixed, with what 02 fixes for any model; rates and batches per device are not."""
    sizes = {"n_embd", "n_layer", "n_head", "n_kv_head", "head_dim", "mlp_dim"}
    shared = set(fixed_fields(train.Config)) - {"aspect_ratio"}
    assert set(fixed_fields(maxtext.Config)) == sizes | shared
    traced = []

    @jax.jit
    def wide(config, x):
        traced.append(config)
        return config.mlp_dim * x

    assert [float(wide(c, 2.0)) for c in (TINY, replace(), replace(mlp_dim=38))] == [68.0, 68.0, 76.0]
    assert len(traced) == 2


# ----------------------------------------------------------------------------------------------------------------------
# On 02's loop


@pytest.mark.parametrize("pattern", [pytest.param("L", marks=pytest.mark.slow), "SSL"])
def test_greedy_equals_recomputing_the_whole_prefix(pattern):
    """Token for token with the float64 transformer: 02's cache serves this model, windows included."""
    config = replace(seq_len=42, window_pattern=pattern)
    params = random_params(config, 3)
    prompt, new = random_tokens(config, 1, 5, 11)[0].tolist(), 24
    want = greedy_reference(functools.partial(swiglu_logits, config, widen(params)), prompt, new)
    assert len(set(want)) > 8  # a model stuck on one token would agree with anything
    assert train.generate(config, params, prompt, new, model=maxtext.SWIGLU) == want


def small(**changes):
    """A config for real runs on the small corpus."""
    fields = dict(
        n_embd=16, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, mlp_dim=24, tile=1, vocab_size=300, seq_len=24,
        attn_impl="einsum", dtype="float32", device_batch_size=2, total_batch_size=6, num_iterations=12,
        learning_rate=1e-2, eval_every=4, eval_tokens=7 * 24, sample_every=0, keep=99, save_every=5, loss_slice=12,
    )  # fmt: skip
    return maxtext.Config(**{**fields, **changes})


def train_small(corpus, tokenizer, run_dir, **changes):
    """A run of small(**changes) that samples after "the"."""
    options = dict(config=small(**changes), model=maxtext.SWIGLU, prompts=("the",))
    return train_tiny(corpus, tokenizer, run_dir, **options)


@pytest.fixture(scope="module")
def straight(corpus, tokenizer, tmp_path_factory):
    """The result of 12 steps left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "git_commit", lambda: "a commit")
        return train_small(corpus, tokenizer, tmp_path_factory.mktemp("runs") / "straight")


@pytest.mark.slow
def test_a_run_learns_samples_and_leaves_02s_files(straight):
    """02's loop on this model: the loss falls from log V, a sample continues its prompt, all files are there."""
    rows = [row for row in read_rows(straight.run_dir) if "loss" in row]
    assert len(rows) == 12 and rows[0]["loss"] == pytest.approx(math.log(300), abs=0.1)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert straight.samples[0][0] == "the" and straight.val_bpb is not None
    left = {path.name.partition(".tfevents")[0] for path in straight.run_dir.iterdir() if path.name[0] != "."}
    files = {"config.json", "metrics.jsonl", "loss.png", "tokenizer.json", "profile", "checkpoints", "events.out"}
    assert left == files


def test_a_run_that_crashed_resumes_to_the_same_bits(straight, corpus, tokenizer, tmp_path, monkeypatch):
    """Killed after step 7 and started again, it ends with the metrics, parameters and moments of a run left alone."""
    monkeypatch.setattr(resume, "git_commit", lambda: "a commit")
    advance = Session.advance

    class Stop(Exception):
        pass

    def stop_after_7(self, step):
        if self.step == 7:
            raise Stop
        return advance(self, step)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Session, "advance", stop_after_7)
        train_small(corpus, tokenizer, tmp_path / "run")
    with pytest.raises(UserError, match="^mlp_dim=32: .* was trained with 24"):
        train_small(corpus, tokenizer, tmp_path / "run", mlp_dim=32)
    assert train_small(corpus, tokenizer, tmp_path / "run").step == 12
    assert_same_end(tmp_path / "run", straight.run_dir)


def test_a_run_is_opened_by_the_name_in_its_config(straight):
    """open_model finds this model from the run's folder alone: its Config, its parameters, its functions."""
    config, params, _, model = train.open_model(straight.run_dir)
    assert model is maxtext.SWIGLU and config == small()
    assert distance(jax.device_get(params), jax.device_get(straight.params)) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Weights that travel


def made_up_result(config, run_dir, params):
    """A Result as train() would leave it, of weights that matter."""
    run_dir.mkdir(parents=True)
    about = {"config": dataclasses.asdict(config), "data": {"name": "corpus", "revision": "v1", "shards": 3}}
    about |= {"model": maxtext.SWIGLU.name, "commit": None, "jax": "1.2.3", "device": "1 x cpu"}
    (run_dir / "config.json").write_text(json.dumps(about))
    (run_dir / "loss.png").write_bytes(b"a picture")
    return Result(params, 7, 3.2, 1.9, 2.4, [], run_dir)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """(config, parameters, folder) of an exported model with no weight at its initial value.

    Embeddings are as small as they start, where an epsilon of 1e-6 instead of 1.2e-7 shows.
    """
    config = small(n_head=6, n_kv_head=2, head_dim=14, seq_len=40, rope_base=70.0)
    params = random_params(config)
    params = {**params, "wte": np.float32(0.02 / 1.5) * params["wte"]}
    result = made_up_result(config, tmp_path_factory.mktemp("export") / "run", params)
    return config, params, maxtext.export_qwen3(config, result, tokenizer)


def test_another_library_computes_the_same_logits(exported):
    """mlx-lm's Qwen3, from the exported folder alone, agrees with our logits to 1e-5 of their largest (float32)."""
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm, which has no wheel for this machine")
    import mlx.core as mx

    config, params, folder = exported
    model, _ = mlx_lm.load(str(folder))
    assert type(model).__module__.endswith("qwen3")
    tokens = random_tokens(config, 3, config.seq_len)
    with mx.stream(mx.cpu):
        theirs = np.array(model(mx.array(tokens)).astype(mx.float32))
    want = swiglu_logits(config, widen(params), tokens)
    ours = compile_forward(config)(params, tokens)
    assert theirs.shape == want.shape and np.abs(want).max() > 2
    assert distance(theirs, want) < 1e-5 and distance(theirs, np.asarray(ours)) < 1e-5


def test_the_exported_tokenizer_opens_texts_as_training_did(exported, tokenizer):
    """AutoTokenizer gives 01's ids, <|bos|> first, and spells them back; <|bos|> is also where a text ends."""
    transformers = pytest.importorskip("transformers", reason="comes with mlx-lm")
    loaded = transformers.AutoTokenizer.from_pretrained(str(exported[2]))
    texts = ["the energy of light, naïve 数据 1024", "  import self\n\treturn", ""]
    assert [loaded(text).input_ids for text in texts] == tok.encode_batch(tokenizer, texts)
    assert loaded.decode(loaded(texts[0]).input_ids, skip_special_tokens=True) == texts[0]
    assert loaded.bos_token == loaded.eos_token == "<|bos|>"
    assert loaded.bos_token_id == json.loads((exported[2] / "config.json").read_text())["eos_token_id"]
    assert tokenizer.post_processor is None  # ours was not touched


def test_a_special_token_in_a_text_stays_text_in_the_export(exported, tokenizer):
    """Spelled out in a document, <|bos|> is seven characters for AutoTokenizer, as it is for training."""
    transformers = pytest.importorskip("transformers", reason="comes with mlx-lm")
    loaded = transformers.AutoTokenizer.from_pretrained(str(exported[2]))
    for text in ("a<|bos|>b", "<|bos|>", "<|assistant_end|> <|bos|><|bos|>"):
        ids = loaded(text).input_ids
        assert ids == tok.encode_batch(tokenizer, [text])[0]
        assert ids[0] == loaded.bos_token_id and not set(ids[1:]) & set(loaded.all_special_ids)
    settings = json.loads((exported[2] / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|bos|>" and settings["model_max_length"] == exported[0].seq_len


def test_the_export_is_whole_and_says_what_it_is(exported):
    """Every file that a reader of Hugging Face's format looks for, and a card with sizes, data, score and loading."""
    config, params, folder = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors", "onechip.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    arrays = load_file(folder / "model.safetensors")
    norms = sum(a.size for name, a in arrays.items() if "norm" in name)
    assert sum(a.size for a in arrays.values()) - norms == sum(leaf.size for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(arrays["model.layers.1.mlp.down_proj.weight"], params["layers"][1]["mlp_proj"].T)
    card = (folder / "README.md").read_text()
    for words in (
        "library_name: transformers",
        "corpus at revision `v1`",
        f"parameters, {config.dtype} |",
        f"in the style of {maxtext.STYLE}",
        "1.900 bits per byte",
        "from_pretrained",
        "<|bos|>",
    ):
        assert words in card
    assert "{dtype}" not in card and "{source" not in card


def test_an_export_opens_again(exported, tokenizer):
    """open_model turns a Qwen3 back into this model: config and tokenizer, and every parameter to the last bit."""
    config, params, folder = exported
    opened = train.open_model(folder)
    assert opened.model is maxtext.SWIGLU and opened.config == config
    ours, theirs = flatten(params), flatten(jax.device_get(opened.params))
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name], array, err_msg=name)
    text = "the energy of light"
    assert tok.encode_batch(opened.tokenizer, [text]) == tok.encode_batch(tokenizer, [text])


def test_a_bfloat16_model_travels_in_the_bits_it_computes_with(tokenizer, tmp_path):
    """Weights are exported in the compute type: half the size, and the values that a step's cast would give."""
    config = small(dtype="bfloat16")
    params = random_params(config)
    folder = maxtext.export_qwen3(config, made_up_result(config, tmp_path / "run", params), tokenizer)
    arrays = load_file(folder / "model.safetensors")
    assert {str(a.dtype) for a in arrays.values()} == {"bfloat16"}
    cast = cast_weights(maxtext.swiglu_weights(config), jax.tree.map(jnp.asarray, params), config.dtype)
    np.testing.assert_array_equal(arrays["lm_head.weight"], np.asarray(cast["lm_head"]).T)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("fields, reason", [(dict(softcap=4.0), "softcap=4.0"), (dict(window_pattern="SL"), "'SL'")])
def test_what_qwen3_does_not_compute_is_not_called_qwen3(fields, reason, straight, tokenizer, tmp_path, capsys):
    """A cap or windows: one line, our own arrays and config, and a card with the reason; no model.safetensors."""
    shutil.copytree(straight.run_dir, tmp_path / "run")
    config, result = small(**fields), straight._replace(run_dir=tmp_path / "run")
    capsys.readouterr()
    folder = maxtext.export_qwen3(config, result, tokenizer)
    said = capsys.readouterr().out
    assert said.startswith(f"export: plain safetensors, as {fields.popitem()[0]}=") and said.count("\n") == 1
    assert {"params.safetensors", "config.json", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    card = (folder / "README.md").read_text()
    assert reason in card and "from_pretrained" not in card and "library_name: jax" in card
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    opened = train.open_model(folder)
    assert distance(jax.device_get(opened.params), jax.device_get(straight.params)) == 0
    assert opened.model is maxtext.SWIGLU and f"train.open_model({str(folder)!r})" in lines


# ----------------------------------------------------------------------------------------------------------------------
# Side by side, and the chip


def test_the_table_has_both_models_and_says_what_it_does_not_know():
    """Rows of figures, one column a model: time per token and MFU from the fit's step, or unknown."""
    fit = SimpleNamespace(where="1 x TPU v6 lite", peak_bytes=9 * 2**30, step_seconds=0.5)
    unknown = SimpleNamespace(where="1 x TPU v6 lite", peak_bytes=3 * 2**29, step_seconds=None)
    ours, theirs = maxtext.Config(), train.Config()
    peak = 918e12 / train.flops_per_token(ours, maxtext.SWIGLU)
    table = maxtext.side_by_side({"one": (theirs, train.GPT, unknown, None), "two": (ours, maxtext.SWIGLU, fit, peak)})
    rows = {line[:28].strip(): line[28:].split() for line in table.splitlines()}
    assert rows["1 x TPU v6 lite, estimated"] == ["one", "two"]
    assert rows["parameters"] == ["268.4M", "369.1M"]
    assert rows["peak HBM, GiB"] == ["1.50", "9.00"]
    assert rows["ns per token"] == ["unknown", f"{0.5e9 / 131072:,.0f}"]
    assert rows["MFU"] == ["unknown", f"{131072 / 0.5 / peak:.1%}"]
    assert [float(cell) for cell in rows["FLOPs per token"]] == [
        pytest.approx(train.flops_per_token(theirs), rel=5e-3),
        pytest.approx(train.flops_per_token(ours, maxtext.SWIGLU), rel=5e-3),
    ]


def test_each_model_is_measured_with_its_own_functions(monkeypatch):
    """02's default by 02's functions and this one's by its own; a model that does not fit stays in the table."""
    measured = []

    def measure(work, config):
        measured.append((config, work.mesh.size, work.count(config)["params"], work.flops(config)))
        return SimpleNamespace(where="1 x cpu", peak_bytes=40 * 2**30, step_seconds=None)

    monkeypatch.setattr(maxtext.fit, "measure", measure)
    table = maxtext.compare_models()
    models = ((train.Config(), train.GPT, 268_435_488), (maxtext.Config(), maxtext.SWIGLU, 369_098_752))
    assert measured == [(config, 1, size, train.flops_per_token(config, model)) for config, model, size in models]
    assert table.splitlines()[0].split() == ["1", "x", "cpu,", "estimated", "02_train", "04_maxtext"]
    assert table.count("40.00") == 2 and table.count("unknown") == 4


def test_models_are_compared_where_asked_or_on_a_tpu(monkeypatch):
    """A laptop does not compile for minutes unless it is given a topology; a TPU does unless it is given no."""
    wanted = lambda: [maxtext.CompareRun(compare=text).wants_table() for text in ("", "v6e:1x1", "no")]
    assert wanted() == [False, True, False]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert wanted() == [True, True, False]
