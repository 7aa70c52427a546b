"""Policy-gradient losses in float64, token by token as their papers write them; gradients by central differences."""

import math

import numpy as np


def loss(algorithm, logp, old, reference, rewards, mask, groups, clip, kl, most):
    """The loss of answers: lists of rows. REINFORCE as nanochat's scripts/chat_rl.py; GRPO: equation 3 of Shao et al.
    (2024) with trl's deviation; Dr. GRPO: Liu et al. (2025)."""
    total, tokens = 0.0, sum(map(sum, mask))
    for i, row in enumerate(logp):
        same = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        mean = math.fsum(same) / len(same)
        advantage, length, answer = rewards[i] - mean, sum(mask[i]), 0.0
        if algorithm == "grpo":
            deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in same) / (len(same) - 1))
            advantage = advantage / (deviation + 1e-4)
        for t, now in enumerate(row):
            if not mask[i][t]:
                continue
            if algorithm == "reinforce":
                gain = now * advantage
            else:
                ratio = math.exp(now - old[i][t])
                gain = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
            if kl:
                d = reference[i][t] - now
                gain -= kl * (math.exp(d) - d - 1)
            answer += gain
        if algorithm == "reinforce":
            total -= answer / tokens
        elif algorithm == "grpo":
            total -= answer / max(length, 1) / len(logp)
        else:
            total -= answer / most / len(logp)
    return total


def gradient(logp, loss_of, step=1e-6):
    """d loss_of(logp) / d logp by central differences."""
    found = np.zeros(np.shape(logp))
    for at in np.ndindex(*found.shape):
        up, down = np.array(logp, np.float64), np.array(logp, np.float64)
        up[at] += step
        down[at] -= step
        found[at] = (loss_of(up.tolist()) - loss_of(down.tolist())) / (2 * step)
    return found
