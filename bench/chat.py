"""The engine on this machine's CPU, as one JSON object: tokens a second, and what speculation and int8 are worth.

    uv run bench/chat.py                          everything, some ten minutes on two cores
    uv run bench/chat.py speed speculate int8     some of it
    uv run bench/chat.py speed --shape medium     of bench/cpu.py's shapes, `small` if none is named
    uv run bench/chat.py int8 --run runs/NAME     what 8 bits cost a trained model, of 02's, 04's or 05's
    uv run bench/chat.py v6e                      a decode step of 02's default model, compiled for the chip

- `speed`: new tokens a second at batch 1, 8 and 64, next to 02's sampler in the same rounds; prompt tokens a second;
  the time from a request to its first token, of a prompt that fills half of the context.
- `speculate`: a prompt that repeats 24 tokens, continued by a model that has learned them, without and with copies from
  the text so far; the accepted share.
- `int8`: a step's weights in bytes, and tokens a second; with --run also bits per byte of the offline corpus's held-out
  documents, about 300 kB, with matrices as they are and in 8 bits.
- `v6e`, only where it is named: bytes of weights and of the cache that a step of batch 1 reads when a text fills the
  context, the bytes that XLA's cost analysis counts, and tokens a second at 1.64e12 bytes a second of HBM. The program
  is compiled for the chip and not run: an upper bound, not a measurement. Needs libtpu.

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
tok, train = importlib.import_module("01_tokenizer"), importlib.import_module("02_train")

import jax
import jax.numpy as jnp
import numpy as np

from onechip.answer import TextRequest
from onechip.chips import topology_devices
from onechip.decoding import Decoder
from onechip.engine import Engine, blank_turn
from onechip.machine import keep_freed_memory
from onechip.quantize import quantize_weights, widen_weights
from onechip.ring import empty_rings
from onechip.speculate import CopyDraft
from onechip.texts import bits_per_byte, first_documents
from onechip.weights import bytes_of, cast_weights, weight_shapes

ROUNDS, NEW = 5, 128
HELD_OUT_BYTES = 300_000
V6E_BYTES_A_SECOND = 1.64e12  # of HBM, as published
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
        requests = [TextRequest(tokens=prompt.tolist(), max_new_tokens=NEW) for prompt in prompts]
        actions = {
            "engine": functools.partial(engine.generate_all, requests),
            "sampler of 02": lambda: jax.block_until_ready(sampler(params, prompts, 16, jax.random.key(0))),  # noqa: B023
        }
        found[f"tokens a second, batch {rows}"] = in_turn(actions, rows * NEW)
    length = config.seq_len // 2
    prompt = TextRequest(tokens=rng.integers(0, config.vocab_size, length).tolist(), max_new_tokens=1)
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
    request = TextRequest(tokens=tokens * 4, max_new_tokens=NEW)
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
    request = TextRequest(tokens=list(range(16)), max_new_tokens=NEW)
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
        prepare, dtype = (quantize_weights, config.dtype) if name == "int8" else (cast_weights, name)
        kept = jax.eval_shape(functools.partial(prepare, table, dtype=dtype), shapes)
        found[name] = bytes_of({part: kept[part] for part in kept if part != "wte"})
    return found


def measure_bits(source):
    """Bits per byte of held-out documents by a trained model in float32, before and after its matrices go to 8 bits."""
    config, params, tokenizer, model = train.open_model(source)
    table, found = model.weights(config), {}
    documents = first_documents((text for _, text in tok.read_documents(tok.offline_corpus().val)), HELD_OUT_BYTES)
    encode, bos = functools.partial(tok.encode_batch, tokenizer), tok.opening_id(tokenizer)
    answerer = train.make_answerer(config, model, train.make_mesh())
    for name in ("float32", "int8"):
        kept = quantize_weights(table, params, "float32") if name == "int8" else params
        kept = jax.jit(lambda p: widen_weights(p, "float32", jnp.zeros(())))(kept)
        found[name] = bits_per_byte(documents, encode, bos, answerer(kept), config.seq_len).per_byte
    change = found["int8"] / found["float32"] - 1
    return {name: round(bits, 5) for name, bits in found.items()} | {"change in percent": round(100 * change, 3)}


def compile_decoding(config, int8, length, at_once=32):
    """`write_tokens` for one row and a text of `length` tokens, compiled for a v6e: a jax.stages.Compiled."""
    place = jax.sharding.SingleDeviceSharding(topology_devices("v6e:1x1")[0])
    on_chip = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place))
    decoder, table = Decoder(config, train.GPT, train.attention_parts(config), length), train.gpt_weights(config)
    prepare = functools.partial(quantize_weights if int8 else cast_weights, table, dtype=config.dtype)
    params = jax.eval_shape(prepare, weight_shapes(config, table))
    rings = jax.eval_shape(functools.partial(empty_rings, config, 1, length))
    write = jax.jit(functools.partial(decoder.write_tokens, span=length), donate_argnums=1)
    return write.lower(on_chip(params), on_chip(rings), on_chip(blank_turn(1, at_once))).compile()


def estimate_v6e():
    """{dtype: bytes a step reads, and tokens a second if HBM is all that counts} of 02's default model."""
    config, found = train.Config(), {}
    rings = bytes_of(jax.eval_shape(functools.partial(empty_rings, config, 1, config.seq_len)))
    for name in ("bfloat16", "int8"):
        compiled = compile_decoding(config, name == "int8", config.seq_len)
        weights = weight_bytes(config)[name]
        counted = compiled.cost_analysis().get("bytes accessed", 0)
        found[name] = {
            "MB of weights": round(weights / 1e6, 1),
            "MB of keys and values": round(rings / 1e6, 1),
            "MB by cost analysis": round(counted / 1e6, 1),
            "MB of temporary arrays": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
            "tokens a second at most": round(V6E_BYTES_A_SECOND / (weights + rings)),
        }
    return found


MEASURES = {"speed": measure_speed, "speculate": measure_speculation, "int8": measure_int8}


def main(words):
    option = lambda name, default: words[words.index(name) + 1] if name in words else default
    shape, source = option("--shape", "small"), option("--run", "")
    config = train.Config(**PLAIN, **SHAPES[shape])
    keep_freed_memory()
    chosen = [name for name in [*MEASURES, "v6e"] if name in words] or list(MEASURES)
    params, found = train.init_params(config, jax.random.key(0)), {"shape": shape}
    for name in chosen:
        found[name] = estimate_v6e() if name == "v6e" else MEASURES[name](config, params)
    if source and "int8" in chosen:
        found["int8"]["bits per byte"] = measure_bits(source)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
