"""Norm, rotation, ReLU squared and loss, with gradients of their own because autodiff keeps more than it needs.

The norm keeps its input in bfloat16 only, RoPE with norm likewise, and ReLU squared keeps `relu(u)` where autodiff
keeps `u > 0`, a mask that the TPU's compiler packs into bits at 0.6 ms a layer. The loss keeps no logits at all. What
each saves by the compiler's estimate is in LOG.md. Tests hold all of them to float64 references in value and gradient.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint


def inverse_rms(x):
    """1 / rms over the last axis in float32: (..., D) -> (..., 1)."""
    square = jnp.square(x.astype(jnp.float32))
    return jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + jnp.finfo(jnp.float32).eps)


@jax.custom_vjp
def rms_norm(x):
    """x / rms(x) over the last axis, computed in float32, no parameters (Zhang and Sennrich, 2019)."""
    return (x.astype(jnp.float32) * inverse_rms(x)).astype(x.dtype)


def rms_norm_backward(x, g):
    r = inverse_rms(x)
    y, g = x.astype(jnp.float32) * r, g.astype(jnp.float32)
    return ((r * (g - y * jnp.mean(g * y, axis=-1, keepdims=True))).astype(x.dtype),)


rms_norm.defvjp(lambda x: (rms_norm(x), x), rms_norm_backward)


def tokens_in_lanes(x):
    """x (B, T, D), on a TPU laid out with tokens along the lanes: a norm then sums over rows of a register, which is
    fast, and not across its lanes. LOG.md, "Tokens along the lanes", has what it is worth."""
    layout = Layout((0, 2, 1))
    return jax.lax.platform_dependent(x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x)


def rotate_halves(x, cos, sin):
    """The halves of each head are taken apart: x (B, T, heads, H); cos, sin (T, H) -> float32, the shape of x."""
    (a, b), (c, _), (s, _) = (jnp.split(array, 2, axis=-1) for array in (x.astype(jnp.float32), cos, sin))
    c, s = c[:, None], s[:, None]
    return jnp.concatenate([a * c + b * s, b * c - a * s], axis=-1)


def rotate_by_product(x, cos, sin):
    """The same; the halves change places in a product with a permutation, exact in any dtype."""
    swap = jnp.asarray(np.roll(np.eye(x.shape[-1]), x.shape[-1] // 2, axis=1), x.dtype)
    swapped = jnp.einsum("...h,hg->...g", x, swap, preferred_element_type=jnp.float32, precision="highest")
    return x.astype(jnp.float32) * cos[:, None] + swapped * sin[:, None]


def apply_rope(x, cos, sin):
    """RoPE of x (B, T, heads, H) by cos, sin (T, H). float32.

    Half a head is half a TPU register, and slicing it out costs a trip to HBM: by estimate, the product makes a step
    with Splash 8 % shorter there. On a CPU it made a step up to 19 % longer (LOG.md, "Rotation by a product").
    """
    return jax.lax.platform_dependent(x, cos, sin, tpu=rotate_by_product, default=rotate_halves)


@jax.custom_vjp
def rope_and_norm(x, cos, sin):
    """rms_norm(apply_rope(x)), (B, T, heads, H) -> the same, in one pass."""
    return (apply_rope(x, cos, sin) * inverse_rms(x)).astype(x.dtype)


def rope_and_norm_backward(saved, g):
    x, cos, sin = saved
    r = inverse_rms(x)
    y, g = x.astype(jnp.float32) * r, apply_rope(g, cos, -jnp.asarray(sin))
    return (r * (g - y * jnp.mean(g * y, axis=-1, keepdims=True))).astype(x.dtype), None, None


rope_and_norm.defvjp(lambda x, cos, sin: (rope_and_norm(x, cos, sin), (x, cos, sin)), rope_and_norm_backward)


@jax.custom_vjp
def relu_squared(u):
    """max(u, 0) ** 2, elementwise."""
    return jnp.square(jax.nn.relu(u))


def relu_squared_forward(u):
    r = jax.nn.relu(u)
    return r * r, r


relu_squared.defvjp(relu_squared_forward, lambda r, g: (2 * r * g,))


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def soft_cap(bound, z):
    """Logits z (..., V) in float32, within +-bound if that is not 0; and the slope of that, d capped / d z."""
    z = z.astype(jnp.float32)
    if not bound:
        return z, 1.0
    t = jnp.tanh(z / bound)
    return bound * t, 1 - t * t


def slice_losses(softcap, h, lm_head, y):
    """Losses in nats, float32 (M,), of hidden states h (M, D) and targets y (M,); and what their gradient needs."""
    with jax.named_scope("lm_head"):
        z = jnp.einsum("md,dv->mv", h, lm_head)  # in the compute type, as nanochat's: float32 doubles the traffic
    with jax.named_scope("loss"):
        z, slope = soft_cap(softcap, z)
        hit = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == y[:, None]  # a comparison fuses, a scatter does not
        z = z if softcap else z - jnp.max(z, axis=-1, keepdims=True)  # capped, exp cannot overflow
        p = jnp.exp(z)
        of_target, total = jnp.sum(jnp.where(hit, z, 0), axis=-1), jnp.sum(p, axis=-1)
        return jnp.log(total) - of_target, (hit, p * slope, of_target, total)


def slice_grads(softcap, h, lm_head, y, mask, scale):
    """(sum of the losses that mask counts, d/dh (M, D), d/dlm_head (D, V) float32), the gradients times `scale`.

    exp(z) times the soft cap's slope is all that is kept of the logits, in the compute type: two exponentials fewer for
    each, and softmax(z) is as exact as its own digits, where z rounded to bfloat16 would give it two fewer.
    """
    losses, (hit, p, of_target, total) = slice_losses(softcap, h, lm_head, y)
    with jax.named_scope("loss"):
        p = jax.lax.optimization_barrier(p.astype(h.dtype))  # else both products below would compute it again
        scale = jnp.full(losses.shape, scale) if mask is None else scale * mask
        losses = losses if mask is None else losses * mask
        slope = 1 - (of_target / softcap) ** 2 if softcap else 1.0
        # softmax(z) - hit, times the slope, but for the factor scale / total of each row
        dz = (p - jnp.where(hit, (slope * total)[:, None], 0)).astype(h.dtype)
        scale = (scale / total)[:, None]
    with jax.named_scope("lm_head"):
        dh = scale * jnp.einsum("mv,dv->md", dz, lm_head, preferred_element_type=jnp.float32)
        scaled = (scale * h).astype(h.dtype)
        return losses.sum(), dh.astype(h.dtype), jnp.einsum("md,mv->dv", scaled, dz, preferred_element_type=jnp.float32)


def in_slices(size, rows, *arrays):
    """Arrays (B, T, ...), or None, as (slices, `size` or fewer, ...); rows: B * T."""
    count = next(n for n in itertools.count(-(-rows // size)) if rows % n == 0)
    return [None if a is None else a.reshape(count, -1, *a.shape[2:]) for a in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def head_loss(softcap, loss_slice, h, lm_head, y, mask):
    """Mean cross-entropy in nats, float32, of hidden states h (B, T, D), lm_head (D, V) and targets y (B, T).

    softcap: logits are bounded to +-softcap, 0 for no bound; loss_slice: tokens whose logits exist at one time; mask
    (B, T), 0 or 1: which targets count, None for all of them.
    """
    return head_loss_forward(softcap, loss_slice, h, lm_head, y, mask)[0]


def head_loss_forward(softcap, loss_slice, h, lm_head, y, mask):
    """The loss, with its gradients ready: the backward pass only scales them."""
    count = float(y.size) if mask is None else jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)

    def add(total, one_slice):
        h, y, mask = one_slice
        loss, dh, d_head = slice_grads(softcap, h, lm_head, y, mask, 1 / count)
        return (total[0] + loss, total[1] + d_head), dh

    zero = jnp.zeros(()), jnp.zeros(lm_head.shape, jnp.float32)
    (loss, d_head), dh = jax.lax.scan(add, zero, in_slices(loss_slice, y.size, h, y, mask))
    return loss / count, (dh.reshape(h.shape), d_head.astype(lm_head.dtype))


def head_loss_backward(softcap, loss_slice, grads, g):
    return *((d * g).astype(d.dtype) for d in grads), None, None  # g is float32: rounded, it would be off for all


head_loss.defvjp(head_loss_forward, head_loss_backward)


def head_losses(softcap, loss_slice, h, lm_head, y):
    """Cross-entropy in nats of every token, float32 (B, T); the arguments are head_loss's. No gradient is formed."""
    one_slice = lambda hy: slice_losses(softcap, hy[0], lm_head, hy[1])[0]
    return jax.lax.map(one_slice, in_slices(loss_slice, y.size, h, y)).reshape(y.shape)


def head_log_probabilities(softcap, loss_slice, h, lm_head, y):
    """(log-probabilities of targets y, entropies), float32 (B, T); the arguments are head_loss's.

    Any function of the former may be differentiated. Logits are float32, as an engine's, so that the two agree, and
    are computed once more for the gradient, slice by slice.
    """
    head = lm_head.astype(jnp.float32)  # so that its gradients of all slices are summed in float32

    @jax.checkpoint
    def one_slice(hy):
        z = jnp.einsum("md,dv->mv", hy[0], head.astype(hy[0].dtype), preferred_element_type=jnp.float32)
        z = jax.nn.log_softmax(soft_cap(softcap, z)[0])
        entropy = -jnp.sum(jnp.exp(z) * z, axis=-1)
        return jnp.take_along_axis(z, hy[1][:, None], axis=-1)[:, 0], jax.lax.stop_gradient(entropy)

    chosen, entropy = jax.lax.map(one_slice, in_slices(loss_slice, y.size, h, y))
    return chosen.reshape(y.shape), entropy.reshape(y.shape)
