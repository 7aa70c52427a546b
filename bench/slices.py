"""Meshes: the same losses on any of them, and what a slice of TPU chips makes of a step, by its compiler.

    uv run bench/slices.py equality                  20 steps on every mesh of eight CPU devices, next to one device
    uv run bench/slices.py topologies [NAME ...]     steps compiled for slices, with what goes over their links
    uv run bench/slices.py scaling [CHIPS ...]       one to 256 chips, the tokens a chip or those of a step kept

Nothing here runs on a TPU: times are estimates by the compiler and by the links' published speed.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[1:2] == ["equality"]:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import functools
import importlib

import onechip  # noqa: F401  (before jax)

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from onechip.chips import CHIPS, topology_devices
from onechip.collectives import seconds_of
from onechip.doors import config_with
from onechip.fit import measure, peak_rate
from onechip.fitreport import describe
from onechip.mesh import describe_mesh

train = importlib.import_module("02_train")
maxtext = importlib.import_module("04_maxtext")
speed = importlib.import_module("05_speedrun")

# ----------------------------------------------------------------------------------------------------------------------
# The same losses

TOY = {
    "head_dim": 8, "n_kv_head": 2, "vocab_size": 96, "seq_len": 24, "window_pattern": "SL", "attn_impl": "einsum",
    "dtype": "float32", "total_batch_size": 16, "device_batch_size": 1, "loss_slice": 12, "num_iterations": 20,
}  # fmt: skip
MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4", "data=4,fsdp=2", "fsdp=2", "data=2")
muon = functools.partial(config_with, optimizer_settings=speed.MuonSettings)
# Layers that are split keep less for their gradient, which rounds otherwise. Where an optimizer makes much of rounding,
# layers are computed again on one device as well.
CASES = {
    "gpt, adamw": (train.GPT, train.ADAMW, train.Config(n_head=4, aspect_ratio=16, learning_rate=1e-2, **TOY)),
    "gpt, adamw, no accumulation": (
        train.GPT, train.ADAMW,
        train.Config(n_head=4, aspect_ratio=16, learning_rate=1e-2, **TOY | {"total_batch_size": 8}),
    ),
    "swiglu, muon": (
        maxtext.SWIGLU, speed.MUON,
        muon(maxtext.Config)(
            n_head=4, n_embd=40, n_layer=3, mlp_dim=72, tile=8, learning_rate=0.5, warmup_steps=2, remat="all", **TOY
        ),
    ),
    "nanochat, muon": (
        speed.NANOCHAT, speed.MUON,
        muon(speed.Config)(depth=3, n_embd=32, learning_rate=1.0, warmup_steps=2, remat="all", **TOY),
    ),
}  # fmt: skip


ULP = 2.0**-23  # the distance of float32 numbers, as a share of them


def start_values(params, off=0.0):
    """Parameters with a pattern added: a model that has just been drawn has gradients that are nothing but rounding.

    off: by which share of themselves they are too large or too small, each as a coin says: a norm takes out what is the
    same for all.
    """
    pattern = lambda p: 0.05 * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape).astype(p.dtype)
    signs = lambda p: jax.random.rademacher(jax.random.key(p.size), p.shape, p.dtype)
    return jax.tree.map(lambda p: (p + pattern(p)) * (1 + off * signs(p)), params)


def run_on(mesh, model, optimizer, config, steps=20, off=0.0):
    """([(loss, gradient norm)] of steps on a mesh, float64, and the first moments after one step, which are shares of
    its gradients); off: of start_values."""
    state = train.init_state(config, mesh, model, optimizer)
    place = lambda leaf, like: jax.device_put(leaf, like.sharding)
    state["params"] = jax.tree.map(place, start_values(state["params"], off), state["params"])
    step, split = train.make_train_step(config, mesh, model, optimizer), train.sharding_of(mesh, "B")
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (steps, config.total_batch_size, config.seq_len + 1))
    found, first = [], None
    for row in rows.astype(np.int32):
        state, metrics = step(state, jax.device_put(train.batch_of(row, config.seq_len), split))
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        first = first or jax.device_get(state["opt"]["mu"])
    return np.array(found), first


def compare_meshes(cases, meshes, steps=20):
    """Yields {"case", "mesh", "gradients", "early", "all", "noise"}: how far a mesh is from one device, as shares.

    gradients: of one step, the farthest parameter, of its largest entry; early, all: [losses, norms] of ten steps and
    of all; noise: of all steps of one device that starts one unit in the last place off. Muon brings singular values
    that are nothing but rounding near 1: after a dozen steps rounding shows, on a mesh or not.
    """
    for case in cases:
        one = train.make_mesh(jax.devices()[:1])
        want, first = run_on(one, *CASES[case], steps)
        apart = lambda found, want=want: np.abs(found / want - 1).max(axis=0).tolist()
        noise = apart(run_on(one, *CASES[case], steps, ULP)[0])
        for text in meshes:
            sizes = [int(part.split("=")[1]) for part in text.split(",")]
            found, moments = run_on(train.make_mesh(jax.devices()[: int(np.prod(sizes))], text), *CASES[case], steps)
            far = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), moments, first)
            gradients, early = float(max(jax.tree.leaves(far))), apart(found[:10], want[:10])
            row = {"case": case, "mesh": text, "gradients": gradients, "early": early, "all": apart(found)}
            yield {**row, "noise": noise}


def muon_shared_out(mesh):
    """(whether seven matrices of Muon's, shared out over a mesh of eight, are bit for bit what each is by itself, the
    largest difference from one stack of them on one device: its products sum in another order)."""
    config, alone = CASES["nanochat, muon"][2], train.UNSHARED
    stack = jax.random.normal(jax.random.key(0), (7, 32, 64))
    rest = jax.random.uniform(jax.random.key(1), (7, 1, 64))
    f = functools.partial(speed.muon_stack, config)
    spread = train.Spread(mesh, lambda weight: train.sharding_of(mesh, weight.letters).spec)
    own = jax.jit(functools.partial(alone, f, None))
    each = [
        np.concatenate(parts) for parts in zip(*(own(stack[i : i + 1], rest[i : i + 1]) for i in range(7)), strict=True)
    ]
    shared = [jax.jit(functools.partial(spread, f, axis))(stack, rest) for axis in (None, 0, 1)]
    same = all(np.array_equal(a, b) for found in shared for a, b in zip(found, each, strict=True))
    apart = (np.max(np.abs(a - b)) for a, b in zip(shared[0], own(stack, rest), strict=True))
    return same, float(max(apart))


def show_equality(cases=tuple(CASES), meshes=MESHES):
    """Prints a line of JSON for each case and mesh."""
    for text in meshes[:4]:
        print(json.dumps({"mesh": text, "muon": muon_shared_out(train.make_mesh(shape=text))}), flush=True)
    for row in compare_meshes(cases, meshes):
        print(json.dumps(row), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Slices


def day(depth, rows, tokens, **fields):
    """The model and config of 05's day at another depth: rows a microbatch, tokens a step."""
    own = {name: value for name, value in speed.PRESETS["day"].items() if name != "data"}
    own |= {"depth": depth, "device_batch_size": rows, "total_batch_size": tokens // own.get("seq_len", 2048)} | fields
    return speed.NANOCHAT, speed.MUON, muon(speed.Config)(**own)


# {name: (topology, mesh, what is compiled)}
SLICES = {
    "default": ("v6e:2x4", "data=8", lambda: (train.GPT, train.ADAMW, train.Config())),
    "default-fsdp": ("v6e:2x4", "fsdp=8", lambda: (train.GPT, train.ADAMW, train.Config())),
    "swiglu": ("v6e:2x4", "data=8", lambda: (maxtext.SWIGLU, train.ADAMW, maxtext.Config())),
    "depth12": ("v6e:2x4", "data=8", lambda: day(12, 4, 1 << 19)),
    "depth24": ("v6e:2x4", "data=8", lambda: day(24, 1, 1 << 19)),
    "depth24-fsdp": ("v6e:2x4", "fsdp=8", lambda: day(24, 1, 1 << 19, gather="step")),
    "depth24-large": ("v6e:2x4", "fsdp=8", lambda: day(24, 1, 1 << 20, gather="step")),
    "depth32": ("v6e:2x4", "fsdp=8", lambda: day(32, 1, 1 << 20, gather="step")),
    "depth24-4x4": ("v6e:4x4", "fsdp=16", lambda: day(24, 1, 1 << 20, gather="step")),
    "depth24-v5e": ("v5e:2x4", "fsdp=8", lambda: day(24, 1, 1 << 19)),
    "depth24-v5p": ("v5p:2x2x2", "fsdp=8", lambda: day(24, 1, 1 << 19, gather="step")),
}


def show_slice(name):
    """Compiles a step for a slice; prints memory, what is sent, and the estimated time, tokens/s and chip."""
    topology, mesh, make = SLICES[name]
    model, optimizer, config = make()
    mesh = train.make_mesh(topology_devices(topology), mesh)
    work = train.workload(mesh, model, optimizer)
    found = measure(work, config)
    print(f"== {name}: {topology}, --mesh {describe_mesh(mesh)}, --gather {config.gather}", flush=True)
    print(describe(config, found, peak_rate(work, config)))
    if found.step_seconds:
        rate = config.total_batch_size * config.seq_len / mesh.size / found.step_seconds
        print(f"  {rate / 1e3:.1f} thousand tok/s and chip", flush=True)


def show_scaling(chips=(1, 8, 16, 64, 256)):
    """Prints a step of depth 12 on more and more chips: 65,536 tokens a chip, and 2^20 tokens on all of them."""
    print("| chips | tokens a step | ms | thousand tok/s and chip | waiting for the links |", flush=True)
    for kept in ("tokens a chip", "tokens a step"):
        for count in chips:
            sides = {1: "1x1", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}[count]
            tokens = (1 << 16) * count if kept == "tokens a chip" else 1 << 20
            model, optimizer, config = day(12, 2, tokens)
            mesh = train.make_mesh(topology_devices(f"v6e:{sides}"))
            found = measure(train.workload(mesh, model, optimizer), config)
            links = CHIPS[mesh.devices.flat[0].device_kind].links
            waited = seconds_of(found.traffic, links)[1] / found.step_seconds
            rate = tokens / count / found.step_seconds
            row = f"{count} | {tokens:,} | {1e3 * found.step_seconds:.1f} | {rate / 1e3:.1f} | {waited:.0%}"
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["equality"]:
            show_equality()
        case ["topologies", *names]:
            for name in names or SLICES:
                show_slice(name)
        case ["scaling", *counts]:
            show_scaling(tuple(map(int, counts)) or (1, 8, 16, 64, 256))
        case _:
            sys.exit(__doc__)
