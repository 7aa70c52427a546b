"""Tiny models of three notebooks for the engine's tests, with random parameters; and what 02's `generate` writes."""

import dataclasses
import functools
import importlib

import jax
import numpy as np
from configs import draw_params, random_params, replace

from onechip.answer import Request
from onechip.engine import Engine

train = importlib.import_module("02_train")
maxtext = importlib.import_module("04_maxtext")
speedrun = importlib.import_module("05_speedrun")

NEW = 40
GPT = replace(seq_len=72, window_pattern="SSL")  # windows 36, 36 and 72; six query heads on two key/value heads
SWIGLU = maxtext.Config(
    n_embd=20, n_layer=3, n_head=4, n_kv_head=2, head_dim=10, mlp_dim=28, tile=1, vocab_size=37, seq_len=68,
    window_pattern="SL", attn_impl="einsum", dtype="float32", device_batch_size=2, total_batch_size=2, loss_slice=8,
)  # fmt: skip
NANOCHAT = speedrun.Config(  # windows of 129 keys in S layers
    depth=5, n_embd=40, head_dim=10, n_kv_head=2, vocab_size=31, seq_len=170, attn_impl="einsum", dtype="float32",
    device_batch_size=3, total_batch_size=3, num_iterations=40, loss_slice=90,
)  # fmt: skip
DRAWN = dataclasses.replace(GPT, aspect_ratio=84, softcap=3.0)  # one layer: how a token is drawn depends on none
MODELS = {"gpt": (GPT, train.GPT), "swiglu": (SWIGLU, maxtext.SWIGLU), "nanochat": (NANOCHAT, speedrun.NANOCHAT)}


@functools.cache
def params_of(name, seed=0):
    """Float32 NumPy parameters in which no weight is silent."""
    config, model = MODELS[name]
    if name == "gpt":
        return random_params(config, seed)
    D = config.n_embd
    scales = {
        "wte": 1.0, "lm_head": 1.0, "c_q": D**-0.5, "c_k": D**-0.5, "c_v": 1.5 * D**-0.5, "c_proj": 1.2 * D**-0.5,
        "c_fc": D**-0.5, "c_gate": D**-0.5, "mlp_proj": 0.5 * D**-0.5, "value_embeds": 1.0, "value_gate": 0.4,
        "smear_gate": 0.5, "resid_lambdas": 0.2, "x0_lambdas": 0.6, "smear_lambda": 0.1, "backout_lambda": 0.1,
    }  # fmt: skip
    params = draw_params(config, model.weights(config), scales, seed)
    middles = {"resid_lambdas": 1.0, "smear_lambda": 0.8, "backout_lambda": -0.5}
    return params | {name: np.float32(params[name] + value) for name, value in middles.items() if name in params}


def make_engine(name="gpt", params=None, config=None, **settings):
    """An Engine of one of MODELS; settings: of Engine."""
    own, model = MODELS[name]
    config = config or own
    return Engine(config, params or params_of(name), model, train.attention_parts(config), **settings)


def ask(tokens, max_new_tokens=NEW, **fields):
    """A Request for token ids, a list or an array."""
    return Request(tokens=[int(i) for i in tokens], max_new_tokens=max_new_tokens, **fields)


def random_prompt(config, length, seed=0):
    """Token ids: a list of int."""
    return np.random.default_rng((length, seed)).integers(0, config.vocab_size, length).tolist()


@functools.cache
def sampler(name, count):
    config, model = MODELS[name]
    return train.make_sampler(config, count, model=model)


def written(name, prompt, count, params=None):
    """The first `count` tokens of 02's `generate`, greedy: at most NEW where there is room for them."""
    config, model = MODELS[name]
    new = NEW if len(prompt) + NEW <= config.seq_len else config.seq_len - len(prompt)
    params = params or params_of(name)
    return train.generate(config, params, prompt, new, model=model, sampler=sampler(name, new))[:count]


class Compilations:
    """How many programs are compiled inside a `with` block: `count`."""

    def __enter__(self):
        self.count, self._here = 0, True
        jax.monitoring.register_event_duration_secs_listener(self._see)
        return self

    def __exit__(self, *_):
        self._here = False  # jax 0.7.2 takes no listener away

    def _see(self, event, *_, **__):
        self.count += self._here and event == "/jax/core/compile/backend_compile_duration"
