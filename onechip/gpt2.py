"""OpenAI's GPT-2 in JAX, for scoring: what others publish of it can be reproduced without PyTorch.

Radford et al. (2019): LayerNorm before attention and MLP, biases, learned positions, GELU by tanh, the embedding as the
head. Weights are those of the Hub's openai-community/gpt2 and its larger siblings: config.json, model.safetensors,
tokenizer.json.
"""

import collections
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from onechip.errors import UserError, first_line, require
from onechip.files import read_json
from onechip.questions import Score
from onechip.statefile import stored_arrays
from onechip.texts import BATCH_TOKENS, batches, crop, padded_lengths

OPENING = "<|endoftext|>"
READ_AT_ONCE = 256  # scored tokens whose logits are there together: 51 MB of 50,257


class GPT2Config(NamedTuple):
    """The numbers of config.json that decide what is computed."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float


def read_config(path):
    """The GPT2Config in a config.json; UserError for a model that this room does not compute."""
    about = read_json(path)
    fixed = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True}
    fixed |= {"scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "add_cross_attention": False}
    for name, value in fixed.items():
        require(about.get(name, value) == value, f"{path}: {name}", about.get(name), f"only {value!r} is computed here")
    sizes = {name: about.get(name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    sizes["n_inner"] = about.get("n_inner") or 4 * (about.get("n_embd") or 0)
    for name, value in sizes.items():
        require(type(value) is int and value > 0, f"{path}: {name}", value, "must be a positive integer")
    require(sizes["n_embd"] % sizes["n_head"] == 0, f"{path}: n_embd", sizes["n_embd"], "must be a multiple of n_head")
    epsilon = about.get("layer_norm_epsilon", 1e-5)
    require(isinstance(epsilon, float) and epsilon > 0, f"{path}: layer_norm_epsilon", epsilon, "must be above 0")
    return GPT2Config(**sizes, layer_norm_epsilon=epsilon)


def array_shapes(config):
    """{name: shape} of the file's arrays: those of the whole model, and "h." + name for those that each layer has."""
    d, f = config.n_embd, config.n_inner
    whole = {"wte.weight": (config.vocab_size, d), "wpe.weight": (config.n_positions, d)}
    whole |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    layer = {f"ln_{i}.{part}": (d,) for i in (1, 2) for part in ("weight", "bias")}
    for name, fan_in, fan_out in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, f)):
        layer |= {f"{name}.weight": (fan_in, fan_out), f"{name}.bias": (fan_out,)}
    layer |= {"mlp.c_proj.weight": (f, d), "mlp.c_proj.bias": (d,)}
    return whole | {f"h.{name}": shape for name, shape in layer.items()}


def read_params(config, path):
    """The arrays of a model.safetensors in float32, {name: array} as array_shapes has them, layers stacked in front.

    UserError if one is absent or has another shape. Names may have the prefix "transformer."; the causal masks that old
    files carry, and a second copy of the embedding as the head, are left out.
    """
    stored = {name.removeprefix("transformer."): array for name, array in stored_arrays(path).items()}

    def read(name, shape):
        require(name in stored, f"{path}: {name}", None, "is absent: get the file again")
        require(stored[name].shape == shape, f"{path}: {name}", stored[name].shape, f"config.json says {shape}")
        return stored[name].read().astype(np.float32)

    params = {}
    for name, shape in array_shapes(config).items():
        if name.startswith("h."):
            rows = [read(f"h.{i}.{name[2:]}", shape) for i in range(config.n_layer)]
            params[name] = jnp.asarray(np.stack(rows))
        else:
            params[name] = jnp.asarray(read(name, shape))
    if "lm_head.weight" in stored:
        same = np.array_equal(read("lm_head.weight", (config.vocab_size, config.n_embd)), params["wte.weight"])
        require(same, f"{path}: lm_head.weight", "not wte.weight", "only the embedding as the head is computed here")
    return params


def layer_norm(x, weight, bias, epsilon):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis."""
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + epsilon) * weight + bias


def final_states(config, params, tokens):
    """tokens (B, T) int32 -> float32 (B, T, D), after the last norm; the head is the embedding, transposed."""
    n, epsilon = config.n_head, config.layer_norm_epsilon
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))

    def layer(x, w):
        norm = lambda x, name: layer_norm(x, w[f"h.{name}.weight"], w[f"h.{name}.bias"], epsilon)
        linear = lambda x, name: x @ w[f"h.{name}.weight"] + w[f"h.{name}.bias"]
        q, k, v = (
            part.reshape(*x.shape[:2], n, -1) for part in jnp.split(linear(norm(x, "ln_1"), "attn.c_attn"), 3, -1)
        )
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(causal, logits, -jnp.inf)), v)
        x = x + linear(mixed.reshape(x.shape), "attn.c_proj")
        return x + linear(jax.nn.gelu(linear(norm(x, "ln_2"), "mlp.c_fc"), approximate=True), "mlp.c_proj"), None

    with jax.default_matmul_precision("highest"):  # published figures are float32's
        x = params["wte.weight"][tokens] + params["wpe.weight"][:length]
        x, _ = jax.lax.scan(layer, x, {name: w for name, w in params.items() if name.startswith("h.")})
        return layer_norm(x, params["ln_f.weight"], params["ln_f.bias"], epsilon)


def read_out(params, hidden, places, targets):
    """hidden (B, T, D), places (P,) in its B * T rows -> nats of targets (P,), and whether each is likeliest."""
    with jax.default_matmul_precision("highest"):
        logits = hidden.reshape(-1, hidden.shape[-1])[places] @ params["wte.weight"].T
    own = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - own, jnp.argmax(logits, axis=1) == targets


def make_text_scorer(config, params, budget=BATCH_TOKENS):
    """A function of texts, list[Text] -> list[Score]. A text beyond the context keeps its last tokens, see `crop`.

    budget: tokens in a batch. One program for each padded length, one for the head, which sees scored tokens only.
    """
    states = jax.jit(lambda params, tokens: final_states(config, params, tokens))
    head = jax.jit(read_out)

    def run(texts, length):
        """[(nats, hit)] of the scored tokens, in order, READ_AT_ONCE at a time, on the device."""
        tokens = np.zeros((max(1, budget // length), length), np.int32)
        for row, text in zip(tokens, texts, strict=False):
            row[: len(text.tokens)] = text.tokens
        hidden, parts = states(params, tokens), []
        places = np.concatenate([i * length + np.arange(t.start - 1, t.end - 1) for i, t in enumerate(texts)])
        targets = np.concatenate([np.asarray(t.tokens[t.start : t.end], np.int32) for t in texts])
        for at in range(0, len(places), READ_AT_ONCE):
            chunk = [part[at : at + READ_AT_ONCE].astype(np.int32) for part in (places, targets)]
            parts.append(head(params, hidden, *(np.pad(part, (0, READ_AT_ONCE - len(part))) for part in chunk)))
        return parts

    def score_texts(texts):
        texts = [crop(text, config.n_positions) for text in texts]
        scores, waiting = [None] * len(texts), collections.deque()

        def finish(indices, parts):
            nats = np.concatenate([np.zeros(0), *(np.asarray(part[0], np.float64) for part in parts)])
            hits = np.concatenate([np.zeros(0, bool), *(np.asarray(part[1]) for part in parts)])
            at = 0
            for i in indices:
                own = slice(at, at := at + texts[i].end - texts[i].start)
                scores[i] = Score(float(nats[own].sum()), own.stop - own.start, bool(hits[own].all()))

        for indices, length in batches(texts, padded_lengths(config.n_positions), budget):
            waiting.append((indices, run([texts[i] for i in indices], length)))
            if len(waiting) > 1:  # the device works on the next batch meanwhile
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
        return scores

    return score_texts


def read_tokenizer(path, config):
    """(encode, bos) of a tokenizer.json: encode(texts) -> [ids], special tokens in them are text."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json ({first_line(error)}); get it again") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos, size = tokenizer.token_to_id(OPENING), tokenizer.get_vocab_size()
    require(bos is not None, f"{path}: {OPENING}", None, "GPT-2's tokenizer has it")
    require(size <= config.vocab_size, f"{path}: vocabulary", size, f"config.json says {config.vocab_size}")
    return lambda texts: [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)], bos
