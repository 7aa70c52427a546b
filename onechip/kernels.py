"""Attention for a TPU as two Pallas kernels: RoPE, QK-norm, windows and grouped heads, one head at a time in VMEM.

A general kernel streams blocks of keys past blocks of queries, because a head may not fit. At 2048 tokens one does: q,
k, v and the output of a head are 2 MB of the 128 MB of VMEM. Three things follow, each counted in LOG.md in the
instruction bundles that the compiler schedules for a head, forward and backward, with a window of half the context;
Splash needs 42,918:

- Tiles are unrolled in Python. Those outside the window do not exist, only those on its edges are masked, and the
  compiler overlaps the products of one tile with the exp of the next: 17,064 bundles.
- QK-norm bounds every score by H times their scale, 11.3 at 128 channels and 1 / sqrt(H). exp() cannot overflow, so
  there is no running maximum and nothing is rescaled; the sums ride along as 128 more columns of the product with v,
  half a matrix unit that was idle.
- RoPE and QK-norm go in as well. They add 4,355 bundles, 0.08 ms a layer; as XLA passes over q and k they took 0.25.

Recomputing the scores in the backward pass from one number a row is FlashAttention's idea (Dao, 2022 and 2023). Keys
along the rows of a tile there are Splash Attention's (JAX), which is here too, at the end, as a model calls it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from onechip.errors import require

LANES = 128
EPS = 2.0**-23  # float32's epsilon, added to a mean square, as the model's own norm does
# Of JAX's kernel: 2048 does not fit VMEM, 512 took a quarter longer in the v6e timings of vorushin/tpuchat
# (https://github.com/vorushin/tpuchat).
SPLASH_BLOCK = 1024
MOST_ENTRIES = 1 << 19  # of a head, T * H: beyond, the unrolled program grows past what compiles in minutes


def check_kernel(attn_impl, seq_len, head_dim):
    """Raises UserError unless the kernels of "splash" or "pallas" can take this many tokens and channels a head."""
    blocks = f"attn_impl={attn_impl!r} works on blocks of 128 tokens: use a multiple of 128, or attn_impl='jax'"
    require(seq_len % 128 == 0, "seq_len", seq_len, blocks)
    if attn_impl == "pallas":
        lanes = "attn_impl='pallas' works on 128 channels at a time: use a multiple of 128, or attn_impl='splash'"
        require(head_dim % LANES == 0, "head_dim", head_dim, lanes)
        most = f"attn_impl='pallas' holds a head whole: head_dim={head_dim} goes to {MOST_ENTRIES // head_dim}"
        require(seq_len * head_dim <= MOST_ENTRIES, "seq_len", seq_len, f"{most}, attn_impl='splash' on")


def block_size(T):
    """Tokens in a tile: the largest of 512, 256 and 128 that divides T. 256 and 1024 took 20 to 29 % more bundles."""
    return next(b for b in (512, 256, 128) if T % b == 0)


def tiles(T, window, b):
    """(query block, key block, masked) for every tile in which some query sees some key; masked if some does not."""
    for i in range(T // b):
        for j in range(i + 1):
            nearest, farthest = (i - j - 1) * b + 1, (i - j + 1) * b - 1
            if nearest < window:
                yield i, j, i == j or farthest >= window


def mask_scores(s, i, j, window, query_axis):
    """-inf where the query does not see the key: s (b, b) of query block i and key block j."""
    b = s.shape[0]
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, s.shape)
    ahead = iota(query_axis) - iota(1 - query_axis)
    if i == j:
        s = jnp.where(ahead >= 0, s, -jnp.inf)
    if (i - j + 1) * b - 1 >= window:
        s = jnp.where(ahead < window - (i - j) * b, s, -jnp.inf)
    return s


def dot(a, b, axis_a, axis_b):
    """The product of two matrices over one axis of each, float32 out."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def rotate(x, cos, sin):
    """RoPE of x (b, H) float32: channel i with i + H / 2; with -sin it turns back."""
    return x * cos + pltpu.roll(x, x.shape[1] // 2, 1) * sin


def mean(x, dtype):
    """Mean of x (b, H) over its last axis, broadcast to (b, H): a product with ones, as reducing lanes is slow."""
    H = x.shape[1]
    return dot(x.astype(dtype), jnp.ones((H, H), dtype), 1, 0) * (1 / H)


def unit(x_ref, rows):
    """x / rms(x) and 1 / rms(x) of some rows, float32 (b, H) each. RoPE may follow: it changes no length."""
    x = x_ref[rows, :].astype(jnp.float32)
    r = jax.lax.rsqrt(mean(x * x, x_ref.dtype) + EPS)
    return x * r, r


def rotated_unit(x_ref, cos, sin, rows):
    """RoPE and QK-norm of some rows, float32 (b, H)."""
    return rotate(unit(x_ref, rows)[0], cos[rows, :], sin[rows, :])


def rotated_unit_backward(x_ref, g, cos, sin, rows):
    """The gradient for x from that for rotated_unit(x): (b, H) float32."""
    y, r = unit(x_ref, rows)
    g = rotate(g, cos[rows, :], -sin[rows, :])
    return r * (g - y * mean(g * y, x_ref.dtype))


def forward_kernel(q_ref, k_ref, v_ref, cos, sin, o_ref, lse_ref, k_unit, *, window, scale, b):
    """One head: o (T, H) and the scores' logsumexp (1, T) from q, k, v (T, H)."""
    T, H = q_ref.shape
    blocks = [slice(i * b, (i + 1) * b) for i in range(T // b)]
    ones = jnp.ones((b, LANES), v_ref.dtype)
    for i, rows in enumerate(blocks):
        k_unit[rows, :] = rotated_unit(k_ref, cos, sin, rows).astype(k_unit.dtype)
        q = (rotated_unit(q_ref, cos, sin, rows) * scale).astype(q_ref.dtype)
        total = jnp.zeros((b, H + LANES), jnp.float32)
        for j, masked in [(j, masked) for i_, j, masked in tiles(T, window, b) if i_ == i]:
            s = dot(q, k_unit[blocks[j], :], 1, 1)
            p = jnp.exp(mask_scores(s, i, j, window, 0) if masked else s).astype(v_ref.dtype)
            total += dot(p, jnp.concatenate([v_ref[blocks[j], :], ones], 1), 1, 0)
        sums = total[:, H:]  # of p, the same in all its columns
        o_ref[rows, :] = (total[:, :H] / jnp.tile(sums, (1, H // LANES))).astype(o_ref.dtype)
        lse_ref[:, rows] = jnp.log(sums).T[:1]


def backward_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, cos, sin, dq_ref, dk_ref, dv_ref,
    q_unit, k_unit, dq, *shared, window, scale, b,
):  # fmt: skip
    """One head: dq, dk, dv (T, H). Keys run along the rows of each tile, so that lse and delta (1, T) are row vectors.

    delta is the row sum of o * do. dk and dv of a key head that several query heads share are summed in `shared`.
    """
    T, H = q_ref.shape
    blocks = [slice(i * b, (i + 1) * b) for i in range(T // b)]
    for rows in blocks:
        q_unit[rows, :] = (rotated_unit(q_ref, cos, sin, rows) * scale).astype(q_unit.dtype)
        k_unit[rows, :] = rotated_unit(k_ref, cos, sin, rows).astype(k_unit.dtype)
        dq[rows, :] = jnp.zeros((b, H), jnp.float32)
    for j, cols in enumerate(blocks):
        dk = dv = jnp.zeros((b, H), jnp.float32)
        for i, masked in [(i, masked) for i, j_, masked in tiles(T, window, b) if j_ == j]:
            rows = blocks[i]
            s = dot(k_unit[cols, :], q_unit[rows, :], 1, 1) - lse_ref[:, rows]
            p = jnp.exp(mask_scores(s, i, j, window, 1) if masked else s)
            dp = dot(v_ref[cols, :], do_ref[rows, :], 1, 1)
            ds = (p * (dp - delta_ref[:, rows])).astype(q_ref.dtype)
            dv += dot(p.astype(q_ref.dtype), do_ref[rows, :], 1, 0)
            dk += dot(ds, q_unit[rows, :], 1, 0)
            dq[rows, :] += dot(ds, k_unit[cols, :], 0, 0)
        grads = [rotated_unit_backward(k_ref, dk, cos, sin, cols), dv]
        for total, g in zip(shared, grads, strict=False):
            total[cols, :] = jnp.where(pl.program_id(2) == 0, 0.0, total[cols, :]) + g
        dk, dv = [total[cols, :] for total in shared] or grads
        dk_ref[cols, :] = dk.astype(dk_ref.dtype)
        dv_ref[cols, :] = dv.astype(dv_ref.dtype)
    for rows in blocks:
        grad = rotated_unit_backward(q_ref, dq[rows, :] * scale, cos, sin, rows)
        dq_ref[rows, :] = grad.astype(dq_ref.dtype)


def interpreted_off_tpu(kernel, *args):
    """kernel(interpret, *args), with Pallas interpreting wherever the program is not compiled for a TPU.

    The choice is made when the program is lowered, by its target and not by this host: a v6e program compiled on a
    CPU gets the real kernel.
    """
    return jax.lax.platform_dependent(
        *args, tpu=functools.partial(kernel, False), default=functools.partial(kernel, True)
    )


def call_by_head(kernel, name, inputs, tables, outputs, scratch, cost):
    """pallas_call over (B, K, N / K); inputs and outputs are (B, N or K, rows, columns), tables (T, H)."""
    (B, N), K = inputs[0].shape[:2], inputs[1].shape[1]

    def spec(a):  # a product of grid indices, never a quotient: `//` of one asks for the local device, here a CPU
        per_query_head = a.shape[1] == N
        return pl.BlockSpec(
            (None, None, *a.shape[2:]), lambda b, k, g: (b, k * (N // K) + g if per_query_head else k, 0, 0)
        )

    def run(interpret, *args):
        return pl.pallas_call(
            kernel, name=name, grid=(B, K, N // K), interpret=interpret, cost_estimate=cost,
            in_specs=[spec(a) for a in inputs] + [pl.BlockSpec(t.shape, lambda b, k, g: (0, 0)) for t in tables],
            out_specs=[spec(a) for a in outputs], out_shape=outputs, scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20
            ),
        )(*args)  # fmt: skip

    return interpreted_off_tpu(run, *inputs, *tables)


def count_cost(arrays, window, products):
    """What XLA should know of a kernel: `products` products of H channels for every pair of a visited tile."""
    B, N, T, H = arrays[0].shape
    b = block_size(T)
    pairs = B * N * b * b * sum(1 for _ in tiles(T, window, b))
    return pl.CostEstimate(
        flops=2 * products * pairs * H,
        transcendentals=pairs,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def fused_attention(q, k, v, cos, sin, window, scale):
    """Attention over the last `window` keys of q and k as they leave their products: (B, N, T, H), in q's dtype.

    q (B, N, T, H), k and v (B, K, T, H). cos and sin (T, H) float32: cosines and signed sines of the rotary angles, as
    `rotate` takes them. T a multiple of 128, H of 128. Scores are of rotated, normed q and k, times `scale`.
    """
    return fused_forward(q, k, v, cos, sin, window, scale)[0]


def fused_forward(q, k, v, cos, sin, window, scale):
    kernel = functools.partial(forward_kernel, window=window, scale=scale, b=block_size(q.shape[2]))
    row = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype), row]
    scratch, cost = [pltpu.VMEM(q.shape[2:], q.dtype)], count_cost((q, k, v, q), window, 2)
    o, lse = call_by_head(kernel, f"attention_forward_{window}", (q, k, v), (cos, sin), outputs, scratch, cost)
    return o, (q, k, v, cos, sin, o, lse)


def fused_backward(window, scale, saved, do):
    q, k, v, cos, sin, o, lse = saved
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1)[:, :, None]
    kernel = functools.partial(backward_kernel, window=window, scale=scale, b=block_size(q.shape[2]))
    scratch = [pltpu.VMEM(q.shape[2:], dtype) for dtype in (q.dtype, q.dtype, jnp.float32)]
    if k.shape[1] < q.shape[1]:
        scratch += [pltpu.VMEM(q.shape[2:], jnp.float32)] * 2
    outputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v)]
    inputs, cost = (q, k, v, do, lse, delta), count_cost((q, k, v, o, do, q, k, v), window, 5)
    grads = call_by_head(kernel, f"attention_backward_{window}", inputs, (cos, sin), outputs, scratch, cost)
    return *grads, None, None


fused_attention.defvjp(fused_forward, fused_backward)


# ----------------------------------------------------------------------------------------------------------------------
# As a model calls them: tokens before heads


def pallas_attention(q, k, v, cos, sin, window, scale):
    """Attention over the last `window` keys by the kernels above, (B, T, N, H) in q's dtype.

    q (B, T, N, H) and k, v (B, T, K, H) as they leave their products: RoPE and QK-norm are done here. cos, sin (T, H)
    float32; scale: what the scores are multiplied by. T and H multiples of 128, T * H at most MOST_ENTRIES.
    """
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    return jnp.swapaxes(fused_attention(*heads_first, cos, sin, window, scale), 1, 2)


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
