"""05's optimizer in float64 NumPy, from recipe.md: Muon for matrices as PyTorch has them, (outputs, inputs); AdamW.

One matrix at a time. What is whose is known by name here, not from a table of weights.
"""

import math

import jax
import ml_dtypes
import numpy as np

# How many axes of an array, from the left, are inputs; all that is not here is AdamW's.
INPUT_AXES = {"c_q": 1, "c_k": 1, "c_v": 1, "c_proj": 2, "c_fc": 1, "c_gate": 1, "mlp_proj": 1, "value_gate": 1}

# AdamW: the field with its rate, betas, decay, and whether the rate follows the width and the batch
ADAMW = {
    "lm_head": ("lm_head_lr", 0.8, 0.96, 0.01, True, True),
    "wte": ("embed_lr", 0.8, 0.995, 0.001, True, True),
    "value_embeds": ("value_embed_lr", 0.8, 0.995, 0.01, True, True),
    "resid_lambdas": ("resid_lr", 0.8, 0.95, 0.05, False, True),
    "x0_lambdas": ("x0_lr", 0.96, 0.95, 0.0, False, True),
    "smear_gate": ("gate_lr", 0.8, 0.95, 0.0, False, False),
    "smear_lambda": ("gate_lr", 0.8, 0.95, 0.0, False, False),
    "backout_lambda": ("gate_lr", 0.8, 0.95, 0.0, False, False),
}

POLYNOMIALS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def named(tree):
    """{path: array} of a pytree; the last part of a path is the array's name."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def name_of(path):
    """ "c_q" of "['layers'][0]['c_q']"."""
    return path.rpartition("['")[2].removesuffix("']")


# ----------------------------------------------------------------------------------------------------------------------
# Schedules and rates


def rate_factor(steps, it, warmup=40, warmdown=0.65, final=0.05):
    """The share of its peak that a rate has at 0-based step `it` of `steps`."""
    w = round(warmdown * steps)
    if it < warmup:
        return (it + 1) / warmup
    if it <= steps - w:
        return 1.0
    p = (steps - it) / w
    return p + (1 - p) * final


def momentum(steps, it, start=0.85, peak=0.97, end=0.90, rise=400, warmdown=0.65):
    """Muon's momentum: while it rises, that wins even where the warm-down has begun."""
    w = round(warmdown * steps)
    if it < rise:
        return start + (peak - start) * it / rise
    if it < steps - w:
        return peak
    fallen = (it - (steps - w)) / w
    return (1 - fallen) * peak + fallen * end


def decay_factor(steps, it):
    """The share of its peak that Muon's weight decay has."""
    return 0.5 * (1 + math.cos(math.pi * it / steps))


def scaling_reference(head_dim, vocab_size):
    """N of depth 12: matrices of the blocks, six gates of 12 inputs a head, lm_head."""
    heads = math.ceil(768 / head_dim)
    width = heads * head_dim
    return 12 * 12 * width**2 + 6 * 12 * heads + width * vocab_size


def peak_rates(config):
    """{name: the top of its rate's schedule}; "muon" for all matrices of the blocks."""
    batch = math.sqrt(config.total_batch_size * config.seq_len / 2**19)
    width = math.sqrt(768 / config.n_embd)
    rates = {"muon": config.matrix_lr * batch * config.learning_rate}
    for name, (field, _, _, _, by_width, by_batch) in ADAMW.items():
        rate = getattr(config, field) * (width if by_width else 1)
        rates[name] = rate * batch * config.learning_rate if by_batch else rate
    return rates


def peak_decay(config, params):
    """Muon's weight decay at step 0; params: {path: array} of the whole model."""
    counted = sum(p.size for path, p in params.items() if name_of(path) in {*INPUT_AXES, "lm_head"})
    batch = math.sqrt(config.total_batch_size * config.seq_len / 2**19)
    return config.weight_decay * batch * scaling_reference(config.head_dim, config.vocab_size) / counted


# ----------------------------------------------------------------------------------------------------------------------
# Updates


def frobenius(X):
    return math.sqrt((X**2).sum())


def exact(x):
    """float64 as it is."""
    return x


def in_bfloat16(x):
    """float64, rounded to what bfloat16 can hold."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def polar_express(X, kept=exact):
    """Five odd polynomials of degree 5 on the singular values of X (m, n), whose norm is brought to 1 / 1.01 first.

    kept: what becomes of every array that an operation gives, here and below.
    """
    X = kept(X / kept(1.01 * frobenius(X) + 1e-6))
    for a, b, c in kept(POLYNOMIALS):
        A = kept(X @ X.T)
        X = kept(kept(a * X) + kept(kept(kept(b * A) + kept(c * kept(A @ A))) @ X))
    return X


def direction(U, without=(), kept=exact):
    """Steps 2 to 4 on a momentum U (m outputs, n inputs)."""
    m, n = U.shape
    U = kept(U)
    if "equilibrate" not in without:
        lengths = np.sqrt((U**2).sum(axis=1))
        U = kept(U * kept(frobenius(U) / math.sqrt(m) / np.maximum(lengths, 1e-6))[:, None])
    X = polar_express(U, kept)
    return X if "renormalize" in without else X * math.sqrt(min(m, n)) / max(frobenius(X), 1e-6)


def normuon(X, V, beta2):
    """Step 5: (X, V); V (m, 1) if there are at least as many outputs as inputs, else (1, n)."""
    m, n = X.shape
    V = beta2 * V + (1 - beta2) * (X**2).mean(axis=1 if m >= n else 0, keepdims=True)
    Y = X / np.sqrt(np.maximum(V, 1e-10))
    return Y * frobenius(X) / max(frobenius(Y), 1e-10), V


def muon_reference(P, G, M, V, mu, rate, decay, beta2, without=(), kept=exact):
    """(P, M, V, doubt) after one step on a matrix (m outputs, n inputs).

    doubt (m, n): where the update is so near 0 that rounding decides its sign, and with it whether decay acts.
    """
    m, n = P.shape
    M = mu * M + (1 - mu) * G
    X = direction(M if "nesterov" in without else (1 - mu) * G + mu * M, without, kept)
    if "per_neuron" not in without:
        X, V = normuon(X, V, beta2)
    if "shape" not in without:
        rate = rate * math.sqrt(max(1.0, m / n))
    shrinks = X * P >= 0 if "cautious" not in without else np.ones_like(P)
    return P - rate * X - rate * decay * P * shrinks, M, V, np.abs(X) < 2e-5 * np.abs(X).max()


def adamw_group_reference(P, G, M, V, step, rate, beta1, beta2, decay, eps):
    """(P, M, V) after 0-based step `step` of AdamW, decay first."""
    M, V, t = beta1 * M + (1 - beta1) * G, beta2 * V + (1 - beta2) * G**2, step + 1
    return P * (1 - rate * decay) - rate * (M / (1 - beta1**t)) / (np.sqrt(V / (1 - beta2**t)) + eps), M, V


class MuonReference:
    """The whole optimizer on {path: array}: p, m and v hold what the program's state holds, in its shapes."""

    def __init__(self, config, params):
        self.config = config
        self.p = {path: np.array(p, np.float64) for path, p in named(params).items()}
        self.m = {path: np.zeros(p.shape) for path, p in self.p.items()}
        self.v = {path: np.zeros(self.moment_shape(path, p.shape)) for path, p in self.p.items()}
        self.doubt = {path: np.zeros(p.shape, bool) for path, p in self.p.items()}
        self.rates, self.decay = peak_rates(config), peak_decay(config, self.p)

    def moment_shape(self, path, shape):
        """A matrix has a number for each line of its longer side, outputs if both are equal."""
        split = INPUT_AXES.get(name_of(path))
        if split is None:
            return shape
        inputs, outputs = shape[:split], shape[split:]
        if math.prod(outputs) >= math.prod(inputs):
            return (1,) * len(inputs) + outputs
        return inputs + (1,) * len(outputs)

    def step(self, it, grads, without=()):
        """One step, in place; it: 0-based."""
        c = self.config
        share = rate_factor(c.num_iterations, it, c.warmup_steps, c.warmdown_ratio, c.final_lr_frac)
        mu = momentum(c.num_iterations, it, c.momentum_start, c.beta1, c.momentum_end, c.momentum_warmup,
                      c.warmdown_ratio)  # fmt: skip
        decay = self.decay * decay_factor(c.num_iterations, it)
        for path, g in named(grads).items():
            g, name = np.array(g, np.float64), name_of(path)
            if name in ADAMW:
                _, beta1, beta2, group_decay, _, _ = ADAMW[name]
                rest = (it, share * self.rates[name], beta1, beta2, group_decay, c.eps)
                self.p[path], self.m[path], self.v[path] = adamw_group_reference(
                    self.p[path], g, self.m[path], self.v[path], *rest
                )
                continue
            shape, kept = g.shape, self.v[path].shape
            P, G, M = (a.reshape(math.prod(shape[: INPUT_AXES[name]]), -1).T for a in (self.p[path], g, self.m[path]))
            V = self.v[path].reshape((len(P), 1) if P.shape[0] >= P.shape[1] else (1, P.shape[1]))
            P, M, V, doubt = muon_reference(P, G, M, V, mu, share * self.rates["muon"], decay, c.beta2, without)
            self.p[path], self.m[path], self.v[path] = P.T.reshape(shape), M.T.reshape(shape), V.reshape(kept)
            self.doubt[path] |= doubt.T.reshape(shape)
