"""Reinforcement learning's arithmetic: what an answer's reward says about each of its tokens, and the loss of that.

Several answers to the same question are a group. An answer is worth its reward less the mean of its group, and each
token that the model chose gets that: likelier if the answer was better than its siblings, less likely if it was worse.
Where all answers of a group get the same reward, nobody can tell which was better, and the group teaches nothing.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

ALGORITHMS = ("reinforce", "grpo", "dr-grpo")


class Policy(NamedTuple):
    """How rewards become a loss.

    algorithm: of ALGORITHMS. clip: how far the ratio of new to old probability may move before its gradient is cut off,
    0 for no ratio at all: reinforce. kl: weight of the distance to the reference. most: tokens that an answer may have.
    """

    algorithm: str = "reinforce"
    clip: float = 0.2
    kl: float = 0.0
    most: int = 256


def group_advantages(algorithm, rewards, groups):
    """Advantages (N,) float64 of answers with rewards (N,) and group numbers (N,): reward - mean of the group.

    grpo also divides by the group's standard deviation (Shao et al., 2024), as its authors' trl does with 1e-4 added. A
    group whose rewards are all the same has advantages of exactly 0, whatever its checker says.
    """
    rewards, groups = np.asarray(rewards, np.float64), np.asarray(groups)
    advantages = np.zeros(len(rewards))
    for group in np.unique(groups):
        own = groups == group
        if np.ptp(rewards[own]) > 0:
            advantages[own] = rewards[own] - rewards[own].mean()
            if algorithm == "grpo":
                advantages[own] /= rewards[own].std(ddof=1) + 1e-4
    return advantages


def token_weights(policy, mask):
    """How much each token counts, float64 (N, T), all of them in sum what the loss is divided by; 0 where mask is 0.

    reinforce: each token the same, nanochat's. grpo: each answer the same, so that a token of a long one counts less.
    dr-grpo: each token 1 / most, whatever the lengths (Liu et al., 2025).
    """
    mask = np.asarray(mask, np.float64)
    if policy.algorithm == "reinforce":
        return mask / max(mask.sum(), 1.0)
    lengths = mask.sum(axis=1, keepdims=True) if policy.algorithm == "grpo" else policy.most
    return mask / np.maximum(lengths, 1.0) / len(mask)


def token_losses_of(policy, log_probabilities, old, reference, advantages):
    """The loss of each token (..., T), float32: what is to be weighed and added up.

    reinforce: -logp * A. grpo and dr-grpo: -min(r A, clip(r) A), r = exp(logp - old). kl adds the estimate
    exp(d) - d - 1, d = reference - logp (k3 of Schulman, 2020): never negative, and right on average.
    """
    if policy.algorithm == "reinforce":
        losses = -log_probabilities * advantages
    else:
        ratio = jnp.exp(log_probabilities - old)
        held = jnp.clip(ratio, 1 - policy.clip, 1 + policy.clip)
        losses = -jnp.minimum(ratio * advantages, held * advantages)
    if policy.kl:
        losses = losses + policy.kl * kl_estimate(log_probabilities, reference)
    return losses


def kl_estimate(log_probabilities, reference):
    """k3: exp(d) - d - 1 of each token, d = reference - log_probabilities."""
    d = reference - log_probabilities
    return jnp.exp(d) - d - 1


def policy_loss(policy, log_probabilities, old, reference, rewards, mask, groups):
    """The loss, a scalar, of answers (N, T): log-probabilities now, when they were drawn, and of the reference or None.

    rewards (N,); mask (N, T): 1 where the model chose the token; groups (N,): which question each answers.
    """
    advantages = jnp.asarray(group_advantages(policy.algorithm, rewards, groups), log_probabilities.dtype)[:, None]
    weights = jnp.asarray(token_weights(policy, mask), log_probabilities.dtype)
    losses = token_losses_of(policy, log_probabilities, old, reference, advantages)
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0))


def pass_at_k(count, right, k):
    """The probability that one of k answers is right, from `count` of which `right` are: 1 - C(n - c, k) / C(n, k).

    Without bias for k <= count (Chen et al., 2021): the share of all choices of k with a right one among them.
    """
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)
