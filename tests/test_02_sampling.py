"""02's sampling: the cache, greedy and drawn tokens, and what generate refuses, against float64 NumPy.

The context is 42 and S layers see 21 keys, fewer than the 24 new tokens.
"""

import dataclasses
import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import full_compiler, quick_compiler, random_params, random_tokens, replace  # noqa: F401  (fixtures)
from reference import distance, gpt_logits, greedy_reference, widen

from onechip.errors import UserError

train = importlib.import_module("02_train")

GEN = replace(seq_len=42, window_pattern="SSL")
NEW = 24
DRAWN = dataclasses.replace(GEN, aspect_ratio=84, softcap=3.0)  # one layer: how a token is drawn depends on none
PROMPT_SEEDS = {1: 0, 5: 14, 16: 5, 17: 8, 18: 8}  # by length; those that lead to many different tokens


# ----------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("pieces", [(5, 1, 1, 5, 30), (30, 1, 5, 5, 1)], ids=str)
def test_a_cache_gives_what_the_whole_pass_gives(pieces):
    """Final hidden states of three texts, piece by piece, are those of one pass; the cache says what it has seen."""
    params, tokens = random_params(GEN), random_tokens(GEN, 3, 42)
    want, none = whole_pass()(params, tokens)
    assert none is None
    cache, parts, seen = train.empty_cache(GEN, 3, 47), [], 0
    assert cache.before.tolist() == [[-1]] * 3
    for size in pieces:
        hidden, cache = cached_pass()(params, tokens[:, seen : seen + size], cache)
        parts.append(hidden)
        seen += size
        assert int(cache.start) == seen and cache.before.tolist() == tokens[:, seen - 1 : seen].tolist()
    assert distance(np.concatenate(parts, axis=1), np.asarray(want)) < 1e-5


@functools.cache
def whole_pass():
    return jax.jit(functools.partial(train.backbone, GEN, train.GPT))


@functools.cache
def cached_pass():
    return jax.jit(lambda params, tokens, cache: train.backbone(GEN, train.GPT, params, tokens, cache))


def test_what_lies_after_start_is_never_seen():
    """A cache full of garbage from `start` on gives the bits that an empty one gives."""
    params, tokens = random_params(GEN), random_tokens(GEN, 3, 6)
    empty = train.empty_cache(GEN, 3, 47)
    garbage = empty._replace(layers=jax.tree.map(lambda a: jnp.full_like(a, 1e3), empty.layers))
    results = [cached_pass()(params, tokens[:, :5], cache) for cache in (empty, garbage)]
    results += [cached_pass()(params, tokens[:, 5:], cache) for _, cache in results]
    for (a, _), (b, _) in (results[:2], results[2:]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("full_compiler")
def test_a_new_token_copies_neither_the_cache_nor_a_weight():
    """On a CPU each of them took XLA a tenth of a token's time: no transpose or copy is of their sizes."""
    config = train.Config(n_head=2, head_dim=128, aspect_ratio=128, vocab_size=61, seq_len=99, attn_impl="einsum")
    config = dataclasses.replace(config, n_kv_head=2, dtype="float32")
    params = jax.eval_shape(functools.partial(train.init_params, config), jax.random.key(0))
    lowered = train.make_sampler(config, 56).lower(params, np.zeros((1, 16), np.int32), 3, jax.random.key(0))
    text, D, S = lowered.compile().as_text(), 256, 72
    assert re.search(rf"f32\[2,{S},128\]", text) and re.search(rf"f32\[{D},{D}\]", text)
    sizes = {math.prod(shape) for shape in ((2, S, 128), (D, D), (D, 4 * D))}
    made = re.findall(r"%(\S*(?:copy|transpose)\S*) = f32\[([\d,]+)\]", text)
    assert not [name for name, shape in made if math.prod(map(int, shape.split(","))) in sizes]


# ----------------------------------------------------------------------------------------------------------------------
# Greedy


@functools.cache
def greedy_sampler():
    return train.make_sampler(GEN, NEW)


def logits_of(config, params):
    """The float64 transformer as greedy_reference takes it."""
    wide = widen(params)
    return lambda tokens: gpt_logits(config, wide, tokens)


@pytest.mark.parametrize("length", PROMPT_SEEDS)
def test_greedy_equals_recomputing_the_whole_prefix(length):
    """Token for token: the cache holds the right keys at the right positions, and padding is never seen."""
    params = random_params(GEN, 1)
    prompt = random_tokens(GEN, 1, length, PROMPT_SEEDS[length])[0].tolist()
    tokens = train.generate(GEN, params, prompt, NEW, sampler=greedy_sampler())
    want = greedy_reference(logits_of(GEN, params), prompt, NEW)
    assert len(set(want)) > 10  # a model stuck on one token would agree with anything
    assert tokens == want


@pytest.mark.slow
def test_greedy_equals_forward_on_the_whole_prefix():
    """The same against the model's own forward pass, with as many key/value heads as query heads."""
    config = replace(n_kv_head=0, seq_len=27, window_pattern="S", vocab_size=53)
    params, prompt = random_params(config), [2, 3, 5, 7]
    forward = jax.jit(functools.partial(train.forward, config))
    tokens = list(prompt)
    for _ in range(23):
        padded = np.zeros((1, 27), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.asarray(forward(params, padded))[0, len(tokens) - 1].argmax()))
    assert train.generate(config, params, prompt, 23) == tokens[4:]


def test_a_batch_of_prompts_is_sampled_row_by_row():
    """make_sampler on several rows gives each row what it gets alone."""
    params, prompts = random_params(GEN, 1), random_tokens(GEN, 3, 5)
    together = np.asarray(greedy_sampler()(params, prompts, 5, jax.random.key(0)))
    assert together.shape == (3, NEW) and together.dtype == np.int32
    for row, prompt in zip(together, prompts, strict=True):
        assert row[:9].tolist() == greedy_reference(logits_of(GEN, params), prompt.tolist(), 9)


def test_the_first_of_the_likeliest_is_taken():
    """As numpy's argmax does; where every logit is NaN the id is still one of the vocabulary."""
    logits = np.float32([[1, 3, 2, 3], [5, 4, 5, 5], [-1, -2, -3, -0.5]])
    assert train.pick_token(logits, None, 0.0, 0).tolist() == [1, 0, 3]
    assert 0 <= train.pick_token(np.full((1, 4), np.nan, np.float32), None, 0.0, 0)[0] < 4


# ----------------------------------------------------------------------------------------------------------------------
# Drawn


def test_top_1_is_greedy_at_any_temperature():
    """With one candidate left nothing is drawn: temperature and seed do not matter."""
    params, prompt = random_params(DRAWN), [11, 3, 7]
    top_1 = train.generate(DRAWN, params, prompt, 6, temperature=2.0, top_k=1, seed=5)
    assert top_1 == greedy_reference(logits_of(DRAWN, params), prompt, 6)


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("top_k", [0, 5])
def test_sampled_tokens_follow_the_softmax_of_the_top_k(top_k):
    """4,000 draws of two tokens: only the top k appear, as often as softmax(logits / temperature) says (p > 1e-6)."""
    config, temperature, draws = DRAWN, 1.7, 4000
    params, prompt = random_params(config), [13, 4, 8]
    sampler = train.make_sampler(config, 2, temperature, top_k)
    tokens = np.asarray(sampler(params, np.tile(np.int32(prompt), (draws, 1)), 3, jax.random.key(9)))
    first = int(np.bincount(tokens[:, 0]).argmax())
    for prefix, drawn in ((prompt, tokens[:, 0]), ([*prompt, first], tokens[tokens[:, 0] == first, 1])):
        logits = gpt_logits(config, widen(params), np.array([prefix]))[0, -1]
        likely = np.argsort(-logits)[: top_k or None]
        assert set(drawn.tolist()) <= set(likely.tolist())
        weights = np.exp(logits[likely] / temperature)
        counts = np.bincount(drawn, minlength=config.vocab_size)[likely]
        limit = {5: 33.4, 31: 86.7}[len(likely)]  # chi-square with one degree of freedom fewer, p = 1e-6
        assert counts.sum() > 100 and chi_square(counts, weights / weights.sum()) < limit


def test_the_same_seed_samples_the_same_tokens():
    """Samples of a run can be repeated, and another seed gives others."""
    params = random_params(DRAWN)
    sampler = train.make_sampler(DRAWN, 16, 1.0)
    draw = lambda seed: train.generate(DRAWN, params, [1, 2], 16, temperature=1.0, seed=seed, sampler=sampler)
    assert draw(3) == draw(3) != draw(4)
    assert len(set(draw(3))) > 3  # each step has a key of its own


# ----------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    "arguments, value",
    [
        (dict(prompt=[]), "prompt=[]"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=40), "max_new_tokens=40"),
        (dict(prompt=[1] * 42, max_new_tokens=1), "max_new_tokens=1"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=32), "top_k=32"),
        (dict(temperature=-0.5), "temperature=-0.5"),
        (dict(temperature=float("nan")), "temperature=nan"),
    ],
)
def test_generate_refuses_bad_arguments(arguments, value):
    """One line with the argument and its value, where JAX would clamp an index and continue."""
    call = {"prompt": [1, 2, 3], "max_new_tokens": 4, **arguments}
    with pytest.raises(UserError) as refusal:
        train.generate(GEN, random_params(GEN), **call)
    assert str(refusal.value).startswith(f"{value}: ") and "\n" not in str(refusal.value)
