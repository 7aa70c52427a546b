"""How far bfloat16 may be from the truth: each piece of a step in float64 NumPy, rounded where bfloat16 rounds.

A tolerance is the error of a small case in float64, with inputs, products' results and outputs rounded to bfloat16,
against the same case that is not rounded. What a chip computes is held to MARGIN times that. Relative errors hardly
depend on the size, so a small case serves for a large one.
"""

import functools
import math

import ml_dtypes
import numpy as np

MARGIN = 2.0  # of root mean squares
MARGIN_ROW = 3.0  # of the worst row: a large case has more of them
EPS32 = 2.0**-23


def to_bfloat16(a):
    """float64 values, each rounded to the nearest bfloat16."""
    return np.float64(np.asarray(a, np.float32).astype(ml_dtypes.bfloat16))


def as_is(a):
    return a


def errors_between(found, wanted):
    """(rms of the difference over the rms of `wanted`, the same of the worst row), a row being the last axis.

    A row is measured against its own size plus that of all rows, so that one of nearly zeros does not count.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    rms = lambda a, axis=None: np.sqrt(np.mean(np.square(a), axis=axis))
    whole = rms(wanted) or 1.0
    difference = found - wanted
    return float(rms(difference) / whole), float(np.max(rms(difference, -1) / (rms(wanted, -1) + whole)))


def due(compute):
    """{array: (rms, worst row)} that are due, margins included; compute(rounding) -> {array: float64 values}."""
    exact, rounded = compute(as_is), compute(to_bfloat16)
    pairs = {name: errors_between(rounded[name], exact[name]) for name in exact}
    return {name: (MARGIN * rms, MARGIN_ROW * worst) for name, (rms, worst) in pairs.items()}


def judge(found, wanted, allowed):
    """{array: (error, the largest that is right)}: of rms and worst row the one that is nearer to its limit."""
    judged = {}
    for name in found:
        pairs = zip(errors_between(found[name], wanted[name]), allowed[name], strict=True)
        judged[name] = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else math.inf)
    return judged


def draw(seed, **shapes):
    """{name: normal values that bfloat16 holds, as float64}."""
    rng = np.random.default_rng(seed)
    return {name: to_bfloat16(rng.normal(size=shape)) for name, shape in shapes.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The pieces, with a rounding handed in


def turn(x, cos, sin):
    """RoPE of x (T, H); with -sin it turns back. cos, sin (T, H) as a model has them."""
    return x * cos + np.roll(x, x.shape[1] // 2, 1) * sin


def turn_and_norm(x, cos, sin):
    """(normed, rotated x (T, H), 1 / rms(x))."""
    r = 1 / np.sqrt(np.mean(x * x, 1, keepdims=True) + EPS32)
    return turn(x, cos, sin) * r, r


def turn_and_norm_gradient(x, g, cos, sin):
    """The gradient for x from that for turn_and_norm(x)."""
    r = turn_and_norm(x, cos, sin)[1]
    y, g = x * r, turn(g, cos, -sin)
    return r * (g - y * np.mean(g * y, 1, keepdims=True))


def attention_pieces(q, k, v, g, cos, sin, window, scale, rounded):
    """{"out", "dq", "dk", "dv"} of one head, (T, H) each, of q and k as they leave their products."""
    T = len(q)
    qn, kn = (rounded(turn_and_norm(a, cos, sin)[0]) for a in (q, k))
    ahead = np.subtract.outer(np.arange(T), np.arange(T))
    p = np.exp(np.where((ahead >= 0) & (ahead < window), qn @ kn.T * scale, -np.inf))
    p = rounded(p / p.sum(1, keepdims=True))
    out, dp = rounded(p @ v), rounded(g @ v.T)
    ds = rounded(p * (dp - np.sum(out * g, 1, keepdims=True)))
    dqn, dkn = rounded(ds @ kn * scale), rounded(ds.T @ qn * scale)
    dq, dk = (rounded(turn_and_norm_gradient(a, d, cos, sin)) for a, d in ((q, dqn), (k, dkn)))
    return {"out": out, "dq": dq, "dk": dk, "dv": rounded(p.T @ g)}


def loss_pieces(h, head, y, softcap, rounded):
    """{"losses" (M, 1), "dh", "dhead"} of hidden states h (M, D), lm_head (D, V), targets y (M,); softcap 0: none."""
    rows = np.arange(len(y))
    z = rounded(h @ head)
    t = np.tanh(z / softcap) if softcap else 0.0
    z, slope = (softcap * t, 1 - t * t) if softcap else (z, np.ones_like(z))
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    losses = -np.log(p[rows, y])[:, None]
    dz = p * slope
    dz[rows, y] -= slope[rows, y]
    dz = rounded(dz) / len(y)
    return {"losses": losses, "dh": rounded(dz @ head.T), "dhead": rounded(rounded(h).T @ dz)}


def norm_pieces(x, g, cos, sin, rounded):
    """{"out", "dx"} of RoPE and norm, x (T, H)."""
    out, dx = turn_and_norm(x, cos, sin)[0], turn_and_norm_gradient(x, g, cos, sin)
    return {"out": rounded(out), "dx": rounded(dx)}


def relu_pieces(x, g, rounded):
    """{"out", "dx"} of max(x, 0) ** 2."""
    r = np.maximum(x, 0)
    return {"out": rounded(r * r), "dx": rounded(rounded(2 * r) * g)}


# ----------------------------------------------------------------------------------------------------------------------
# What is due, each from one small case

T, H = 256, 128


def small_rope():
    """cos and signed sin (T, H) of some rotation."""
    angles = np.outer(np.arange(T), 10_000.0 ** (-np.arange(0, H, 2) / H))
    cos, sin = np.cos(angles), np.sin(angles)
    return np.hstack([cos, cos]), np.hstack([sin, -sin])


@functools.cache
def attention_due():
    """Of attention with a window of half its tokens; {"out", "dq", "dk", "dv", and what gated rows add}."""
    a = draw(0, q=(T, H), k=(T, H), v=(T, H), g=(T, H))
    rope = small_rope()
    found = due(lambda r: attention_pieces(a["q"], a["k"], a["v"], a["g"], *rope, T // 2, H**-0.5, r))
    return found | {"drows": found["dv"], "dgate": found["dv"]}


@functools.cache
def loss_due(softcap):
    a = draw(1, h=(T, H), head=(H, 4 * T))
    y = np.random.default_rng(2).integers(0, 4 * T, T)
    return due(lambda r: loss_pieces(a["h"], a["head"] * HEAD_SCALE, y, softcap, r))


HEAD_SCALE = 0.25  # a power of two: logits of H = 128 are then 3 wide, as a trained model's


@functools.cache
def norm_due():
    a, rope = draw(3, x=(T, H), g=(T, H)), small_rope()
    return due(lambda r: norm_pieces(a["x"], a["g"], *rope, r))


@functools.cache
def relu_due():
    a = draw(4, x=(T, H), g=(T, H))
    return due(lambda r: relu_pieces(a["x"], a["g"], r))
