"""A model and an optimizer that 02 does not know, handed in through its doors; nothing is patched."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import TINY, newest, read_rows, train_tiny
from reference import rate_reference

from onechip.layers import rms_norm
from onechip.rows import lookup
from onechip.settings import setting
from onechip.weights import Weight, constant, draw_weights, normal, uniform

train = importlib.import_module("02_train")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    value_embeds: bool = setting(True, "value embeddings in every other layer", fixed=True)
    sizes = property(lambda self: {**super(Config, self).sizes, "G": 5})  # G: channels that the gates read


def weights(config):
    table = train.gpt_weights(config)
    extra = {"value_embeds": Weight("V->KH", normal(0.5), "embed"), "gate": Weight("G->K", uniform, "attention")}
    chosen = [config.value_embeds and i % 2 == 0 for i in range(config.n_layer)]
    layers = [layer | extra if has else layer for layer, has in zip(table["layers"], chosen, strict=True)]
    scalars = {"smear_lambda": Weight("", constant(0.5), "scalar"), "backout": Weight("", constant(0.2), "scalar")}
    return {**table, "layers": layers, "smear": Weight("G->", normal(1.0), "attention"), **scalars}


def embed(config, params, tokens, before):
    x = rms_norm(lookup(params["wte"], tokens))
    first = jnp.zeros_like(x[:, :1])
    if before is not None:
        first = jnp.where(before[..., None] >= 0, rms_norm(lookup(params["wte"], jnp.maximum(before, 0))), 0)
    gate = jax.nn.sigmoid(x[..., :5] @ params["smear"])
    return x + (params["smear_lambda"] * gate)[..., None] * jnp.concatenate([first, x[:, :-1]], axis=1)


def block(config, params, i, streams, tokens, attend):
    layer = params["layers"][i]

    def attend_with_values(q, k, v):
        if "value_embeds" in layer:
            gate = jax.nn.sigmoid(rms_norm(streams[-1])[..., :5] @ layer["gate"])
            v = v + gate[..., None] * lookup(layer["value_embeds"], tokens)
        return attend(q, k, v)

    return train.gpt_block(config, params, i, streams, tokens, attend_with_values)


def readout(config, params, streams):
    return rms_norm(streams[-1] - params["backout"] * streams[len(streams) // 2])


MODEL = train.Model("test_doors_model.MODEL", Config, weights, embed, block, readout)


def lion_init(config, weights, params):
    """One moment, a counter, and a list with a number for each matrix."""
    norms = [jnp.zeros(()) for w in jax.tree.leaves(weights) if w.kind != "scalar"]
    return {"momentum": jax.tree.map(jnp.zeros_like, params), "age": jnp.zeros((), jnp.int32), "norms": norms}


def lion_update(config, weights, params, state, grads, step, spread):
    momentum = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["momentum"], grads)
    new = jax.tree.map(lambda p, m: p - 0.2 * train.learning_rate_at(config, step) * jnp.sign(m), params, momentum)
    matrices = [p for w, p in zip(jax.tree.leaves(weights), jax.tree.leaves(new), strict=True) if w.kind != "scalar"]
    norms = [0.5 * (old + jnp.linalg.norm(p)) for old, p in zip(state["norms"], matrices, strict=True)]
    return new, {"momentum": momentum, "age": state["age"] + 1, "norms": norms}


OPTIONS = {"model": MODEL, "optimizer": train.Optimizer("lion", lion_init, lion_update)}
CONFIG = Config(**TINY | {"aspect_ratio": 4, "window_pattern": "SL"})  # 4 layers


def test_it_is_counted_by_kind():
    """Value embeddings are lookups: counted as parameters, not as FLOPs; the gates are matrices."""
    D, N, K, H, F, L, V, G = 16, 2, 1, 8, 64, 4, 300, 5
    attention, mlp = L * (2 * D * N * H + 2 * D * K * H) + 2 * G * K + G, L * 2 * D * F
    others = {"embed": V * D + 2 * V * K * H, "lm_head": D * V, "scalar": 2 * L + 2}
    total = sum(others.values()) + attention + mlp
    counts = others | {"attention": attention, "mlp": mlp, "total": total}
    assert train.count_params(CONFIG, MODEL) == counts
    keys = 2 * (12 * 13 / 2 + 12 * 12) / 24 + 2 * (24 * 25 / 2) / 24  # windows 12, 24, 12, 24
    assert train.flops_per_token(CONFIG, MODEL) == 6 * (attention + mlp + D * V) + 12 * N * H * keys
    assert train.count_params(dataclasses.replace(CONFIG, value_embeds=False), MODEL)["embed"] == V * D


def test_a_warm_up_in_steps_wins_over_its_ratio_and_the_warm_down():
    """20 steps, 8 up and 15 down to a quarter: the rate rises to its peak, then falls on from where the ramp is."""
    fields = {"num_iterations": 20, "learning_rate": 4.0, "warmdown_ratio": 0.75, "final_lr_frac": 0.25}
    config = dataclasses.replace(CONFIG, warmup_ratio=0.1, warmup_steps=8, **fields)
    want = {0: 0.5, 6: 3.5, 7: 4.0, 8: 3.4, 13: 2.4, 19: 1.2}  # from 8 on: 1 + 3 * (20 - step) / 15
    assert [float(train.learning_rate_at(config, step)) for step in want] == pytest.approx(list(want.values()))
    rates = [float(train.learning_rate_at(config, step)) for step in range(20)]
    assert rates == pytest.approx([rate_reference(config, step) for step in range(20)])
    by_ratio = dataclasses.replace(config, warmup_steps=0)  # 2 steps
    assert [float(train.learning_rate_at(by_ratio, step)) for step in (0, 1, 5, 8)] == pytest.approx([2, 4, 4, 3.4])


@pytest.mark.slow
def test_it_trains_and_resumes_to_the_last_bit(corpus, tokenizer, tmp_path):
    """It learns; interrupted in the middle, it ends with the same bits in every array of parameters and optimizer."""

    def stop(row):
        if row["step"] == 11:
            raise KeyboardInterrupt

    whole = train_tiny(corpus, tokenizer, tmp_path / "whole", config=CONFIG, **OPTIONS)
    train_tiny(corpus, tokenizer, tmp_path / "cut", config=CONFIG, on_log=stop, **OPTIONS)
    again = train_tiny(corpus, tokenizer, tmp_path / "cut", config=CONFIG, **OPTIONS)
    assert whole.step == again.step == 26 and whole.val_loss < math.log(300) - 0.7
    assert read_rows(tmp_path / "whole") == read_rows(tmp_path / "cut")
    for name in ("params.safetensors", "opt.safetensors"):
        assert (newest(tmp_path / "whole") / name).read_bytes() == (newest(tmp_path / "cut") / name).read_bytes()
    opened = train.open_model(tmp_path / "cut", MODEL)
    jax.tree.map(np.testing.assert_array_equal, opened.params, whole.params)


@pytest.mark.slow
def test_it_samples_with_a_cache_as_without():
    """Token for token the greedy choice of a pass over the whole prefix; every weight is random, none is silent."""
    table = jax.tree.map(lambda w: dataclasses.replace(w, init=normal(0.3)), weights(CONFIG))
    params = draw_weights(CONFIG, table, jax.random.key(1))
    written = [7, 250, 3, *train.generate(CONFIG, params, [7, 250, 3], 9, model=MODEL)]
    logits = train.forward(CONFIG, params, np.array([written]), MODEL)  # causal: position t has seen written[: t + 1]
    assert jnp.argmax(logits[0, 2:-1], axis=-1).tolist() == written[3:]
