"""02's optimizer and training step: schedule, AdamW, accumulation, masks, devices, sharding, against float64 NumPy.

The step is compiled once for each config. What needs eight devices runs in one child process, `report_devices` below.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import (
    full_compiler,  # noqa: F401
    quick_compiler,  # noqa: F401  (a fixture for every test)
    random_batch,
    random_params,
    replace,
)
from reference import adamw_reference, distance, gpt_logits, losses_of_logits, rate_reference, widen

from onechip.errors import UserError
from onechip.weights import Weight, constant

train = importlib.import_module("02_train")

TESTS = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


@pytest.mark.parametrize(
    "fields, rates",
    [
        # 50 steps: 5 up, 20 down to a quarter
        (
            dict(warmup_ratio=0.1, warmdown_ratio=0.4, final_lr_frac=0.25),
            {0: 0.2, 3: 0.8, 4: 1.0, 5: 1.0, 29: 1.0, 30: 1.0, 31: 0.9625, 40: 0.625, 49: 0.2875},
        ),
        (dict(warmup_ratio=0.0, warmdown_ratio=0.5, final_lr_frac=0.0), {0: 1.0, 25: 1.0, 26: 0.96, 49: 0.04}),
        (dict(warmup_ratio=0.0, warmdown_ratio=0.0, final_lr_frac=0.0), {0: 1.0, 25: 1.0, 49: 1.0}),
        (dict(warmup_ratio=0.5, warmdown_ratio=0.5, final_lr_frac=1.0), {0: 0.04, 24: 1.0, 25: 1.0, 49: 1.0}),
        (dict(warmup_ratio=1.0, warmdown_ratio=0.0), {0: 0.02, 24: 0.5, 49: 1.0}),
    ],
)
def test_learning_rate_rises_stays_and_falls(fields, rates):
    """The trapezoid at its corners: the first step is not lost at rate 0, the last is not yet past the end."""
    config = replace(num_iterations=50, learning_rate=0.5, **fields)
    rate = jax.jit(functools.partial(train.learning_rate_at, config))
    for step, share in rates.items():
        assert float(rate(jnp.int32(step))) == pytest.approx(0.5 * share, rel=1e-6), step
    every = [rate_reference(config, step) for step in range(50)]
    np.testing.assert_allclose([float(rate(jnp.int32(step))) for step in range(50)], every, rtol=1e-6)


def table_of(kinds):
    """A table of weights of which only the kinds matter."""
    return {name: Weight("", constant(0.0), kind) for name, kind in kinds.items()}


def test_adamw_equals_a_float64_reference_over_20_steps():
    """Moments, bias correction, decay on matrices only and the schedule, to float32 rounding: 3e-6 of each array."""
    config = replace(
        num_iterations=20, learning_rate=0.05, weight_decay=0.3, beta1=0.8, beta2=0.93, eps=1e-2, warmup_ratio=0.25,
        warmdown_ratio=0.5, final_lr_frac=0.1,
    )  # fmt: skip
    rng = np.random.default_rng(6)
    shapes = {"scalars": (7,), "matrix": (3, 5), "heads": (2, 11, 13), "scalar": ()}
    table = table_of({"scalars": "scalar", "matrix": "mlp", "heads": "attention", "scalar": "scalar"})
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    moments = train.adamw_init(config, table, params)
    assert all(not leaf.any() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(moments))
    assert {k: v.shape for k, v in moments["mu"].items()} == {k: v.shape for k, v in moments["nu"].items()} == shapes
    update = jax.jit(functools.partial(train.adamw_update, config, table))
    want = {name: np.float64(p) for name, p in params.items()}
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for step in range(20):
        scale = 10.0 ** rng.uniform(-3, 0)
        grads = {n: np.asarray(scale * (rng.normal(size=s) + 0.3), np.float32) for n, s in shapes.items()}
        params, moments = update(params, moments, grads, jnp.int32(step))
        wide = {n: np.float64(g) for n, g in grads.items()}
        adamw_reference(config, want, wide, m, v, step, spared={"scalars", "scalar"})
        assert distance((params, moments["mu"], moments["nu"]), (want, m, v)) < 3e-6, step
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, moments)))


def test_weight_decay_spares_scalars():
    """With no gradient, all shrinks by rate * weight_decay but what the table calls scalars, whatever its shape."""
    config = replace(num_iterations=10, warmup_ratio=0.0, learning_rate=0.25, weight_decay=0.5)
    kinds = {"lambdas": "scalar", "gates": "scalar", "matrix": "mlp", "column": "attention"}
    shapes = {"lambdas": (3,), "gates": (2, 3), "matrix": (3, 2), "column": (5,)}
    params = {name: np.full(shape, 1.5, np.float32) for name, shape in shapes.items()}
    grads, table = jax.tree.map(np.zeros_like, params), table_of(kinds)
    update = jax.jit(functools.partial(train.adamw_update, config, table))
    after, _ = update(params, train.adamw_init(config, table, params), grads, jnp.int32(0))
    for name in ("lambdas", "gates"):
        np.testing.assert_array_equal(after[name], params[name])
    for name in ("matrix", "column"):
        np.testing.assert_allclose(after[name], 1.5 * (1 - 0.25 * 0.5), rtol=1e-6)


def test_global_norm_is_euclidean_over_all_leaves():
    """The norm of one long vector: 2 ** 2 + 3 ** 2 + 6 ** 2 = 7 ** 2, whatever the shapes."""
    tree = {"a": np.float32([2.0, 0.0]), "b": [np.float32([[-3.0]]), np.float32(6.0)]}
    assert float(train.global_norm(tree)) == pytest.approx(7.0, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The step

# Two layers. eps is large, so that what rounding makes of a gradient of nearly 0 does not decide a parameter's sign.
STEP = replace(aspect_ratio=42, device_batch_size=2, total_batch_size=12, grad_clip=0.0, learning_rate=1e-2, eps=1e-3)


@functools.cache
def compile_step(config, *names):
    """The step compiled for one device and a batch of x, y and what else is named: (state, batch) -> (state, ...)."""
    return train.lower_step(config, train.make_mesh(), batch=("x", "y", *names)).compile()


@functools.cache
def initial_state():
    return jax.device_get(train.init_state(STEP, train.make_mesh()))


def fresh_state(params=None):
    """STEP's state on the device and there to be donated, with the given parameters if any."""
    state = initial_state() if params is None else {**initial_state(), "params": params}
    return jax.tree.map(jnp.array, state)


def run_steps(config, count, params=None, step=None):
    """(state on the host, losses, metrics of the last step) after `count` steps on as many batches."""
    state, losses, step = fresh_state(params), [], step or compile_step(config)
    for i in range(count):
        state, metrics = step(state, random_batch(config, 2 + i))
        losses.append(np.asarray(metrics["loss"]))
    return jax.device_get(state), losses, jax.device_get(metrics)


@functools.cache
def compiled_loss(config):
    """A jitted (params, batch) -> (cross_entropy, its gradients); float32."""
    return jax.jit(jax.value_and_grad(functools.partial(train.cross_entropy, config, train.GPT)))


@functools.cache
def three_steps(microbatch):
    """What run_steps gives for three steps of 12 sequences, `microbatch` at a time, from weights with none at zero."""
    config = dataclasses.replace(STEP, device_batch_size=microbatch)
    step = train.lower_step(config, train.make_mesh()).compile()
    return run_steps(config, 3, random_params(STEP), step)


@pytest.mark.slow
@pytest.mark.usefixtures("full_compiler")
@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_accumulating_equals_one_large_batch(microbatch):
    """12 sequences by 1, 2 or 3 at a time: the same losses, moments and parameters to rounding; sums are not means.

    Optimized, a program sums in several parts at once. One after another, 64,000 numbers in float32 are off by 2e-5 for
    a lambda, whose gradient nearly cancels.
    """
    state, losses, metrics = three_steps(microbatch)
    want_state, want_losses, want_metrics = three_steps(12)
    np.testing.assert_allclose(losses, want_losses, rtol=2e-6)
    assert metrics["grad_norm"] == pytest.approx(want_metrics["grad_norm"], rel=2e-5)
    assert distance(state["opt"]["mu"], want_state["opt"]["mu"]) < 2e-5
    assert distance(state["params"], want_state["params"]) < 2e-5


def flat(tree):
    """{path: float64 array}."""
    return {jax.tree_util.keystr(k): np.float64(a) for k, a in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_step_is_the_gradient_put_through_adamw():
    """One step equals cross_entropy's gradient, global_norm and the float64 AdamW, and reports what it did."""
    params, batch = random_params(STEP), random_batch(STEP)
    state, losses, metrics = run_steps(STEP, 1, params)
    wide = widen(params)
    want_losses = losses_of_logits(gpt_logits(STEP, wide, batch["x"]), batch["y"])
    assert losses[0] == pytest.approx(want_losses.mean(), abs=1e-5)
    # The mean is taken in float64, over the step's own microbatches: a lambda's gradient nearly cancels over the batch.
    rows = [slice(i, i + STEP.device_batch_size) for i in range(0, STEP.total_batch_size, STEP.device_batch_size)]
    parts = [flat(compiled_loss(STEP)(params, {k: a[part] for k, a in batch.items()})[1]) for part in rows]
    want, grads = flat(wide), {name: sum(part[name] for part in parts) / len(rows) for name in parts[0]}
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["lr"] == pytest.approx(rate_reference(STEP, 0), rel=1e-6)
    assert state["step"] == 1
    m, v = ({name: np.zeros_like(a) for name, a in want.items()} for _ in range(2))
    adamw_reference(STEP, want, grads, m, v, 0, spared={name for name in want if "lambdas" in name})
    assert distance(flat(state["opt"]["mu"]), m) < 5e-6
    assert distance(flat(state["params"]), want) < 2e-5


def unequal_mask(config, seed=0):
    """(total_batch_size, seq_len) int32: rows of 0 to all targets that count, the first two of none."""
    shares = np.linspace(0, 1, config.total_batch_size - 1)[:, None]
    drawn = np.random.default_rng(seed).random((config.total_batch_size - 1, config.seq_len)) < shares
    return np.concatenate([np.zeros((1, config.seq_len)), drawn]).astype(np.int32)


def test_every_target_counts_the_same():
    """Microbatches of 0 to 36 targets that count: the loss and gradient are the mean over all targets of the batch."""
    params, mask = random_params(STEP), unequal_mask(STEP)
    counts = mask.reshape(6, -1).sum(axis=1)
    assert counts[0] == 0 and len(set(counts)) == 6 and counts[-1] > 30
    batch = {**random_batch(STEP), "mask": mask}
    state, metrics = compile_step(STEP, "mask")(fresh_state(params), batch)
    want_losses = losses_of_logits(gpt_logits(STEP, widen(params), batch["x"]), batch["y"])
    assert float(metrics["loss"]) == pytest.approx(want_losses[mask == 1].mean(), abs=1e-5)
    loss, grads = compiled_loss(STEP)(params, batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=2e-6)
    assert metrics["grad_norm"] == pytest.approx(float(train.global_norm(grads)), rel=2e-5)
    assert distance(state["opt"]["mu"], jax.tree.map(lambda g: (1 - STEP.beta1) * np.float64(g), grads)) < 2e-5
    _, metrics = compile_step(STEP, "mask")(fresh_state(params), {**batch, "mask": 0 * mask})
    assert metrics["loss"] == metrics["grad_norm"] == 0  # no target at all is no NaN


def test_clipping_scales_the_gradient_to_the_norm_and_no_further():
    """A gradient above grad_clip is scaled to it as a whole, one below is left alone, and 0 means no clipping."""
    starts = [random_params(STEP), initial_state()["params"]]  # the second's gradient is the smaller one
    free = [run_steps(STEP, 1, start) for start in starts]
    norms = [float(metrics["grad_norm"]) for _, _, metrics in free]
    clip = norms[0] / 3
    assert norms[1] < 0.9 * clip
    for start, (want, _, _), norm, scale in zip(starts, free, norms, (1 / 3, 1.0), strict=True):
        clipped, _, metrics = run_steps(dataclasses.replace(STEP, grad_clip=clip), 1, start)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)  # reported as it was before
        mu, nu = want["opt"]["mu"], want["opt"]["nu"]
        assert distance(clipped["opt"]["mu"], jax.tree.map(lambda m, s=scale: s * np.float64(m), mu)) < 2e-6
        assert distance(clipped["opt"]["nu"], jax.tree.map(lambda n, s=scale: s**2 * np.float64(n), nu)) < 4e-6


def test_the_old_state_is_donated_and_nothing_else_is():
    """Undonated, parameters and moments would exist twice, 3.2 GB more by default; the batch must survive."""
    state, batch = fresh_state(), jax.tree.map(jnp.asarray, random_batch(STEP))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers")  # those that no output can take
        train.make_train_step(STEP).lower(state, batch)
    new, _ = compile_step(STEP)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))
    compile_step(STEP)(new, batch)  # and the step continues from there


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_step_is_the_program_of_the_first(dtype):
    """A weakly typed leaf, such as that of jnp.full(n, 0.1), comes back strong: another program, compiled once more.

    Nor does a compute type change the types of masters and moments.
    """
    config = dataclasses.replace(STEP, dtype=dtype)
    before = jax.eval_shape(functools.partial(train.new_state, config, train.GPT, train.ADAMW), jax.random.key(0))
    after, _ = jax.eval_shape(train.make_train_step(config), before, random_batch(config))
    kinds = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    assert kinds(after) == kinds(before)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((after["params"], after["opt"]))} == {"float32"}


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    """Three steps twice: parameters and losses equal to the last bit, so that a run can be repeated."""
    (first, losses, _), (second, again, _) = run_steps(STEP, 3), run_steps(STEP, 3)
    assert np.array_equal(losses, again)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    other = train.init_state(dataclasses.replace(STEP, param_seed=43), train.make_mesh())
    assert not np.array_equal(other["params"]["wte"], initial_state()["params"]["wte"])


def test_loss_starts_at_a_uniform_guess_and_falls():
    """At step 0 all logits are nearly 0 and the loss is log(V) to 5e-3; 40 steps on one batch halve it at least."""
    state, batch, losses = fresh_state(), random_batch(STEP), []
    for _ in range(STEP.num_iterations):
        state, metrics = compile_step(STEP)(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(31), abs=5e-3)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_bfloat16_keeps_float32_masters_and_moments():
    """Masters in bfloat16 would not move: a step of 1e-4 of a weight is below its 8 bits."""
    params = random_params(STEP)
    state, losses, _ = run_steps(dataclasses.replace(STEP, dtype="bfloat16"), 1, params)
    assert {str(leaf.dtype) for name in ("params", "opt") for leaf in jax.tree.leaves(state[name])} == {"float32"}
    assert losses[0] == pytest.approx(run_steps(STEP, 1, params)[1][0], rel=0.01)
    matrix = np.asarray(state["params"]["layers"][0]["c_fc"])
    assert (matrix != matrix.astype(jnp.bfloat16)).mean() > 0.9  # not rounded on the way either


LAYER_SCOPES = [f"layer_{i}/{part}" for i in range(2) for part in ("attention", "mlp")]


def test_named_scopes_are_in_the_compiled_step():
    """A profile is read by these names: forward and, where the loss does not bring its own gradient, backward."""
    text = compile_step(STEP).as_text()
    names = [re.sub(r"[()]", "/", name) for name in re.findall(r'op_name="([^"]*)"', text)]
    for scope in ("embedding", *LAYER_SCOPES, "lm_head", "loss", "optimizer"):
        found = [name for name in names if re.search("(^|/)" + scope.replace("/", "/+") + "(/|$)", name)]
        assert [name for name in found if "transpose" not in name], scope
        assert [name for name in found if "transpose" in name] or scope not in ("embedding", *LAYER_SCOPES), scope


# ----------------------------------------------------------------------------------------------------------------------
# Eight devices, in a process that has them

EIGHT = dataclasses.replace(STEP, device_batch_size=1, total_batch_size=16, grad_clip=1.0)


def report_run(count, masked=False, shape=""):
    """Three steps of EIGHT on `count` devices from random parameters: what the tests below compare, as JSON."""
    mesh = train.make_mesh(jax.devices()[:count], shape)
    step, state = train.make_train_step(EIGHT, mesh), train.init_state(EIGHT, mesh)
    place = lambda values, like: jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), values, like)
    state["params"] = place(random_params(EIGHT), state["params"])
    losses = []
    for i in range(3):
        batch = random_batch(EIGHT, i) | ({"mask": unequal_mask(EIGHT, i)} if masked else {})
        state, metrics = step(state, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    shards = {name: leaf.addressable_shards for name, leaf in flat_arrays(state).items()}
    return {
        "losses": losses,
        "params": {name: np.asarray(p).ravel()[:50].tolist() for name, p in flat_arrays(state["params"]).items()},
        "shapes": {name: [list(shard.data.shape) for shard in of_leaf] for name, of_leaf in shards.items()},
        "equal": [n for n, of_leaf in shards.items() if all(np.array_equal(s.data, of_leaf[0].data) for s in of_leaf)],
    }


def flat_arrays(tree):
    """{path: array}."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def report_devices():
    """Prints one line of JSON: runs on 1 and 8 devices, with masks, with weights split, and on 3 devices."""
    report = {"devices": jax.device_count(), "one": report_run(1), "eight": report_run(8)}
    report |= {"one masked": report_run(1, masked=True), "eight masked": report_run(8, masked=True)}
    report["split"] = report_run(8, masked=True, shape="data=2,fsdp=4")
    try:
        train.make_train_step(EIGHT, train.make_mesh(jax.devices()[:3]))
    except UserError as error:
        report["refused"] = str(error)
    print(json.dumps(report))


@pytest.fixture(scope="module")
def devices():
    """What report_devices prints in a process of eight CPU devices."""
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "support")]
    code = f"import sys; sys.path[:0] = {paths}; import test_02_step; test_02_step.report_devices()"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["devices"] == 8
    return report


def assert_same_run(run, want):
    """Losses and gradient norms to 1e-5, parameters to 1e-5."""
    np.testing.assert_allclose(run["losses"], want["losses"], rtol=1e-5)
    for name, values in run["params"].items():
        np.testing.assert_allclose(values, want["params"][name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", " masked"])
def test_eight_devices_give_the_losses_of_one(devices, kind):
    """Eight shards of two microbatches have the mean of sixteen, of unequal masks too; every copy is the same."""
    assert_same_run(devices[f"eight{kind}"], devices[f"one{kind}"])
    assert devices["eight masked"]["losses"] != devices["eight"]["losses"]
    assert devices[f"eight{kind}"]["equal"] == list(devices[f"eight{kind}"]["shapes"])
    assert {len(shapes) for shapes in devices[f"eight{kind}"]["shapes"].values()} == {8}


@pytest.mark.slow
def test_fsdp_splits_weights_and_moments(devices):
    """data=2,fsdp=4: the losses stay, and each device has a quarter of every array with n_embd = 84 and its moments."""
    split = devices["split"]
    assert_same_run(split, devices["one masked"])
    whole = {name: shapes[0] for name, shapes in devices["eight"]["shapes"].items()}
    want = {name: [21 if size == 84 else size for size in shape] for name, shape in whole.items()}
    assert sum(want[name] != shape for name, shape in whole.items()) == 14 * 3  # 6 in two layers each, 2 more
    assert {name: shapes for name, shapes in split["shapes"].items()} == {name: [s] * 8 for name, s in want.items()}
    assert split["equal"] == [name for name, shape in whole.items() if want[name] == shape]


@pytest.mark.slow
def test_a_batch_that_three_devices_cannot_share_is_refused(devices):
    """16 sequences on three devices: one line with both numbers."""
    assert "\n" not in devices["refused"]
    assert "total_batch_size=16" in devices["refused"] and "device_batch_size * devices = 1 * 3" in devices["refused"]
