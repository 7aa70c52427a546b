"""The engine on this machine's CPU, as one JSON object: tokens a second, and what speculation and int8 are worth.

    uv run bench/chat.py                          everything, some ten minutes on two cores
    uv run bench/chat.py speed speculate int8     some of it
    uv run bench/chat.py speed --shape medium     of bench/cpu.py's shapes, `small` if none is named

- `speed`: new tokens a second at batch 1, 8 and 64, next to 02's sampler in the same rounds; prompt tokens a second;
  the time from a request to its first token, of a prompt that fills half of the context.
- `speculate`: a prompt that repeats 24 tokens, continued by a model that has learned them, without and with copies from
  the text so far; the accepted share.
- `int8`: a step's weights in bytes, and tokens a second.

Each figure is the median of ROUNDS rounds, with the lowest and highest next to it; the rounds of figures that are
compared alternate. Other load on the machine lowers all of them: compare figures of one run.
"""

import dataclasses
import functools
import importlib
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
train = importlib.import_module("02_train")

import jax
import numpy as np

from onechip.answer import Request
from onechip.engine import Engine
from onechip.machine import keep_freed_memory
from onechip.quantize import quantize_weights
from onechip.speculate import CopyDraft
from onechip.weights import bytes_of, cast_weights, weight_shapes

ROUNDS, NEW = 5, 128
PLAIN = dict(attn_impl="einsum", dtype="float32", window_pattern="L", head_dim=128)
SHAPES = {
    "small": dict(n_head=2, aspect_ratio=64, vocab_size=8192, seq_len=512),
    "medium": dict(n_head=4, aspect_ratio=64, vocab_size=32768, seq_len=1024),
}


def summarize(values, digits=0):
    """Median, lowest and highest of some figures."""
    low, middle, high = (round(f(values), digits) for f in (min, statistics.median, max))
    return {"median": middle, "low": low, "high": high}


def seconds(action):
    """How long action() takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(actions, amount, rounds=ROUNDS):
    """{name: amount per second of each action}, after a first call of each, the actions taking turns."""
    for action in actions.values():
        action()
    times = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(amount / seconds(action))
    return {name: summarize(values) for name, values in times.items()}


def engine_of(config, params, **settings):
    return Engine(config, params, train.GPT, train.attention_parts(config), **settings)


def measure_speed(config, params):
    """Batches of prompts of 16 tokens; then prompts alone."""
    found, rng = {}, np.random.default_rng(0)
    for rows in (1, 8, 64):
        prompts = rng.integers(0, config.vocab_size, (rows, 16), dtype=np.int32)
        engine, sampler = engine_of(config, params, rows=rows, length=16 + NEW), train.make_sampler(config, NEW)
        requests = [Request(tokens=prompt.tolist(), max_new_tokens=NEW) for prompt in prompts]
        actions = {
            "engine": functools.partial(engine.generate_all, requests),
            "sampler of 02": lambda: jax.block_until_ready(sampler(params, prompts, 16, jax.random.key(0))),  # noqa: B023
        }
        found[f"tokens a second, batch {rows}"] = in_turn(actions, rows * NEW)
    length = config.seq_len // 2
    prompt = Request(tokens=rng.integers(0, config.vocab_size, length).tolist(), max_new_tokens=1)
    one, eight = engine_of(config, params, rows=1), engine_of(config, params, rows=8)
    one.generate_all([prompt])
    first = [1e3 * seconds(lambda: one.generate_all([prompt])) for _ in range(ROUNDS)]
    found[f"ms to the first token after {length}"] = summarize(first, 1)
    found["prompt tokens a second, 8 at once"] = in_turn(
        {"engine": lambda: eight.generate_all([prompt] * 8)}, 8 * length
    )
    return found


def teach_round(config, params, steps=30):
    """(parameters after some steps on texts that repeat 24 tokens, those tokens as a list, the last loss)."""
    config = dataclasses.replace(config, num_iterations=steps, learning_rate=3e-3)
    tokens, weights = np.random.default_rng(1).permutation(config.vocab_size)[:24], train.gpt_weights(config)
    text = np.stack([np.tile(np.roll(tokens, -3 * i), 5) for i in range(8)]).astype(np.int32)
    batch, opt = {"x": text[:, :-1], "y": text[:, 1:]}, train.adamw_init(config, weights, params)

    @jax.jit
    def step(params, opt, i):
        loss = functools.partial(train.cross_entropy, config, train.GPT)
        value, grads = jax.value_and_grad(loss)(params, batch)
        return *train.adamw_update(config, weights, params, opt, grads, i), value

    for i in range(steps):
        params, opt, value = step(params, opt, i)
    return params, tokens.tolist(), float(value)


def measure_speculation(config, params):
    """One text at a time, greedy."""
    params, tokens, loss = teach_round(config, params)
    request = Request(tokens=tokens * 4, max_new_tokens=NEW)
    drafts = {"plain": None, "copying": CopyDraft()}
    engines = {name: engine_of(config, params, rows=1, length=256, draft=draft) for name, draft in drafts.items()}
    rates = in_turn({name: functools.partial(e.generate_all, [request]) for name, e in engines.items()}, NEW)
    texts = [engine.generate_all([request])[0].tokens for engine in engines.values()]
    facts = {
        "times": round(rates["copying"]["median"] / rates["plain"]["median"], 2),
        "accepted": round(engines["copying"].accepted_share, 3),
        "same text": texts[0] == texts[1],
        "loss of the model": round(loss, 3),
    }
    return {"tokens a second": rates, **facts}


def measure_int8(config, params):
    """The same engine with matrices in float32 and in 8 bits, and what a step reads of either, and of bfloat16."""
    request = Request(tokens=list(range(16)), max_new_tokens=NEW)
    engines = {
        name: engine_of(config, params, rows=1, length=16 + NEW, int8=name == "int8") for name in ("float32", "int8")
    }
    rates = in_turn({n: functools.partial(e.generate_all, [request]) for n, e in engines.items()}, NEW)
    return {"tokens a second, batch 1": rates, "bytes of a step's weights": weight_bytes(config)}


def weight_bytes(config):
    """{dtype: bytes} of all weights that a decode step reads whole: not the embedding, of which it reads a row."""
    table = train.gpt_weights(config)
    shapes, found = weight_shapes(config, table), {}
    for name in ("float32", "bfloat16", "int8"):
        cast = functools.partial(cast_weights, table, dtype=name)
        kept = jax.eval_shape(functools.partial(quantize_weights, table) if name == "int8" else cast, shapes)
        found[name] = bytes_of({part: kept[part] for part in kept if part != "wte"})
    return found


MEASURES = {"speed": measure_speed, "speculate": measure_speculation, "int8": measure_int8}


def main(words):
    shape = words[words.index("--shape") + 1] if "--shape" in words else "small"
    config = train.Config(**PLAIN, **SHAPES[shape])
    keep_freed_memory()
    params = train.init_params(config, jax.random.key(0))
    chosen = [name for name in MEASURES if name in words] or list(MEASURES)
    print(json.dumps({"shape": shape} | {name: MEASURES[name](config, params) for name in chosen}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
