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
- So does what a model adds to the values, a gate for each head times rows of an embedding. Rows have their heads side
  by side, (T, K * H), and the kernel wants (K, T, H): a block of 128 columns is a head's, and nothing is copied.

Recomputing the scores in the backward pass from one number a row is FlashAttention's idea (Dao, 2022 and 2023). Keys
along the rows of a tile there are Splash Attention's (JAX), which is in splash.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from onechip.errors import require

LANES = 128
EPS = 2.0**-23  # float32's epsilon, added to a mean square, as the model's own norm does
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


def as_column(row):
    """A row (1, b) as a column (b, 128), the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def gated_rows(gate_ref, more_ref, rows):
    """(gate times more, gate) of some rows, float32 (b, H): gate_ref (1, T), more_ref (T, H)."""
    gate = jnp.tile(as_column(gate_ref[:, rows]), (1, more_ref.shape[1] // LANES))
    return gate * more_ref[rows, :].astype(jnp.float32), gate


def sum_values(v_ref, more, value, blocks):
    """Writes v + gate * more to value (T, H), a block at a time; more: refs of (gate, more)."""
    for rows in blocks:
        value[rows, :] = (v_ref[rows, :].astype(jnp.float32) + gated_rows(*more, rows)[0]).astype(value.dtype)


def forward_kernel(q_ref, k_ref, v_ref, *refs, window, scale, b, gated):
    """One head: o (T, H) and the scores' logsumexp (1, T) from q, k, v (T, H).

    gated: two more inputs, gate (1, T) and more (T, H); values are v + gate * more.
    """
    more, (cos, sin, o_ref, lse_ref, k_unit, *value) = refs[: 2 * gated], refs[2 * gated :]
    T, H = q_ref.shape
    blocks = [slice(i * b, (i + 1) * b) for i in range(T // b)]
    ones = jnp.ones((b, LANES), v_ref.dtype)
    if gated:
        sum_values(v_ref, more, value[0], blocks)
        v_ref = value[0]
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


def backward_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs, window, scale, b, gated):
    """One head: dq, dk, dv (T, H). Keys run along the rows of each tile, so that lse and delta (1, T) are row vectors.

    delta is the row sum of o * do. dk and dv of a key head that several query heads share are summed in `shared`.
    gated: gate (1, T) and more (T, H) go in as well, and their gradients come out.
    """
    more, (cos, sin, *refs) = refs[: 2 * gated], refs[2 * gated :]
    (dq_ref, dk_ref, dv_ref), d_more, refs = refs[:3], refs[3 : 3 + 2 * gated], refs[3 + 2 * gated :]
    (q_unit, k_unit, dq), value, shared = refs[:3], refs[3 : 3 + gated], refs[3 + gated :]
    T, H = q_ref.shape
    blocks = [slice(i * b, (i + 1) * b) for i in range(T // b)]
    for rows in blocks:
        q_unit[rows, :] = (rotated_unit(q_ref, cos, sin, rows) * scale).astype(q_unit.dtype)
        k_unit[rows, :] = rotated_unit(k_ref, cos, sin, rows).astype(k_unit.dtype)
        dq[rows, :] = jnp.zeros((b, H), jnp.float32)
    if gated:
        sum_values(v_ref, more, value[0], blocks)
        v_ref = value[0]
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
        if gated:
            write_gate_gradients(*more, *d_more, dv, cols)
    for rows in blocks:
        grad = rotated_unit_backward(q_ref, dq[rows, :] * scale, cos, sin, rows)
        dq_ref[rows, :] = grad.astype(dq_ref.dtype)


def write_gate_gradients(gate_ref, more_ref, d_gate, d_more, dv, cols):
    """Writes some rows of the gradients of gate and more, from that of the values, dv (b, H)."""
    gate = gated_rows(gate_ref, more_ref, cols)[1]
    d_more[cols, :] = (gate * dv).astype(d_more.dtype)
    d_gate[:, cols] = jnp.sum(more_ref[cols, :].astype(jnp.float32) * dv, axis=1, keepdims=True).T


def interpreted_off_tpu(kernel, *args):
    """kernel(interpret, *args), with Pallas interpreting wherever the program is not compiled for a TPU.

    The choice is made when the program is lowered, by its target and not by this host: a v6e program compiled on a
    CPU gets the real kernel.
    """
    return jax.lax.platform_dependent(
        *args, tpu=functools.partial(kernel, False), default=functools.partial(kernel, True)
    )


def call_by_head(kernel, name, inputs, tables, outputs, scratch, cost):
    """pallas_call over (B, K, N / K): inputs, outputs (B, N or K, rows, columns) or (B, T, K * H); tables (T, H)."""
    (B, N), K, H = inputs[0].shape[:2], inputs[1].shape[1], inputs[0].shape[3]

    def spec(a):  # a product of grid indices, never a quotient: `//` of one asks for the local device, here a CPU
        if len(a.shape) == 3:
            return pl.BlockSpec((None, a.shape[1], H), lambda b, k, g: (b, 0, k))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def fused_attention(q, k, v, more, cos, sin, window, scale):
    """Attention over the last `window` keys of q and k as they leave their products: (B, N, T, H), in q's dtype.

    q (B, N, T, H), k and v (B, K, T, H). more: None, or what is added to v, a gate (B, K, 1, T) float32 times rows
    (B, T, K * H). cos and sin (T, H) float32: cosines and signed sines of the rotary angles, as
    `rotate` takes them. T a multiple of 128, H of 128. Scores are of rotated, normed q and k, times `scale`.
    """
    return fused_forward(q, k, v, more, cos, sin, window, scale)[0]


def fused_forward(q, k, v, more, cos, sin, window, scale):
    gated = more is not None
    kernel = functools.partial(forward_kernel, window=window, scale=scale, b=block_size(q.shape[2]), gated=gated)
    row = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype), row]
    inputs = (q, k, v, *(more or ()))
    scratch, cost = [pltpu.VMEM(q.shape[2:], q.dtype)] * (1 + gated), count_cost((*inputs, q), window, 2)
    o, lse = call_by_head(kernel, f"attention_forward_{window}", inputs, (cos, sin), outputs, scratch, cost)
    return o, (q, k, v, more, cos, sin, o, lse)


def fused_backward(window, scale, saved, do):
    q, k, v, more, cos, sin, o, lse = saved
    gated, more = more is not None, more or ()
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1)[:, :, None]
    kernel = functools.partial(backward_kernel, window=window, scale=scale, b=block_size(q.shape[2]), gated=gated)
    scratch = [pltpu.VMEM(q.shape[2:], dtype) for dtype in (q.dtype, q.dtype, jnp.float32, *[v.dtype] * gated)]
    if k.shape[1] < q.shape[1]:
        scratch += [pltpu.VMEM(q.shape[2:], jnp.float32)] * 2
    outputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v, *more)]
    inputs, cost = (q, k, v, do, lse, delta, *more), count_cost((q, k, v, o, do, q, k, v, *more, *more), window, 5)
    grads = call_by_head(kernel, f"attention_backward_{window}", inputs, (cos, sin), outputs, scratch, cost)
    return *grads[:3], tuple(grads[3:]) if gated else None, None, None


fused_attention.defvjp(fused_forward, fused_backward)


# ----------------------------------------------------------------------------------------------------------------------
# As a model calls them: tokens before heads


def pallas_attention(q, k, v, cos, sin, window, scale, more=None):
    """Attention over the last `window` keys by the kernels above, (B, T, N, H) in q's dtype.

    q (B, T, N, H) and k, v (B, T, K, H) as they leave their products: RoPE and QK-norm are done here. cos, sin (T, H)
    float32; scale: what the scores are multiplied by; more: what is added to v, a gate (B, T, K) float32 for each head
    and rows (B, T, K * H). T and H multiples of 128, T * H at most MOST_ENTRIES.
    """
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    if more is not None:
        gate, rows = more
        more = jnp.swapaxes(gate, 1, 2)[:, :, None].astype(jnp.float32), rows
    return jnp.swapaxes(fused_attention(*heads_first, more, cos, sin, window, scale), 1, 2)
