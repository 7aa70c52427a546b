"""How fast is a chip? Products, copies, steps, the loader, a checkpoint, writing: each next to its estimate."""

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from onechip import fit
from onechip.check_report import Row
from onechip.checkpoints import pack_state
from onechip.chips import CHIPS, GIB
from onechip.errors import require
from onechip.estimate import xla_cycles
from onechip.loader import PrefetchDataLoader
from onechip.statefile import fetch
from onechip.weights import bytes_of
from onechip.writer import COPY_SPEED, CheckpointWriter, pause_seconds


class Check(NamedTuple):
    """Something to check. run() -> a Row or several; about: what a row has in `more` if it cannot be run."""

    what: str
    run: Callable
    about: dict = {}


class Seconds(NamedTuple):
    """Of one run: the median of several, the least and the most."""

    median: float
    low: float
    high: float


def timed(run, runs, inner=1):
    """The Seconds of run(), which returns arrays: `runs` times, `inner` calls each queued at once, after a first one.

    The device is waited for at the end of each; the first call, which compiles, does not count.
    """
    jax.block_until_ready(run())
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(inner):
            out = run()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / inner)
    return Seconds(statistics.median(found), min(found), max(found))


def as_row(part, what, seconds, unit, scale, expected=None, by="", note="", more=None):
    """A Row of Seconds in another unit: scale(seconds) -> a number. expected: in seconds, None if there is none."""
    low, high = sorted((scale(seconds.low), scale(seconds.high)))
    expected, by = (scale(expected), by) if expected else (None, "")
    return Row(part, what, "ok", scale(seconds.median), unit, low, high, expected, by, None, note, more or {})


def milliseconds(seconds):
    return 1e3 * seconds


ESTIMATE = "the compiler's estimate"


def program_seconds(compiled, device):
    """A compiled program's seconds by the TPU compiler's estimate, None where there is none. No kernel is counted."""
    chip = CHIPS.get(device.device_kind)
    if device.platform != "tpu" or not (chip and chip.clock):
        return None
    return xla_cycles(compiled.as_text()) / chip.clock or None


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def time_product(context, n):
    """A product of two bfloat16 matrices n x n, in TFLOP/s."""
    device, a = context.device, jax.device_put(jnp.full((n, n), 1 / n, jnp.bfloat16), context.device)
    run = jax.jit(lambda a: a @ a).lower(a).compile()
    chip, flops = CHIPS.get(device.device_kind), 2 * n**3
    expected = program_seconds(run, device)
    share = lambda t: f"{flops / t / chip.peak_flops:.0%} of the chip's peak" if chip else ""
    seconds = timed(lambda: run(a), context.sizes.runs, context.sizes.inner)
    note = share(seconds.median)
    return as_row(
        "machine", f"product {n} x {n}", seconds, "TFLOP/s", lambda t: flops / t / 1e12, expected, ESTIMATE, note
    )


def time_copy(context, size):
    """`size` bytes read and written on the device, in GB/s both ways together."""
    a = jax.device_put(jnp.zeros(size // 4, jnp.float32), context.device)
    run = jax.jit(lambda a: a + 1).lower(a).compile()
    seconds = timed(lambda: run(a), context.sizes.runs, context.sizes.inner)
    expected = program_seconds(run, context.device)
    what = f"memory, {size / 2**20:.0f} MiB read and written"
    return as_row("machine", what, seconds, "GB/s", lambda t: 2 * size / t / 1e9, expected, ESTIMATE)


def time_transfers(context, size):
    """Rows of a copy from the host to the device, and back."""
    array, rate = np.zeros(size // 4, np.float32), lambda t: size / t / 1e9
    up = timed(lambda: jax.device_put(array, context.device), context.sizes.runs)
    there, made = jax.device_put(array, context.device), jax.jit(lambda a: a + 1)
    fresh = lambda: jax.block_until_ready(made(there))  # what NumPy has fetched once stays on the host
    down = []
    for _ in range(context.sizes.runs):
        a, start = fresh(), time.perf_counter()
        fetch(a)
        down.append(time.perf_counter() - start)
    down = Seconds(statistics.median(down), min(down), max(down))
    what = f"{size / 2**20:.0f} MiB"
    yield as_row("machine", f"host to device, {what}", up, "GB/s", rate)
    yield as_row("machine", f"device to host, {what}", down, "GB/s", rate, size / COPY_SPEED, "what checkpoints expect")


def machine_checks(context):
    """Checks for a product, the device's memory and the way to and from the host."""
    s = context.sizes
    yield Check("matrix product", functools.partial(time_product, context, s.product))
    yield Check("memory copy", functools.partial(time_copy, context, s.copy_bytes))
    yield Check("host copies", lambda: list(time_transfers(context, s.host_bytes)))


# ----------------------------------------------------------------------------------------------------------------------
# Training steps


def random_batch(context, config):
    """{"x", "y"} (total_batch_size, T) int32 on the devices: the same random tokens each time."""
    shape = config.total_batch_size, config.seq_len + 1
    tokens = np.random.default_rng(14).integers(0, config.vocab_size, shape, np.int32)
    place = context.given.sharding_of(context.mesh, "B")
    return jax.device_put({"x": tokens[:, :-1], "y": tokens[:, 1:]}, place)


def with_rows(context, name, rows):
    """A subject's Config with that many sequences a microbatch, and the attention that works here."""
    config = context.given.subjects[name].config
    return dataclasses.replace(config, device_batch_size=rows, attn_impl=context.attention(config.attn_impl))


def program_of(context, name, rows):
    """(Config, Fit) of a subject's training step, compiled once."""
    config, subject = with_rows(context, name, rows), context.given.subjects[name]
    if (name, config) not in context.programs:
        work = context.given.workload(context.mesh, subject.model, subject.optimizer)
        found = fit.measure(work, config)
        size = f"{found.peak_bytes / GIB:.3g} GiB"
        require(found.fits, "device_batch_size", rows, f"a step of {name} needs {size}, which the device has not")
        context.programs[name, config] = found
    return config, context.programs[name, config]


def fresh_state(context, name, config):
    """A subject's state of step 0, on the devices."""
    subject = context.given.subjects[name]
    return context.given.init_state(config, context.mesh, subject.model, subject.optimizer)


class Training:
    """A state that is trained step by step on one batch; calling it runs a step and returns its metrics."""

    def __init__(self, context, name, rows):
        self.config, self.fit = program_of(context, name, rows)
        self.state, self.batch = fresh_state(context, name, self.config), random_batch(context, self.config)

    def __call__(self, batch=None):
        self.state, metrics = self.fit.compiled(self.state, self.batch if batch is None else batch)
        return metrics


def device_peak(context):
    """Bytes in use at the fullest moment of this process so far, None where the device does not say."""
    return (context.device.memory_stats() or {}).get("peak_bytes_in_use")


def both_mfu(context, name, config, seconds):
    """{"mfu", "mfu_all_keys"} of a step: counting the keys that a query sees, and all of them; {} if unknown."""
    chip, model = CHIPS.get(context.device.device_kind), context.given.subjects[name].model
    if not chip:
        return {}
    rate = config.total_batch_size * config.seq_len / seconds / (chip.peak_flops * context.mesh.size)
    count = lambda full: rate * context.given.flops_per_token(config, model, full_attention=full)
    return {"mfu": count(False), "mfu_all_keys": count(True)}


def time_step(context, name, rows):
    """Rows of a training step: its time next to the compiler's estimate, and its bytes next to the prediction."""
    before, training = device_peak(context), Training(context, name, rows)
    seconds, config, found = timed(training, context.sizes.runs), training.config, training.fit
    about = {"model": name, "attn_impl": config.attn_impl, "head_dim": config.head_dim, "device_batch_size": rows}
    about |= {"total_batch_size": config.total_batch_size, "seq_len": config.seq_len, "devices": context.mesh.size}
    mfu = both_mfu(context, name, config, seconds.median)
    words = f"MFU {mfu['mfu']:.1%}, {mfu['mfu_all_keys']:.1%} of all keys; " if mfu else ""
    rate = config.total_batch_size * config.seq_len / seconds.median
    note = f"{words}{rate / 1e3:,.3g} thousand tok/s; compiled in {found.compile_seconds:.0f} s"
    what = f"{name}, {config.total_batch_size // (rows * context.mesh.size)} x ({rows} x {config.seq_len})"
    more = {**about, **mfu, "compile_seconds": round(found.compile_seconds, 1)}
    yield as_row("step", what, seconds, "ms", milliseconds, found.step_seconds, ESTIMATE, note, more)
    peak = device_peak(context)
    if peak and peak > (before or 0):  # else an earlier program was larger
        size = {"measured": peak / GIB, "unit": "GiB", "expected": found.peak_bytes / GIB, "by": "the compiler"}
        yield Row("memory", what, more=about, **size)


def step_checks(context):
    """A Check for each subject and microbatch; a microbatch that does not divide the batch is left out."""
    for name, subject in context.given.subjects.items():
        config = subject.config
        for rows in context.sizes.microbatches or (config.device_batch_size,):
            if config.total_batch_size % (rows * context.mesh.size) == 0:
                run = functools.partial(time_step, context, name, rows)
                yield Check(f"{name}, {rows} at a time", lambda run=run: list(run()), {"model": name})


def first_subject(context):
    """(name, rows) of the subject that the parts below train."""
    name, subject = next(iter(context.given.subjects.items()))
    return name, subject.config.device_batch_size


def time_loader(context):
    """A step whose batches come from documents, tokenized in a thread, next to one with its batch at hand."""
    training = Training(context, *first_subject(context))
    alone = timed(training, context.sizes.runs)
    place = functools.partial(jax.device_put, device=context.given.sharding_of(context.mesh, "B"))
    with PrefetchDataLoader(context.given.batches(training.config), place) as loader:
        for _ in range(4):  # what waits on the device already
            training(next(loader)[0])
        beside = timed(lambda: training(next(loader)[0]), 2 * context.sizes.runs)
    return as_row("loader", "a step beside the loader", beside, "ms", milliseconds, alone.median, "the step alone")


def time_checkpoint(context):
    """For how long training waits for a checkpoint."""
    training = Training(context, *first_subject(context))
    jax.block_until_ready(training())
    size = bytes_of(training.state)
    with tempfile.TemporaryDirectory(prefix="onechip-check-") as folder:
        writer = CheckpointWriter(Path(folder) / "checkpoints")
        start = time.perf_counter()
        writer.save(1, pack_state(training.state, {}, {}, training.config))
        pause = time.perf_counter() - start
        writer.wait()
        whole = time.perf_counter() - start
    note = f"{size / 1e9:.3g} GB; on disk after {whole:.3g} s"
    more = {"expected": pause_seconds(size), "by": "what a run expects", "note": note}
    return Row("checkpoint", "training waits", measured=pause, unit="s", **more)


def time_writing(context):
    """Rows of one text: its prompt read at once, then token after token."""
    s, given, (name, rows) = context.sizes, context.given, first_subject(context)
    config, model = with_rows(context, name, rows), given.subjects[name].model
    params = fresh_state(context, name, config)["params"]
    args = params, np.zeros((1, s.prompt), np.int32), s.prompt, jax.random.key(0)
    found, expected = {}, {}
    for count in (1, 1 + s.new_tokens):
        run = given.make_sampler(config, count, model=model).lower(*args).compile()
        found[count], expected[count] = timed(lambda run=run: run(*args), s.runs), program_seconds(run, context.device)
    one, all = found.values()
    yield as_row("writing", f"prompt of {s.prompt}", one, "ms", milliseconds, expected[1], ESTIMATE)
    each = Seconds(*(max(0.0, t - one.median) / s.new_tokens for t in all))
    per_token = (expected[1 + s.new_tokens] - expected[1]) / s.new_tokens if expected[1] else None
    yield as_row("writing", "each token after it", each, "ms", milliseconds, per_token, ESTIMATE)


def training_checks(context):
    """Checks for what happens next to training and after it, by part."""
    return {
        "loader": [Check("a step beside the loader", lambda: time_loader(context))],
        "checkpoint": [Check("training waits", lambda: time_checkpoint(context))],
        "writing": [Check("prompt and tokens", lambda: list(time_writing(context)))],
    }
