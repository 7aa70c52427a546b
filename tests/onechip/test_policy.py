"""policy: each loss next to a float64 reference, checkers that say nothing, pass@k by counting."""

import itertools

import jax
import numpy as np
import pytest
import reference_policy

from onechip.policy import ALGORITHMS, Policy, group_advantages, pass_at_k, policy_loss, token_weights

N, T, CLIP, MOST = 9, 7, 0.15, 11


def drawn(seed=0):
    """Log-probabilities now, old and of the reference; rewards, a mask with an empty row, groups of 2, 3 and 4 that are
    not next to each other. No ratio lies where clipping begins, nor where a difference would step over it."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (N, T))
    ratio = rng.choice([0.7, 0.95, 1.0, 1.1, 1.4], (N, T))
    mask = rng.random((N, T)) < 0.6
    mask[3] = False
    groups = np.array([5, 2, 5, 8, 2, 8, 8, 5, 8])
    return old + np.log(ratio), old, old + rng.normal(0, 0.3, (N, T)), rng.random(N), mask.astype(int), groups


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_value_and_gradient_are_the_references(algorithm, kl):
    """In float64, to rounding and to what a difference can tell; the gradient where the mask is 0 is exactly 0."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        logp, old, reference, rewards, mask, groups = drawn()
        policy = Policy(algorithm, CLIP, kl, MOST)
        rest = old, reference if kl else None, rewards, mask, groups
        value, grads = jax.value_and_grad(lambda p: policy_loss(policy, p, *rest))(jax.numpy.asarray(logp))
        lists = [old.tolist(), reference.tolist(), rewards.tolist(), mask.tolist(), groups.tolist()]
        loss_of = lambda rows: reference_policy.loss(algorithm, rows, *lists, CLIP, kl, MOST)
        assert value.dtype == np.float64 and float(value) == pytest.approx(loss_of(logp.tolist()), rel=1e-12)
        np.testing.assert_allclose(grads, reference_policy.gradient(logp, loss_of), rtol=1e-7, atol=1e-9)
        assert not np.any(np.asarray(grads)[mask == 0]) and np.any(np.asarray(grads)[mask == 1])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checker_that_always_says_the_same_teaches_nothing(algorithm, reward):
    """Advantages, loss and gradient are exactly 0, and no NaN comes from a deviation of 0; 0.3 has no exact mean."""
    logp, old, _, _, mask, groups = drawn()
    rewards = np.full(N, reward)
    assert not group_advantages(algorithm, rewards, groups).any()
    loss = lambda p: policy_loss(Policy(algorithm), p, np.float32(old), None, rewards, mask, groups)
    value, grads = jax.value_and_grad(loss)(np.float32(logp))
    assert float(value) == 0 and not np.any(np.asarray(grads))


def test_a_group_of_one_and_no_chosen_token_are_no_division_by_zero():
    assert group_advantages("grpo", [0.7, 0.2, 0.4], [1, 2, 2])[0] == 0
    for algorithm in ALGORITHMS:
        assert not token_weights(Policy(algorithm), np.zeros((2, 3))).any()


def test_the_weights_say_what_a_long_answer_counts():
    """Answers of 1 and 3 tokens: every token alike, every answer alike, or every token 1 / most."""
    mask = [[1, 0, 0], [1, 1, 1]]
    sums = {a: token_weights(Policy(a, most=10), mask).sum(axis=1) for a in ALGORITHMS}
    np.testing.assert_allclose(sums["reinforce"], [1 / 4, 3 / 4])
    np.testing.assert_allclose(sums["grpo"], [1 / 2, 1 / 2])
    np.testing.assert_allclose(sums["dr-grpo"], [1 / 20, 3 / 20])


def test_pass_at_k_is_the_share_of_choices_with_a_right_answer():
    """For all n up to 7, by listing every choice of k."""
    for n in range(1, 8):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([i < right for i in range(n)], k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
