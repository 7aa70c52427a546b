"""onechip/layers.py: norm, rotation, ReLU squared and loss, each in value and gradient, against float64 NumPy.

Sizes differ in every dimension.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import quick_compiler  # noqa: F401  (for every test)
from reference import distance, losses_of_logits, norm_gradient_reference, norm_reference, rope_reference

from onechip import layers

BASE = 50.0


def random_array(*shape, seed=8):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def angles(length, channels):
    """Cosines and signed sines (length, channels), as the layers take them."""
    turns = np.outer(np.arange(length), BASE ** (-np.arange(0, channels, 2) / channels))
    cos, sin = np.cos(turns), np.sin(turns)
    return np.float32(np.hstack([cos, cos])), np.float32(np.hstack([sin, -sin]))


def value_and_pullback(f, x, g):
    """f(x), and the gradient for x from the gradient g for that."""

    def both(x, g):
        out, back = jax.vjp(f, x)
        return out, back(g)[0]

    return jax.jit(both)(x, g)


# ----------------------------------------------------------------------------------------------------------------------
# Norm, rotation, ReLU squared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rotate", ["rotate_halves", "rotate_by_product"])
def test_both_rotations_are_the_reference(rotate, dtype):
    """The same angles, and the sum is in float32."""
    x = jnp.asarray(random_array(2, 7, 3, 10), dtype)
    out = getattr(layers, rotate)(x, *angles(7, 10))
    assert out.dtype == jnp.float32
    assert distance(out, rope_reference(np.float64(x), BASE)) < 3e-7


def test_a_tpu_rotates_by_a_product_and_no_other_device():
    """By the programs that are lowered for each, which needs neither."""
    traced = jax.jit(layers.apply_rope).trace(jnp.ones((2, 7, 3, 10)), *angles(7, 10))
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu", "cuda")}
    assert ["dot_general" in text[platform] for platform in ("tpu", "cpu", "cuda")] == [True, False, False]


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_rms_norm_and_its_gradient(dtype, bound):
    """x / rms(x) and the gradient written for it, in the type of x; rows of every size."""
    x, g = (jnp.asarray(random_array(3, 11, seed=seed), dtype) for seed in (1, 2))
    x = x * jnp.asarray([[1e-3], [1.0], [1e3]], dtype)
    out, grad = value_and_pullback(layers.rms_norm, x, g)
    assert out.dtype == grad.dtype == dtype
    wide, want = np.float64(x), norm_gradient_reference(np.float64(x), np.float64(g))
    for row in range(3):
        assert distance(out[row], norm_reference(wide)[row]) < bound
        assert distance(grad[row], want[row]) < bound


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_rope_and_norm_and_its_gradient(dtype, bound):
    """The norm of the rotated heads, in one pass; the gradient is turned back and goes through the norm."""
    x, g = (jnp.asarray(random_array(2, 7, 3, 10, seed=seed), dtype) for seed in (3, 4))
    out, grad = value_and_pullback(lambda x: layers.rope_and_norm(x, *angles(7, 10)), x, g)
    assert out.dtype == grad.dtype == dtype
    turned = rope_reference(np.float64(x), BASE)
    assert distance(out, norm_reference(turned)) < bound
    assert distance(grad, rope_reference(norm_gradient_reference(turned, np.float64(g)), BASE, -1)) < bound


def test_relu_squared_and_its_gradient():
    """max(u, 0) ** 2 and 2 max(u, 0) g, zero included."""
    u, g = np.float32([-2.0, -0.0, 0.0, 0.5, 3.0]), np.float32([1.0, 2.0, 3.0, 4.0, 5.0])
    out, grad = value_and_pullback(layers.relu_squared, u, g)
    assert out.tolist() == [0.0, 0.0, 0.0, 0.25, 9.0] and grad.tolist() == [0.0, 0.0, 0.0, 4.0, 30.0]


# ----------------------------------------------------------------------------------------------------------------------
# The loss

B, T, D, V = 5, 13, 22, 31


def head_loss_reference(softcap, h, lm_head, y, mask):
    """The loss and its gradients for h and lm_head in float64; mask (B, T), 0 or 1."""
    h, lm_head = np.float64(h), np.float64(lm_head)
    z, slope = h @ lm_head, 1.0
    if softcap:
        z = softcap * np.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    share = mask / mask.sum()
    chances = np.exp(z - z.max(-1, keepdims=True))
    dz = (chances / chances.sum(-1, keepdims=True) - np.eye(V)[y]) * slope * share[..., None]
    return (losses_of_logits(z, y) * share).sum(), (dz @ lm_head.T, np.einsum("btd,btv->dv", h, dz))


def loss_case():
    """h (B, T, D), lm_head (D, V), y (B, T), and a mask (B, T) int32: a quarter counts, of the first row nothing."""
    rng = np.random.default_rng(5)
    h, lm_head = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, V)))
    mask = (rng.random((B, T)) < 0.3) & (np.arange(B) > 0)[:, None]
    return h, lm_head, rng.integers(0, V, (B, T), dtype=np.int32), mask.astype(np.int32)


@functools.cache
def loss_and_grads(softcap, loss_slice):
    """A jitted (h, lm_head, y, mask) -> (head_loss, its gradients for h and lm_head)."""
    return jax.jit(jax.value_and_grad(functools.partial(layers.head_loss, softcap, loss_slice), (0, 1)))


def test_the_loss_reference_is_differentiated_rightly():
    """Its gradients are the central differences of its value along random directions."""
    h, lm_head, y, mask = loss_case()
    rng, step = np.random.default_rng(6), 1e-6
    _, (dh, dhead) = head_loss_reference(2.5, h, lm_head, y, mask)
    a, b = rng.normal(size=h.shape), rng.normal(size=lm_head.shape)
    ends = [head_loss_reference(2.5, h + s * step * a, lm_head + s * step * b, y, mask)[0] for s in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((dh * a).sum() + (dhead * b).sum(), rel=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 2.5])
@pytest.mark.parametrize("size", [1, 5, 7, 13, 65, 99])
def test_loss_and_gradients_are_the_reference_in_any_slices(size, softcap):
    """65 tokens in 65, 13, 5 slices and in one, capped and not: the mean of the targets that a mask counts."""
    h, lm_head, y, mask = loss_case()
    want, want_grads = head_loss_reference(softcap, h, lm_head, y, mask)
    loss, grads = loss_and_grads(softcap, size)(h, lm_head, y, mask)
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(want, rel=1e-6)
    assert distance(grads, want_grads) < 5e-6


@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_without_a_mask_every_target_counts(softcap):
    """No mask is a mask of ones, as is one of booleans; the losses token by token have the same mean."""
    h, lm_head, y, _ = loss_case()
    want, want_grads = head_loss_reference(softcap, h, lm_head, y, np.ones((B, T)))
    for mask in (None, np.ones((B, T), bool)):
        loss, grads = loss_and_grads(softcap, 13)(h, lm_head, y, mask)
        assert float(loss) == pytest.approx(want, rel=1e-6)
        assert distance(grads, want_grads) < 5e-6
    losses = jax.jit(functools.partial(layers.head_losses, softcap, 13))(h, lm_head, y)
    assert losses.shape == (B, T) and losses.dtype == jnp.float32
    assert float(losses.mean()) == pytest.approx(want, rel=1e-6)


def test_a_masked_target_carries_no_gradient():
    """The gradient for a hidden state is zero where its target does not count, and nowhere else."""
    h, lm_head, y, mask = loss_case()
    _, (dh, _) = loss_and_grads(2.5, 13)(h, lm_head, y, mask)
    np.testing.assert_array_equal((np.asarray(dh) != 0).any(-1), mask == 1)


def test_no_target_at_all_is_a_loss_of_zero():
    """A microbatch without a target has loss and gradients 0 and not 0 / 0."""
    h, lm_head, y, mask = loss_case()
    result = loss_and_grads(2.5, 13)(h, lm_head, y, np.zeros_like(mask))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(result))


def test_the_gradient_is_scaled_by_what_follows_the_loss():
    """The loss brings its gradient ready-made: three times the loss has three times the gradient."""
    h, lm_head, y, mask = loss_case()
    three = lambda h, lm_head: 3 * layers.head_loss(2.5, 13, h, lm_head, y, mask)
    grads = jax.jit(jax.grad(three, (0, 1)))(h, lm_head)
    want = head_loss_reference(2.5, h, lm_head, y, mask)[1]
    assert distance(grads, [3 * grad for grad in want]) < 5e-6
