"""Float64 NumPy references, written from the definitions. They share no code with what they check.

Letters as in 02: B batch, T sequence, D model, N query heads, K key/value heads, H head dimension, V vocabulary.
"""

import math

import jax
import numpy as np

EPS32 = 2.0**-23  # torch's F.rms_norm and the models add float32's epsilon to the mean square


def distance(tree, reference):
    """Largest difference over all leaves, as a share of the reference leaf's largest magnitude."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(float(np.abs(np.float64(a) - b).max() / (np.abs(np.float64(b)).max() or 1.0)) for a, b in pairs)


def relative_rms(a, reference):
    """Root mean square of the difference, as a share of the reference's."""
    return np.sqrt(np.mean((np.float64(a) - reference) ** 2) / np.mean(np.float64(reference) ** 2))


def widen(params):
    """Parameters in float64, as NumPy arrays."""
    return jax.tree.map(lambda p: np.array(p, np.float64), params)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def visible(length, window):
    """True where query t sees key s: not later, and among the last `window`. (length, length)."""
    ahead = np.subtract.outer(np.arange(length), np.arange(length))
    return (ahead >= 0) & (ahead < window)


def attention_reference(q, k, v, window, g=None, scale=None):
    """Attention, head by head: out (B, T, N, H); with an output gradient g also the gradients: (dq, dk, dv).

    scale: of the scores, 1 / sqrt(H) if None.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, heads, channels = q.shape
    scale = 1 / math.sqrt(channels) if scale is None else scale
    group, mask = heads // k.shape[2], visible(length, window)
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        for n in range(heads):
            keys, values = k[b, :, n // group], v[b, :, n // group]
            scores = np.where(mask, q[b, :, n] @ keys.T * scale, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, n] = weights @ values
            if g is not None:
                dweights = g[b, :, n] @ values.T
                dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
                dq[b, :, n] = dscores @ keys
                dk[b, :, n // group] += dscores.T @ q[b, :, n]
                dv[b, :, n // group] += weights.T @ g[b, :, n]
    return out, (dq, dk, dv)


def norm_reference(x):
    """x divided by its root mean square over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS32)


def norm_gradient_reference(x, g):
    """The gradient for x from that for norm_reference(x)."""
    y, r = norm_reference(x), 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS32)
    return r * (g - y * (g * y).mean(-1, keepdims=True))


def rope_reference(x, base, direction=1):
    """Channel i of x (B, T, heads, H) and channel i + H / 2 are turned by t * base ** (-2 i / H)."""
    half, t = x.shape[-1] // 2, np.arange(x.shape[1])[:, None]
    y = np.empty_like(x)
    for i in range(half):
        angle = direction * t * base ** (-2 * i / x.shape[-1])
        a, b = x[..., i], x[..., i + half]
        y[..., i] = a * np.cos(angle) + b * np.sin(angle)
        y[..., i + half] = -a * np.sin(angle) + b * np.cos(angle)
    return y


def raw_attention_reference(q, k, v, window, base, g=None, scale=None):
    """attention_reference of rotated and normed q and k, and its gradients for q and k as they were before that."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    turned = [rope_reference(a, base) for a in (q, k)]
    out, (dq, dk, dv) = attention_reference(*map(norm_reference, turned), v, window, g, scale)
    if g is not None:  # a rotation's gradient is the rotation back
        dq, dk = (rope_reference(norm_gradient_reference(*a), base, -1) for a in zip(turned, (dq, dk), strict=True))
    return out, (dq, dk, dv)


def windows_reference(config):
    """Every layer's window, by the design: the pattern tiled, S half the context, the last layer all of it."""
    letters = [config.window_pattern[i % len(config.window_pattern)] for i in range(config.n_layer)]
    letters[-1] = "L"
    return [config.seq_len if letter == "L" else config.seq_len // 2 for letter in letters]


# ----------------------------------------------------------------------------------------------------------------------
# 02's model


def gpt_logits(config, params, tokens):
    """The whole transformer of 02: logits (B, T, V). params: float64."""
    x = x0 = norm_reference(params["wte"][tokens])
    for i, (layer, window) in enumerate(zip(params["layers"], windows_reference(config), strict=True)):
        x = params["resid_lambdas"][i] * x + params["x0_lambdas"][i] * x0
        h = norm_reference(x)
        q, k, v = (np.tensordot(h, layer[name], 1) for name in ("c_q", "c_k", "c_v"))
        q, k = (norm_reference(rope_reference(a, config.rope_base)) for a in (q, k))
        x = x + np.tensordot(attention_reference(q, k, v, window)[0], layer["c_proj"], 2)
        x = x + np.maximum(norm_reference(x) @ layer["c_fc"], 0) ** 2 @ layer["mlp_proj"]
    return config.softcap * np.tanh(norm_reference(x) @ params["lm_head"] / config.softcap)


def losses_of_logits(logits, y):
    """Cross-entropy in nats of each target: (B, T) of logits (B, T, V) and y (B, T)."""
    loss = np.empty(y.shape)
    for b, t in np.ndindex(*y.shape):
        row = logits[b, t]
        loss[b, t] = row.max() + math.log(np.exp(row - row.max()).sum()) - row[y[b, t]]
    return loss


def greedy_reference(logits, prompt, count):
    """`count` likeliest tokens after a prompt (a list), the whole text computed again for each.

    logits: tokens (1, T) -> (1, T, V).
    """
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ----------------------------------------------------------------------------------------------------------------------
# 02's optimizer


def rate_reference(config, step):
    """The learning rate of a 0-based step, spelled out; where warm-up and warm-down overlap, the warm-up counts."""
    warmup = config.warmup_steps or max(1, round(config.warmup_ratio * config.num_iterations))
    warmdown = max(1, round(config.warmdown_ratio * config.num_iterations))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if step > config.num_iterations - warmdown:
        left = (config.num_iterations - step) / warmdown
        return config.learning_rate * (config.final_lr_frac + left * (1 - config.final_lr_frac))
    return config.learning_rate


def adamw_reference(config, params, grads, m, v, step, spared=()):
    """One step of AdamW on dicts of arrays, in place, by Loshchilov and Hutter's Algorithm 2.

    spared: names of the arrays that are not decayed.
    """
    rate, t = rate_reference(config, step), step + 1
    for name, g in grads.items():
        m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
        v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
        m_hat, v_hat = m[name] / (1 - config.beta1**t), v[name] / (1 - config.beta2**t)
        decay = 0.0 if name in spared else config.weight_decay * params[name]
        params[name] = params[name] - rate * (m_hat / (np.sqrt(v_hat) + config.eps) + decay)
