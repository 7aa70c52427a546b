"""A small GPT-2 of random weights as a folder, and the model in float64 NumPy, written from its definition."""

import json
import math

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

# L 5 | N 3 | H 7 | D 21 | F 37 | T 23 | V 283
SIZES = {"vocab_size": 283, "n_positions": 23, "n_embd": 21, "n_layer": 5, "n_head": 3, "n_inner": 37}
WORDS = ["the plant water 1024 number of energy light", "import return self measure naïve 数据 the of of the the"]


def draw_weights(seed=0, **changes):
    """{name: array} as GPT-2's safetensors has them, float32, large enough that every part matters."""
    sizes, draw = SIZES | changes, np.random.default_rng(seed)
    d, f = sizes["n_embd"], sizes["n_inner"]
    normal = lambda *shape: draw.normal(0, 0.3, shape).astype(np.float32)
    arrays = {"wte.weight": normal(sizes["vocab_size"], d), "wpe.weight": normal(sizes["n_positions"], d)}
    for place in [f"h.{i}.ln_{k}" for i in range(sizes["n_layer"]) for k in (1, 2)] + ["ln_f"]:
        arrays |= {f"{place}.weight": 1 + normal(d), f"{place}.bias": normal(d)}
    for i in range(sizes["n_layer"]):
        for name, shape in {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, f),
            "mlp.c_proj": (f, d),
        }.items():
            arrays |= {f"h.{i}.{name}.weight": normal(*shape), f"h.{i}.{name}.bias": normal(shape[1])}
    return arrays


def write_tokenizer(path, vocab_size=SIZES["vocab_size"]):
    """A byte-level BPE of GPT-2's kind, <|endoftext|> last, as a tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    assert tokenizer.get_vocab_size() == vocab_size - 1
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path.write_text(tokenizer.to_str())


def write_gpt2(folder, arrays=None, settings=None):
    """A folder as the Hub has GPT-2's; returns its arrays."""
    arrays = draw_weights() if arrays is None else arrays
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "layer_norm_epsilon": 1e-3, **SIZES}
    about |= {"bos_token_id": SIZES["vocab_size"] - 1, "eos_token_id": SIZES["vocab_size"] - 1}
    (folder / "config.json").write_text(json.dumps(about | (settings or {})))
    save_file(arrays, folder / "model.safetensors")
    write_tokenizer(folder / "tokenizer.json")
    opening = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(opening))
    return arrays


def reference_logits(arrays, tokens, heads=SIZES["n_head"], epsilon=1e-3):
    """Logits (T, V) of one sequence, float64: a loop over heads and positions."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x, place):
        deviation = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
        return (x - x.mean(axis=-1, keepdims=True)) / deviation * w[f"{place}.weight"] + w[f"{place}.bias"]

    linear = lambda x, place: x @ w[f"{place}.weight"] + w[f"{place}.bias"]
    gelu = lambda u: 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    x = np.array([w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(tokens)])
    width = x.shape[1] // heads
    for i in range(sum(name.endswith("attn.c_attn.bias") for name in w)):
        qkv, mixed = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), np.zeros_like(x)
        q, k, v = qkv[:, : x.shape[1]], qkv[:, x.shape[1] : 2 * x.shape[1]], qkv[:, 2 * x.shape[1] :]
        for n in range(heads):
            own = slice(n * width, (n + 1) * width)
            for t in range(len(tokens)):
                weight = np.exp(k[: t + 1, own] @ q[t, own] / math.sqrt(width))
                mixed[t, own] = weight / weight.sum() @ v[: t + 1, own]
        x = x + linear(mixed, f"h.{i}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def reference_score(arrays, text, limit=SIZES["n_positions"]):
    """(nats, count, exact) of a Text, cropped to its last `limit` tokens, float64."""
    extra = max(0, len(text.tokens) - limit)
    tokens, start, end = text.tokens[extra:], text.start - extra, text.end - extra
    logits = reference_logits(arrays, tokens)
    nats = [np.log(np.exp(logits[t - 1]).sum()) - logits[t - 1, tokens[t]] for t in range(start, end)]
    return sum(nats), end - start, all(logits[t - 1].argmax() == tokens[t] for t in range(start, end))
