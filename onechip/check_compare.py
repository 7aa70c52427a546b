"""Is what a chip computes right? Attentions, the loss and the smaller pieces in bfloat16, held to float32 on it.

The reference is plain JAX in float32, with products in full precision, on the same device: a TPU multiplies float32 in
bfloat16 unless it is asked not to. What bfloat16 may differ from it by, check_exact.py says.
"""

import functools
import inspect
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from onechip import check_exact as exact
from onechip.check_report import compared
from onechip.check_time import Check, timed
from onechip.layers import head_loss, head_losses, relu_squared, rope_and_norm
from onechip.rows import Embeddings, Rows
from onechip.weights import Weight, normal


class Case(NamedTuple):
    """Attention at one size: tokens, query heads, key/value heads, channels a head, keys that a query sees."""

    T: int
    N: int
    K: int
    H: int
    window: int
    gated: bool = False

    @property
    def words(self):
        """The size in words."""
        heads = f"{self.N} x {self.H}" if self.N == self.K else f"{self.N} on {self.K} x {self.H}"
        seen = "all keys" if self.window >= self.T else f"window {self.window}"
        return f"{heads}, {seen}{', gated values' if self.gated else ''}"


# What is compared besides attention; a test hands in others.
PIECES = {
    "losses": head_losses, "loss": head_loss, "norm": rope_and_norm, "relu": relu_squared, "add": Embeddings.add,
}  # fmt: skip


def in_bfloat16(seed, **shapes):
    """{name: normal values in bfloat16}, NumPy."""
    return {name: jnp.asarray(a, jnp.bfloat16) for name, a in exact.draw(seed, **shapes).items()}


def in_float32(arrays):
    """The same values in float32."""
    return {name: a.astype(jnp.float32) for name, a in arrays.items()}


def value_and_grads(f, names, arrays, g):
    """{"out", "d" + name} of f(arrays), with the output gradient g; names: differentiated."""
    others = {name: a for name, a in arrays.items() if name not in names}
    out, back = jax.vjp(lambda *args: f(dict(zip(names, args, strict=True)) | others), *(arrays[n] for n in names))
    return {"out": out, **dict(zip([f"d{name}" for name in names], back(g.astype(out.dtype)), strict=True))}


def fetched(tree):
    """A dict's arrays as NumPy float32."""
    return {name: np.asarray(a.astype(jnp.float32)) for name, a in tree.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attention_inputs(case):
    """(arrays in bfloat16, an output gradient) of a Case, one sequence."""
    T, N, K, H = case[:4]
    shapes = {"q": (1, T, N, H), "k": (1, T, K, H), "v": (1, T, K, H), "g": (1, T, N, H)}
    arrays = in_bfloat16(5, **shapes)
    if case.gated:
        arrays |= {"rows": in_bfloat16(6, rows=(1, T, K * H))["rows"]}
        arrays |= {"gate": jnp.asarray(np.random.default_rng(7).uniform(0.5, 2.0, (1, T, K)), jnp.float32)}
    return arrays, arrays.pop("g")


def attend_by(attention, rope, case, arrays):
    """An attention as a model calls it; an attention that takes `more` is given the gated rows, others their sum."""
    args, (q, k, v) = (rope, case.window, case.H**-0.5), (arrays[name] for name in "qkv")
    gate, rows = arrays.get("gate"), arrays.get("rows")
    if gate is not None and "more" in inspect.signature(attention).parameters:
        return attention(q, k, v, *args, more=(gate, rows))
    if gate is not None:
        v = v + gate.astype(v.dtype)[..., None] * rows.reshape(v.shape)
    return attention(q, k, v, *args)


def lower_attention(attention, rope, case):
    """A function of (arrays, g) -> {"out", "dq", "dk", "dv", ...}, jitted."""
    f = functools.partial(attend_by, attention, rope, case)
    return jax.jit(lambda arrays, g: value_and_grads(f, tuple(arrays), arrays, g))


def attention_wanted(reference, rope, case):
    """What a reference attention computes of a Case in float32: NumPy arrays."""
    arrays, g = attention_inputs(case)
    with jax.default_matmul_precision("highest"):
        return fetched(lower_attention(reference, rope, case)(in_float32(arrays), g.astype(jnp.float32)))


def compare_attention(name, attention, rope, case, wanted, runs):
    """The Row of one attention: errors of value and gradients, and seconds of both passes."""
    run, (arrays, g) = lower_attention(attention, rope, case), attention_inputs(case)
    errors = exact.judge(fetched(run(arrays, g)), wanted(), exact.attention_due())
    seconds = timed(lambda: run(arrays, g), runs).median
    row = compared(
        "attention", f"{name}: {case.words}", errors, {"attn_impl": name, "case": case.words, "seconds": seconds}
    )
    return row._replace(note=f"{row.note}; {1e3 * seconds:.3g} ms")


def attention_checks(context):
    """A Check for each attention at each size. An attention that does not take gated rows is not asked for them."""
    given, sizes = context.given, context.sizes
    for case in sizes.cases:
        rope = given.rope(case.T, case.H)
        wanted = functools.cache(functools.partial(attention_wanted, given.reference, rope, case))
        for name in sizes.attentions:
            attention = given.attentions[name]
            if case.gated and "more" not in inspect.signature(attention).parameters:
                continue
            args = name, attention, rope, case, wanted, sizes.runs
            about = {"attn_impl": name, "case": case.words}
            yield Check(f"{name}: {case.words}", functools.partial(compare_attention, *args), about)


# ----------------------------------------------------------------------------------------------------------------------
# The loss and the smaller pieces


def lower_loss(losses, mean):
    """A function of h (1, M, D) and lm_head (D, V) -> {"losses", "dh", "dhead"}, jitted; losses, mean: of the same."""

    def found(h, head):
        dh, dhead = jax.grad(mean, (0, 1))(h, head)
        return {"losses": losses(h, head)[..., None], "dh": dh, "dhead": dhead}

    return jax.jit(found)


def sliced_loss(pieces, softcap, loss_slice, y):
    """The loss in slices as lower_loss gives it, for targets y (1, M)."""
    return lower_loss(
        lambda h, head: pieces["losses"](softcap, loss_slice, h, head, y),
        lambda h, head: pieces["loss"](softcap, loss_slice, h, head, y, None),
    )


def plain_loss_of(softcap, y):
    """The same from logits all at once, by autodiff."""

    def losses(h, head):
        z = jnp.einsum("btd,dv->btv", h, head)
        z = softcap * jnp.tanh(z / softcap) if softcap else z
        return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0]

    return lower_loss(losses, lambda h, head: jnp.mean(losses(h, head)))


def compare_loss(pieces, tokens, channels, vocabulary, loss_slice, softcap):
    """The Row of the loss in slices against logits all at once: each token's loss, and the mean's gradients."""
    arrays = in_bfloat16(8, h=(1, tokens, channels), head=(channels, vocabulary))
    arrays["head"] = (arrays["head"] * (3.0 * channels**-0.5)).astype(jnp.bfloat16)
    y = jnp.asarray(np.random.default_rng(9).integers(0, vocabulary, (1, tokens)), jnp.int32)
    with jax.default_matmul_precision("highest"):
        wanted = fetched(plain_loss_of(softcap, y)(**in_float32(arrays)))
    found = fetched(sliced_loss(pieces, softcap, loss_slice, y)(**arrays))
    errors = exact.judge(found, wanted, exact.loss_due(softcap))
    return compared("pieces", f"loss, {tokens} x {vocabulary}, softcap {softcap:g}", errors)


def lower_elementwise(f):
    """A function of x and an output gradient g -> {"out", "dx"}, jitted."""
    return jax.jit(lambda x, g: value_and_grads(lambda arrays: f(arrays["x"]), ("x",), {"x": x}, g))


def compare_elementwise(what, piece, plain, due, shape):
    """The Row of a function of x (..., H), value and gradient, against a plain one in float32."""
    arrays = in_bfloat16(10, x=shape, g=shape)
    with jax.default_matmul_precision("highest"):
        wanted = fetched(lower_elementwise(plain)(**in_float32(arrays)))
    found = fetched(lower_elementwise(piece)(**arrays))
    return compared("pieces", what, exact.judge(found, wanted, due()))


def compare_norm(pieces, rope, tokens, heads, channels):
    """The Row of RoPE and norm in one pass."""
    cos, sin = map(jnp.asarray, rope)
    turn = lambda x: x * cos[:, None] + jnp.roll(x, channels // 2, axis=-1) * sin[:, None]
    shape = 1, tokens, heads, channels
    piece = lambda x: pieces["norm"](x, cos, sin)
    plain = lambda x: turn(x) * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + exact.EPS32)
    return compare_elementwise(f"RoPE and norm, {heads} x {channels}", piece, plain, exact.norm_due, shape)


def compare_relu(pieces, shape):
    """The Row of ReLU squared."""
    plain = lambda x: jnp.square(jnp.maximum(x, 0))
    return compare_elementwise(f"ReLU squared, {shape[-2]} x {shape[-1]}", pieces["relu"], plain, exact.relu_due, shape)


ADD_LIMIT = 1e-5  # of float32 sums of a few dozen bfloat16 numbers, in another order


def lower_add(add, tokens, channels, vocabulary, kernel):
    """A function of ids (1, M) and gradients (1, M, D) -> sums after adding them twice, jitted."""
    weight, config = {"table": Weight("V->D", normal(1.0), "embed")}, SimpleNamespace()
    config.sizes = {"V": vocabulary, "D": channels}

    def run(ids, grads):
        table = jnp.zeros(weight["table"].shape(config), jnp.bfloat16)
        embeddings, rows = Embeddings(weight, {"table": table}), [Rows(grads)]
        sums = add(embeddings, embeddings.no_sums(), ids, rows, kernel)
        return add(embeddings, sums, ids, rows, kernel)

    return jax.jit(run)


def compare_add(pieces, tokens, channels, vocabulary):
    """The Row of the kernel that adds embeddings' gradients to float32 sums, against XLA's scatter."""
    ids = jnp.asarray(np.random.default_rng(11).integers(0, max(2, vocabulary // 2), (1, tokens)), jnp.int32)
    grads, sizes = in_bfloat16(12, g=(1, tokens, channels))["g"], (tokens, channels, vocabulary)
    found = lower_add(pieces["add"], *sizes, True)(ids, grads)
    wanted = lower_add(Embeddings.add, *sizes, False)(ids, grads)
    errors = exact.errors_between(np.asarray(found), np.asarray(wanted))
    return compared("pieces", f"rows added, {tokens} x {channels}", {"sums": (max(errors), ADD_LIMIT)})


# A matrix of independent normal entries has no singular value far below its norm: those end within this of 1, in
# bfloat16. Of the nearest orthogonal matrix its rms error is at most that.
ORTHOGONAL_LIMIT = 0.2


def compare_orthogonal(orthogonalize, rows, columns):
    """The Row of Muon's orthogonalize in bfloat16: how far from the nearest orthogonal matrix, by float64's SVD."""
    X = in_bfloat16(13, x=(rows, columns))["x"]
    u, _, v = np.linalg.svd(np.float64(X), full_matrices=False)
    found = np.asarray(jax.jit(orthogonalize)(X[None])[0].astype(jnp.float32))
    errors = {"values": (exact.errors_between(found, u @ v)[0], ORTHOGONAL_LIMIT)}
    return compared("pieces", f"orthogonalize, {rows} x {columns}", errors)


def piece_checks(context):
    """A Check for the loss with and without softcap, and one for each smaller piece."""
    given, s = context.given, context.sizes
    T, D, V, (_, N, _, H, *_) = s.tokens, s.channels, s.vocabulary, s.cases[0]
    bound = functools.partial
    for softcap in (15.0, 0.0):
        run = bound(compare_loss, given.pieces, T, D, V, max(1, T // 2), softcap)
        yield Check(f"loss, softcap {softcap:g}", run)
    yield Check("RoPE and norm", bound(compare_norm, given.pieces, given.rope(T, H), T, N, H))
    yield Check("ReLU squared", bound(compare_relu, given.pieces, (T, 4 * D)))
    yield Check("rows added", bound(compare_add, given.pieces, T, D, V))
    if given.orthogonalize:
        for shape in s.matrices:
            yield Check(
                f"orthogonalize, {shape[0]} x {shape[1]}", bound(compare_orthogonal, given.orthogonalize, *shape)
            )
