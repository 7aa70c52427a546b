"""A model that follows a script, its tokens are letters: what is read and written is seen in a test's own words."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
from configs import replace

from onechip.conversations import ChatTokens
from onechip.weights import Weight, constant

train = importlib.import_module("02_train")

LETTERS = "0123456789+-*/() .abcdefghijklmnopqrstuvwxyz"
SPECIAL = dict(zip(ChatTokens._fields[:-1], range(len(LETTERS), len(LETTERS) + 9), strict=True))
TOKENS = ChatTokens(**SPECIAL, encode=lambda text: [LETTERS.index(letter) for letter in text])
CONFIG = replace(seq_len=400, vocab_size=len(LETTERS) + 9, n_kv_head=6, aspect_ratio=84)


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


def embed(config, params, tokens, before):
    return jnp.zeros((*tokens.shape, config.n_embd))


def block(config, params, i, streams, tokens, attend):
    """Attention that counts: with equal scores, the mean of values that are 1 at <|bos|> is 1 / tokens so far."""
    B, T = tokens.shape
    ones = jnp.ones((B, T, config.n_head, config.head_dim))
    first = (tokens == TOKENS.bos)[..., None, None].astype(ones.dtype)
    mean, past = attend(ones * 0, ones * 0, ones * first)
    return streams[-1].at[..., 0].set(1 / mean[:, :, 0, 0]), past


def readout(config, params, streams):
    position = jnp.round(streams[-1][..., 0]).astype(jnp.int32) - 1
    return jax.nn.one_hot(params["script"].astype(jnp.int32)[position], config.n_embd)


def weights(config):
    script = Weight("T", constant(0.0), "scalar")
    return {"lm_head": train.gpt_weights(config)["lm_head"], "script": script}


SCRIPTED = train.Model("scripted", train.Config, weights, embed, block, readout)


def script_params(script):
    """Parameters of a model whose token at position p is script[p - 1], whatever it read."""
    padded = np.zeros(CONFIG.seq_len, np.float32)
    padded[: len(script)] = script
    return {"lm_head": np.eye(CONFIG.n_embd, CONFIG.vocab_size, dtype=np.float32), "script": padded}


def script_of(*parts):
    """Ids of a script: of strings, ids, and as many places as a tuple says, whose tokens will be forced."""
    ids = []
    for part in parts:
        if isinstance(part, str):
            ids += TOKENS.encode(part)
        else:
            ids += [TOKENS.bos] * part[0] if isinstance(part, tuple) else [part]
    return ids


class LetterTokenizer:
    """What the rooms use of a tokenizers.Tokenizer."""

    def token_to_id(self, name):
        return SPECIAL[name.strip("<|>")]

    def encode(self, text, add_special_tokens):
        return types.SimpleNamespace(ids=TOKENS.encode(text))

    def decode(self, ids, skip_special_tokens):
        return decode(ids)

    def to_str(self):
        return LETTERS
