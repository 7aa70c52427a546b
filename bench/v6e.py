"""What the v6e compiler reports about 02's step, next to the plain design it started from. No TPU is needed or used.

    uv run bench/v6e.py                     all measures, one table: some 25 programs of up to 24 layers
    uv run bench/v6e.py time memory         some of them: time, memory, batch, family
    uv run bench/v6e.py depth12 depth24     05's whole step, without its value embeddings, and with AdamW for Muon
    uv run bench/v6e.py target              05's preset 3.28: chip-minutes to its last step, next to a published run's
    uv run bench/v6e.py micro               estimates for 1, 2, 4, 8 and 16 sequences a microbatch, 64 in all
    uv run bench/v6e.py micro 04_maxtext n_layer=8    the same for 04's model, with other settings

The baseline is the design that vorushin/tpuchat (https://github.com/vorushin/tpuchat), the ancestor of this project,
started from: einsum attention with T x T scores, autodiff throughout (so that ReLU squared keeps its mask and the
logits are kept in float32), nothing donated, 4 x 2048 tokens. Times are the compiler's own estimates, not measurements
(onechip/estimate.py); bytes are what the chip will use.
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
from jax.sharding import NamedSharding, PartitionSpec

from onechip.chips import GIB, memory_limit, topology_devices
from onechip.doors import config_with
from onechip.fit import compare_microbatches, measure, peak_rate
from onechip.fitreport import describe_time
from onechip.largest import largest_that_fits
from onechip.settings import boolean
from onechip.stages import stages_of
from onechip.weights import cast_weights

DEFAULT = train.Config(device_batch_size=4)
# tpuchat's SwiGLU program on one v6e, 16 x (4 x 2048), by the same estimate. Measured there: 302, later 290 ms. Its
# notes also have 275 ms for a variant of it, of which there is no estimate.
TPUCHAT_ESTIMATED_MS = 364


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
    params = cast_weights(train.GPT.weights(config), params, config.dtype)
    cos, sin = train.rope_tables(config)
    h = h0 = plain_norm(params["wte"][x])
    for i, layer in enumerate(params["layers"]):
        h = (params["resid_lambdas"][i] * h + params["x0_lambdas"][i] * h0).astype(h.dtype)
        a = plain_norm(h)
        q, k, v = (jnp.einsum("btd,dnh->bnth", a, layer[name]) for name in ("c_q", "c_k", "c_v"))
        q, k = (plain_norm(plain_rope(a, cos, sin)) for a in (q, k))
        h = h + jnp.einsum("bnth,nhd->btd", plain_attention(q, k, v, config.windows[i]), layer["c_proj"])
        h = h + jnp.square(jax.nn.relu(plain_norm(h) @ layer["c_fc"])) @ layer["mlp_proj"]
    z = jnp.einsum("btd,dv->btv", plain_norm(h), params["lm_head"], preferred_element_type=jnp.float32)
    z = config.softcap * jnp.tanh(z / config.softcap)
    return jnp.mean(jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0])


def plain_step(config, state, x, y):
    """One undonated step of the baseline: (state, x, y) -> (state, loss); x, y (total_batch_size, T)."""

    def add(total, xy):
        found = jax.value_and_grad(plain_loss, argnums=1)(config, state["params"], *xy)
        return jax.tree.map(jnp.add, total, found), None

    micro = [a.reshape(-1, config.device_batch_size, a.shape[-1]) for a in (x, y)]
    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["params"])
    if len(micro[0]) == 1:
        loss, grads = add(zero, [a[0] for a in micro])[0]
    else:
        loss, grads = jax.lax.scan(add, zero, micro)[0]
    grads = jax.tree.map(lambda g: g / len(micro[0]), grads)
    weights, step = train.GPT.weights(config), state["step"]
    params, opt = train.adamw_update(config, weights, state["params"], state["opt"], grads, step)
    return {"params": params, "opt": opt, "step": step + 1}, loss / len(micro[0])


def plain_state(config):
    """The baseline's state of step 0."""
    params = train.init_params(config, jax.random.key(config.param_seed))
    opt = train.adamw_init(config, train.GPT.weights(config), params)
    return {"params": params, "opt": opt, "step": jnp.zeros((), jnp.int32)}


def baseline(mesh):
    """The baseline as a Workload. Its configs have attn_impl="einsum", by which its time is estimated."""
    whole = NamedSharding(mesh, PartitionSpec())

    def lower(config):
        state = jax.eval_shape(functools.partial(plain_state, config))
        tokens = jax.ShapeDtypeStruct((config.total_batch_size, config.seq_len), jnp.int32)
        step = jax.jit(functools.partial(plain_step, config), in_shardings=whole)
        return step.lower(state, tokens, tokens)

    return train.workload(mesh)._replace(lower=lower)


def measure_both(mesh, config):
    """The Fits of the baseline and of 02, for the same sizes."""
    plain = dataclasses.replace(config, attn_impl="einsum")
    return measure(baseline(mesh), plain), measure(train.workload(mesh), config)


# ----------------------------------------------------------------------------------------------------------------------
# Measures: {name: (unit, of the baseline, of ours)}


def rows_at_once(config, rows):
    return dataclasses.replace(config, device_batch_size=rows, total_batch_size=rows)


def nanoseconds_per_token(config, fit):
    return 1e9 * fit.step_seconds / (config.total_batch_size * config.seq_len)


def measure_time(mesh):
    fits = measure_both(mesh, DEFAULT)
    yield "estimated time, 16 x (4 x 2048)", "ns a token", *(nanoseconds_per_token(DEFAULT, fit) for fit in fits)


def measure_memory(mesh):
    config = rows_at_once(DEFAULT, 4)
    fits = measure_both(mesh, config)
    yield "peak HBM, 4 x 2048", "GiB", *(fit.peak_bytes / GIB for fit in fits)
    yield "HBM traffic, 4 x 2048", "MB a token", *(fit.bytes_per_token / 1e6 for fit in fits)
    yield "estimated time, 4 x 2048, update included", "ns a token", *(nanoseconds_per_token(config, f) for f in fits)


def find_largest(work, config, start):
    """The most sequences of a Workload that fit at a time; prints each program that is tried."""

    def peak_of(rows):
        fit = measure(work, rows_at_once(config, rows))
        print(f"  {rows} rows: {fit.peak_bytes / GIB:.2f} GiB, {fit.compile_seconds:.0f} s", flush=True)
        return fit.peak_bytes if fit.fits else None

    return largest_that_fits(peak_of, memory_limit(work.mesh.devices.flat[0]), start)


def measure_batch(mesh):
    before = find_largest(baseline(mesh), dataclasses.replace(DEFAULT, attn_impl="einsum"), 6)
    yield "largest batch, no accumulation", "sequences", before, find_largest(train.workload(mesh), DEFAULT, 40)


def measure_family(mesh):
    maxtext = importlib.import_module("04_maxtext")
    config = maxtext.Config(n_layer=8, n_kv_head=1, attn_impl="pallas")
    fit = measure(train.workload(mesh, maxtext.SWIGLU), config)
    yield "8 layers, 4 x 256 heads, 1 KV, SwiGLU", "ms a step", TPUCHAT_ESTIMATED_MS, 1e3 * fit.step_seconds


def speedrun_config(optimizer, preset="chip", **fields):
    """05's Config with an optimizer's settings."""
    speedrun = importlib.import_module("05_speedrun")
    config_class = config_with(speedrun.Config, optimizer.settings)
    own = {name: value for name, value in speedrun.PRESETS[preset].items() if name != "data"}
    return config_class(**{**own, **fields})


def measure_depth(depth, mesh, **fields):
    """05 at a depth: each row has the step with something less or simpler, and then the whole one."""
    speedrun = importlib.import_module("05_speedrun")

    def fit_of(optimizer=speedrun.MUON, **changes):
        config = speedrun_config(optimizer, depth=depth, **fields, **changes)
        fit = measure(train.workload(mesh, speedrun.NANOCHAT, optimizer), config)
        where = f"depth {depth}, {config.total_batch_size} x {config.seq_len}"
        print(f"  {where}, {changes or optimizer.name}: {fit.peak_bytes / GIB:.2f} GiB, {fit.compile_seconds:.0f} s to "
              f"compile, {describe_time(config, fit, peak_rate(train.workload(mesh, speedrun.NANOCHAT), config))}",
              flush=True)  # fmt: skip
        return nanoseconds_per_token(config, fit)

    whole = fit_of()
    yield f"depth {depth}: no value embeddings, all", "ns a token", fit_of(value_embeds=False), whole
    yield f"depth {depth}: AdamW, Muon", "ns a token", fit_of(train.ADAMW), whole


PUBLISHED_MINUTES = 80  # chip-minutes to a loss of 3.28 on FineWeb in modded-nanogpt-jax, on a v6e-8, as published


def measure_target(mesh):
    """Chip-minutes of 05's preset 3.28, all its stages."""
    speedrun = importlib.import_module("05_speedrun")
    config, minutes, start = speedrun_config(speedrun.MUON, "3.28"), 0.0, 0
    for end, stage in stages_of(config):
        fit = measure(train.workload(mesh, speedrun.NANOCHAT, speedrun.MUON), stage)
        minutes, start = minutes + fit.step_seconds * (end - start) / 60, end
        batch = f"{stage.total_batch_size} x {stage.seq_len}"
        print(f"  to step {end}, {batch}: {1e3 * fit.step_seconds:.1f} ms a step", flush=True)
    yield "FineWeb to 3.28", "chip-minutes", PUBLISHED_MINUTES, minutes


def print_microbatches(mesh, name="02_train", *changes):
    """A row per microbatch: what accumulating costs and saves."""
    module = importlib.import_module(name)
    work = train.workload(mesh, train.GPT if name == "02_train" else module.SWIGLU)
    kinds = {field.name: boolean if field.type is bool else field.type for field in dataclasses.fields(module.Config)}
    values = dict(change.split("=") for change in changes)
    config = module.Config(**{name: kinds[name](value) for name, value in values.items()})
    peak = peak_rate(work, config)
    for rows, fit in compare_microbatches(work, config, measure(work, config)):
        print(f"{64 // rows:3} x ({rows:2} x 2048), {config.attn_impl}: {describe_time(config, fit, peak)}; "
              f"compiled in {fit.compile_seconds:.0f} s", flush=True)  # fmt: skip


MEASURES = {
    "time": measure_time, "memory": measure_memory, "batch": measure_batch, "family": measure_family,
    "depth12": functools.partial(measure_depth, 12),
    "depth24": functools.partial(measure_depth, 24, device_batch_size=1, ratio=8.0), "target": measure_target,
}  # fmt: skip


def main(names):
    mesh = train.make_mesh(topology_devices("v6e:1x1"))
    if names[:1] == ["micro"]:
        return print_microbatches(mesh, *names[1:])
    print(f"{'measure':44}{'unit':>12}{'baseline':>11}{'onechip':>11}{'ratio':>8}   jax {jax.__version__}")
    for name in names or MEASURES:
        for what, unit, before, after in MEASURES[name](mesh):
            print(f"{what:44}{unit:>12}{before:11.2f}{after:11.2f}{before / after:8.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
