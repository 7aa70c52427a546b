"""Float64 NumPy reference of 05's model, from nanochat's definition of July 2026. It shares no code with the model.

Letters as in 02; a part whose weights are not among the parameters is left out.
"""

import math

import numpy as np
from reference import attention_reference, norm_reference, rope_reference

BASE, CAP = 100_000.0, 15.0


def sigmoid(x):
    """1 / (1 + exp(-x)), elementwise."""
    return 1 / (1 + np.exp(-x))


def nanochat_logits(params, tokens, context, pattern="SSSL", sharpness=1.2):
    """Logits (B, T, V). params: float64; context: tokens that windows are reckoned from; sharpness: of q and of k."""
    e = norm_reference(params["wte"][tokens])
    x = e.copy()
    if "smear_gate" in params:
        for t in range(1, tokens.shape[1]):
            amount = params["smear_lambda"] * sigmoid(e[:, t, :24] @ params["smear_gate"])
            x[:, t] = e[:, t] + amount[:, None] * e[:, t - 1]
    x0, count = x, len(params["layers"])
    for i, layer in enumerate(params["layers"]):
        if "resid_lambdas" in params:
            x = params["resid_lambdas"][i] * x + params["x0_lambdas"][i] * x0
        full = i == count - 1 or pattern[i % len(pattern)] == "L"
        keys = context + 1 if full else 128 * math.ceil(context / 4 / 128) + 1  # 128s to the left, and itself
        x = x + attention_output(layer, norm_reference(x), tokens, keys, sharpness)
        x = x + np.maximum(norm_reference(x) @ layer["c_fc"], 0) ** 2 @ layer["mlp_proj"]
        if i == count // 2:
            middle = x
    if "backout_lambda" in params:
        x = x - params["backout_lambda"] * middle
    return CAP * np.tanh(norm_reference(x) @ params["lm_head"] / CAP)


def attention_output(layer, h, tokens, keys, sharpness):
    """What attention over the last `keys` keys adds to the stream, (B, T, D), for its normed input h (B, T, D)."""
    q, k, v = (np.tensordot(h, layer[name], 1) for name in ("c_q", "c_k", "c_v"))
    if "value_embeds" in layer:
        gate = 3 * sigmoid(h[:, :, :12] @ layer["value_gate"])
        v = v + gate[:, :, :, None] * layer["value_embeds"][tokens].reshape(v.shape)
    q, k = (sharpness * norm_reference(rope_reference(a, BASE)) for a in (q, k))
    return np.tensordot(attention_reference(q, k, v, keys)[0], layer["c_proj"], 2)


def scaling_params_reference(depth, width, kv_width, heads, vocab, gated=None):
    """N as nanochat counts it: all in the blocks, with the gates of every other layer's value embeddings, and lm_head.

    heads: key/value heads; gated: layers with value embeddings, half of them (rounded up) if None.
    """
    block = 2 * width**2 + 2 * width * kv_width + 2 * 4 * width**2
    gated = len(range(depth - 1, -1, -2)) if gated is None else gated
    return depth * block + gated * 12 * heads + vocab * width
