"""What the v6e compiler says of 02's step, beside the plain design that it started from. No TPU is needed or used.

    uv run bench/v6e.py                     all measures, one table: some 15 programs of up to 16 layers
    uv run bench/v6e.py time memory         some of them: time, memory, batch, family
    uv run bench/v6e.py micro [04_maxtext]  estimates for 1, 2, 4, 8 and 16 sequences a microbatch, 64 in all

The baseline is the ancestor's design: einsum attention with T x T scores, autodiff throughout (so that ReLU squared
keeps its mask and the logits are kept in float32), nothing donated, 4 x 2048 tokens. Times are the compiler's own
estimates and no measurement (chip.py); bytes are what the chip will use.
"""

import dataclasses
import functools
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
train = importlib.import_module("02_train")

import jax
import jax.numpy as jnp

import chip

DEFAULT = train.Config()
PUBLISHED_FAMILY_MS = 364  # the best published program of the family, by the same estimate; measured 290 to 302


# ----------------------------------------------------------------------------------------------------------------------
# The baseline: plain JAX, nothing but autodiff


def plain_norm(x):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.finfo(jnp.float32).eps)).astype(x.dtype)


def plain_rope(x, cos, sin):
    """x (B, heads, T, H) in halves."""
    half = x.shape[-1] // 2
    cos, sin, a, b = cos[:, :half], sin[:, :half], x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1).astype(x.dtype)


def plain_attention(q, k, v, window):
    """(B, heads, T, H), heads first: at this size that compiles to a program a quarter faster than with heads last."""
    positions = jnp.arange(q.shape[2])
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(train.window_mask(positions, positions, window), scores, -jnp.inf)
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores, axis=-1).astype(q.dtype), v)


def plain_loss(config, params, x, y):
    """Mean cross-entropy of x, y (B, T), by autodiff alone; params float32."""
    rope, params = params["rope"], train.cast_params(config, params)
    h = h0 = plain_norm(params["wte"][x])
    for i, layer in enumerate(params["layers"]):
        h = (params["resid_lambdas"][i] * h + params["x0_lambdas"][i] * h0).astype(h.dtype)
        a = plain_norm(h)
        q, k, v = (jnp.einsum("btd,dnh->bnth", a, layer[name]) for name in ("c_q", "c_k", "c_v"))
        q, k = (plain_norm(plain_rope(a, *rope)) for a in (q, k))
        h = h + jnp.einsum("bnth,nhd->btd", plain_attention(q, k, v, config.windows[i]), layer["c_proj"])
        h = h + jnp.square(jax.nn.relu(plain_norm(h) @ layer["c_fc"])) @ layer["mlp_proj"]
    z = jnp.einsum("btd,dv->btv", plain_norm(h), params["lm_head"], preferred_element_type=jnp.float32)
    z = config.softcap * jnp.tanh(z / config.softcap)
    return jnp.mean(jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0])


def plain_step(config, state, constants, x, y):
    """One undonated step of the baseline."""

    def add(total, xy):
        loss = lambda trainable: plain_loss(config, train.merge_params(trainable, constants), *xy)
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(state["params"])), None

    micro = [a.reshape(-1, config.device_batch_size, a.shape[-1]) for a in (x, y)]
    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["params"])
    once = lambda: add(zero, [a[0] for a in micro])[0]
    loss, grads = once() if len(micro[0]) == 1 else jax.lax.scan(add, zero, micro)[0]
    grads = jax.tree.map(lambda g: g / len(micro[0]), grads)
    params, moments = train.adamw_update(config, state["params"], state, grads, state["step"])
    return {"params": params, **moments, "step": state["step"] + 1}, loss / len(micro[0])


def baseline_fit(config, mesh):
    """The baseline's chip.Fit, through 02's own compile and measure."""
    config = dataclasses.replace(config, attn_impl="einsum")
    make, train.make_train_step = train.make_train_step, lambda *_: jax.jit(functools.partial(plain_step, config))
    try:
        return train.measure_fit(config, mesh)
    finally:
        train.make_train_step = make


# ----------------------------------------------------------------------------------------------------------------------
# Measures: {name: (unit, of the baseline, of ours)}


def rows_at_once(config, rows):
    return dataclasses.replace(config, device_batch_size=rows, total_batch_size=rows)


def nanoseconds_per_token(config, fit):
    return 1e9 * fit.step_seconds / (config.total_batch_size * config.seq_len)


def measure_time(mesh):
    fits = baseline_fit(DEFAULT, mesh), train.measure_fit(DEFAULT, mesh)
    yield "estimated time, 16 x (4 x 2048)", "ns a token", *(nanoseconds_per_token(DEFAULT, fit) for fit in fits)


def measure_memory(mesh):
    config = rows_at_once(DEFAULT, 4)
    fits = baseline_fit(config, mesh), train.measure_fit(config, mesh)
    yield "peak HBM, 4 x 2048", "GiB", *(fit.peak_bytes / chip.GIB for fit in fits)
    yield "HBM traffic, 4 x 2048", "MB a token", *(fit.bytes_per_token / 1e6 for fit in fits)
    yield "estimated time, 4 x 2048, update included", "ns a token", *(nanoseconds_per_token(config, f) for f in fits)


def measure_batch(mesh):
    def largest(measure, start):
        def peak_of(rows):
            fit = measure(rows_at_once(DEFAULT, rows), mesh)
            print(f"  {rows} rows: {fit.peak_bytes / chip.GIB:.2f} GiB, {fit.compile_seconds:.0f} s", flush=True)
            return fit.peak_bytes if fit.fits else None

        return chip.largest_that_fits(peak_of, chip.memory_limit(mesh.devices.flat[0]), start)

    yield "largest batch, no accumulation", "sequences", largest(baseline_fit, 6), largest(train.measure_fit, 40)


def measure_family(mesh):
    maxtext = importlib.import_module("04_maxtext")
    config = maxtext.Config(n_layer=8, n_kv_head=1, attn_impl="pallas")
    fit = train.measure_fit(config, mesh, maxtext.SWIGLU)
    yield "8 layers, 4 x 256 heads, 1 KV, SwiGLU", "ms a step", PUBLISHED_FAMILY_MS, 1e3 * fit.step_seconds


def print_microbatches(mesh, name="02_train", *changes):
    """A row per microbatch: what accumulating costs and saves."""
    module = importlib.import_module(name)
    model = train.GPT if name == "02_train" else module.SWIGLU
    config = module.Config(**dict(change.split("=") for change in changes))
    peak = train.peak_rate(config, mesh, model)
    measure = lambda config: train.measure_fit(config, mesh, model)
    for rows, fit in chip.compare_microbatches(config, measure(config), mesh.size, measure):
        print(f"{64 // rows:3} x ({rows:2} x 2048), {config.attn_impl}: {chip.describe_time(config, fit, peak)}; "
              f"compiled in {fit.compile_seconds:.0f} s", flush=True)  # fmt: skip


MEASURES = {"time": measure_time, "memory": measure_memory, "batch": measure_batch, "family": measure_family}


def main(names):
    mesh = train.chip_mesh("v6e:1x1")
    if names[:1] == ["micro"]:
        return print_microbatches(mesh, *names[1:])
    print(f"{'measure':44}{'unit':>12}{'baseline':>11}{'onechip':>11}{'ratio':>8}   jax {jax.__version__}")
    for name in names or MEASURES:
        for what, unit, before, after in MEASURES[name](mesh):
            print(f"{what:44}{unit:>12}{before:11.2f}{after:11.2f}{before / after:8.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
