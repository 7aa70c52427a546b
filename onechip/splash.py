"""JAX's Splash Attention, as a model calls it: a TPU kernel that streams blocks of keys past blocks of queries."""

import math

import jax
import jax.numpy as jnp

from onechip.kernels import interpreted_off_tpu

# Of JAX's kernel: 2048 does not fit VMEM, 512 took a quarter longer in the v6e timings of vorushin/tpuchat
# (https://github.com/vorushin/tpuchat).
SPLASH_BLOCK = 1024


def splash_attention(q, k, v, window, scale):
    """Attention over the last `window` keys by JAX's Splash Attention, (B, T, N, H) in q's dtype.

    q (B, T, N, H) and k, v (B, T, K, H), q and k already rotated and normed; scores are times `scale`. T a
    multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q.shape[1], q.shape[2]
    # LocalMask is inclusive: w - 1 keys to the left and none to the right are a causal window of w.
    mask = splash.CausalMask((T, T)) if window >= T else splash.LocalMask((T, T), (window - 1, 0), 0)
    mask = splash.MultiHeadMask([mask] * N)
    block = math.gcd(T, SPLASH_BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = splash.BlockSizes(**{f"block_{name}": block for name in names} | {"block_kv_compute": math.gcd(T, 512)})

    def kernel(interpret, q, k, v):
        attend = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.vmap(attend)(q, k, v)

    heads_first = [jnp.swapaxes(a, 1, 2) for a in (q * scale, k, v)]  # Splash does not scale by itself
    return jnp.swapaxes(interpreted_off_tpu(kernel, *heads_first), 1, 2)
