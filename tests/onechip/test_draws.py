"""How a row's next token is drawn: against float64 references, 02's pick_token, and tokens of other rows."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import quick_compiler  # noqa: F401  (a fixture for every test)

from onechip.draws import Knobs, choose, keep_likely, log_probability

train = importlib.import_module("02_train")
choose_jit = jax.jit(choose)


def knobs(rows, temperature=1.0, top_k=0, top_p=1.0, seeds=None):
    full = lambda value, dtype: np.full(rows, value, dtype)
    seeds = np.arange(rows, dtype=np.uint32) if seeds is None else seeds
    return Knobs(full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32), seeds)


def kept_reference(logits, top_k, top_p):
    """Which of (V,) float64 logits may be drawn: sorted, cut at k, then at the fewest whose share reaches p."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    p = np.exp(logits[order] - logits.max())
    shares = np.cumsum(p / p.sum())
    count = len(order) if top_p == 1 else int(np.searchsorted(shares, top_p)) + 1
    kept = np.zeros(len(logits), bool)
    kept[order[:count]] = True
    return kept


@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_top_k_and_top_p_keep_what_a_sorted_reference_keeps(scale):
    """401 logits, wide and narrow: the same ones, for every k and p, each row with its own."""
    rng = np.random.default_rng(0)
    cases = [(k, p) for k in (0, 1, 2, 17, 401) for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)]
    logits = np.float32(scale * rng.normal(size=(len(cases), 401)))
    top_k, top_p = np.int32([k for k, _ in cases]), np.float32([p for _, p in cases])
    kept = np.isfinite(np.asarray(jax.jit(keep_likely)(logits, top_k, top_p)))
    want = [kept_reference(row.astype(np.float64), k, float(p)) for row, k, p in zip(logits, top_k, top_p, strict=True)]
    np.testing.assert_array_equal(kept, want)
    assert 1 == kept.sum(axis=1).min() and kept.sum(axis=1).max() == 401


def test_equal_logits_at_the_floor_all_stay():
    """As 02's pick_token has it; and where all are equal, all stay."""
    logits = np.float32([[3, 1, 2, 2, 2], [5, 5, 5, 5, 5]])
    kept = np.isfinite(np.asarray(keep_likely(logits, np.int32([2, 3]), np.ones(2, np.float32))))
    assert kept.tolist() == [[True, False, True, True, True], [True] * 5]


@pytest.mark.parametrize("top_k", [0, 7])
def test_draws_are_distributed_as_pick_tokens(top_k):
    """20,000 of each from the same 23 logits: a two-sample chi-square with p > 1e-6."""
    draws, temperature = 20_000, 1.4
    logits = np.tile(np.float32(1.5 * np.random.default_rng(1).normal(size=23)), (draws, 1))
    ours = choose_jit(logits, knobs(draws, temperature, top_k), np.full(draws, 9))
    theirs = jax.jit(functools.partial(train.pick_token, temperature=temperature, top_k=top_k))(
        logits, jax.random.key(4)
    )
    a, b = (np.bincount(np.asarray(tokens), minlength=23) for tokens in (ours, theirs))
    some = a + b > 0
    assert some.sum() == (top_k or 23)
    limit = {7: 39.0, 23: 73.7}[int(some.sum())]  # one degree of freedom fewer, p = 1e-6
    assert ((a - b)[some] ** 2 / (a + b)[some]).sum() < limit


def test_draws_depend_on_seed_and_position_alone():
    """Among other rows, in another order, with other knobs next to it: the same token; other positions: others."""
    rng = np.random.default_rng(2)
    logits, seeds, positions = np.float32(rng.normal(size=(40, 61))), np.uint32(rng.permutation(40)), np.arange(40) % 7
    whole = np.asarray(choose_jit(logits, knobs(40, seeds=seeds), positions))
    back = slice(None, None, -1)
    np.testing.assert_array_equal(choose_jit(logits[back], knobs(40, seeds=seeds[back]), positions[back]), whole[back])
    alone = [choose_jit(logits[i : i + 1], knobs(1, seeds=seeds[i : i + 1]), positions[i : i + 1])[0] for i in range(9)]
    assert [int(token) for token in alone] == whole[:9].tolist()
    same = np.tile(logits[:1], (40, 1))
    assert len(set(np.asarray(choose_jit(same, knobs(40, seeds=np.zeros(40, np.uint32)), np.arange(40))).tolist())) > 15


def test_temperature_0_takes_the_first_of_the_likeliest():
    """Next to rows that draw; an id of the vocabulary even where every logit is NaN."""
    logits = np.float32([[1, 3, 2, 3], [5, 4, 5, 5], [np.nan] * 4, [0, 1, 2, 9]])
    mixed = knobs(4)._replace(temperature=np.float32([0, 0, 0, 1]), top_k=np.int32([0, 0, 0, 1]))
    found = np.asarray(choose_jit(logits, mixed, np.arange(4)))
    assert found[[0, 1, 3]].tolist() == [1, 0, 3] and 0 <= found[2] < 4
    assert np.asarray(choose_jit(logits, knobs(4, 0.0), np.arange(4)))[:2].tolist() == [1, 0]


def test_log_probabilities_are_of_the_plain_softmax():
    """Against float64."""
    logits = np.float32(4 * np.random.default_rng(3).normal(size=(5, 29)))
    tokens = np.int32([3, 28, 0, 7, 7])
    wide = logits.astype(np.float64)
    want = (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))[np.arange(5), tokens]
    np.testing.assert_allclose(log_probability(jnp.asarray(logits), tokens), want, atol=1e-5)
