"""Will a training step fit in memory, and how fast will it be? Compiled, not guessed, before anything is downloaded.

A training step comes as a Workload. `require_fit` refuses one that does not fit and names the nearest config that does;
`explore` compares microbatches and searches for the largest batch. Nothing is run, and a TPU need not be attached.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax

from onechip.chips import CHIPS, GIB, memory_limit, name_of
from onechip.collectives import traffic
from onechip.errors import UserError, say, stop_here
from onechip.estimate import (
    bytes_needed,
    kept_activations,
    least_bytes,
    memory_parts,
    peak_bytes,
    resident_bytes,
    step_seconds,
)
from onechip.fitreport import describe, describe_run, describe_time, describe_with_ratio, gib
from onechip.largest import extrapolate_rows, largest_that_fits
from onechip.measured import ratio_for
from onechip.mesh import describe_mesh
from onechip.stages import stages_of

MOST_MEMORY = 256 * GIB  # taken for a device whose memory is unknown: no TPU has more


class DoesNotFit(UserError):
    """A config whose step needs more memory than its device has."""


class Workload(NamedTuple):
    """The training step of one model with one optimizer, for any config, on the devices of one mesh.

    lower(config): the step as a jax.stages.Lowered for that mesh. count(config): {"params": number of parameters,
    "whole_bytes": theirs and the optimizer's state's, and of one device: "held": those that it computes with,
    "param_bytes": bytes of its share of them, "state_bytes": of its share of the optimizer's state}. flops(config):
    training FLOPs per token.

    A config is a frozen dataclass; config.smaller_models() yields those of a smaller model, nearest first.
    """

    mesh: jax.sharding.Mesh
    lower: Callable
    count: Callable
    flops: Callable


class Fit(NamedTuple):
    """What a compiler reports about a training step. Bytes and times are of one device.

    limit_bytes: what the device has, None if unknown. whole_bytes: of a checkpoint. parts: {what: bytes}, see
    memory_parts. bytes_per_token: moved to and from HBM in one microbatch, the update included. step_seconds: estimate,
    TPUs only. traffic: what one device sends to others in a step, as collectives.py has it. compiled: None for a step
    that was refused; peak_bytes is then what is known to be needed.
    """

    where: str
    peak_bytes: int
    limit_bytes: int | None
    whole_bytes: int
    parts: dict
    flops_per_token: float
    bytes_per_token: float | None
    step_seconds: float | None
    traffic: dict
    compile_seconds: float
    compiled: jax.stages.Compiled | None

    @property
    def fits(self):
        return self.compiled is not None and (self.limit_bytes is None or self.peak_bytes <= self.limit_bytes)


# ----------------------------------------------------------------------------------------------------------------------
# One step


def compile_step(work, config):
    """The step as a jax.stages.Compiled; nothing is run."""
    lowered = work.lower(config)
    with warnings.catch_warnings():  # the cache on disk returns no program for a chip that is not attached
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        return lowered.compile()


def measure(work, config):
    """The Fit of a config, whether it fits or not, by compiling its step."""
    start = time.perf_counter()
    try:
        compiled = compile_step(work, config)
        peak = peak_bytes(compiled, work.mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        compiled, peak = None, bytes_needed(error)
        if peak is None:
            raise
    return make_fit(work, config, peak, compiled, time.perf_counter() - start)


def make_fit(work, config, peak, compiled=None, compile_seconds=0.0):
    """The Fit of a step that needs `peak` bytes; compiled: None if it was refused."""
    moved, seconds, sent, count = None, None, {}, work.count(config)
    if compiled is not None:
        moved = (compiled.cost_analysis() or {}).get("bytes accessed")
        seconds = step_seconds(config, compiled, work.mesh)
        sent = traffic(compiled.as_text(), work.mesh.size) if work.mesh.size > 1 else {}
    return Fit(
        where=name_of(work.mesh),
        peak_bytes=peak,
        limit_bytes=memory_limit(work.mesh.devices.flat[0]),
        whole_bytes=count["whole_bytes"],
        parts=memory_parts(config, count, peak),
        flops_per_token=work.flops(config),
        bytes_per_token=moved / (config.device_batch_size * config.seq_len) if moved else None,
        step_seconds=seconds,
        traffic=sent,
        compile_seconds=compile_seconds,
        compiled=compiled,
    )


def peak_rate(work, config):
    """Tokens per second if every FLOP of the mesh's devices went into the model; None for an unknown device."""
    chip = CHIPS.get(work.mesh.devices.flat[0].device_kind)
    return chip.peak_flops * work.mesh.size / work.flops(config) if chip else None


def show(works, config, further=False, units_per_hour=0.0):
    """Prints what a run's steps need, or refuses them; returns the Workload: the first of several whose step fits.

    works: of meshes that split more and more. further: also looks for other batches, then ends the program.
    """
    configs = [c for _, c in stages_of(config)]
    work, last = first_that_fits(works, configs[-1])
    if work.mesh.size > 1:
        say(f"mesh: {describe_mesh(work.mesh)}" + (", the least split that fits" if len(works) > 1 else ""))
    found = {configs[-1]: last} | {c: require_fit(work, c) for c in configs[:-1]}
    fits, peaks = [found[c] for c in configs], [peak_rate(work, c) for c in configs]
    say(describe(configs[-1], fits[-1], peaks[-1]))
    kind = work.mesh.devices.flat[0].device_kind
    if fits[-1].step_seconds and (measured := ratio_for(kind, config.attn_impl)):
        say(describe_with_ratio(kind, fits[-1], *measured))
    for line in describe_run(config, fits, peaks, units_per_hour):
        say(line)
    if further:
        for line in explore(work, configs[-1], fits[-1]):
            say(line)
        stop_here()
    return work


def first_that_fits(works, config):
    """(Workload, its Fit) of the first whose step fits; DoesNotFit, from the last, if none does."""
    for work in works[:-1]:
        if not refuse_unseen(work, config) and (found := measure(work, config)).fits:
            return work, found
    return works[-1], require_fit(works[-1], config)


# ----------------------------------------------------------------------------------------------------------------------
# A step that does not fit


def require_fit(work, config):
    """The Fit of a config that fits. Else DoesNotFit, with the nearest config that does."""
    fit = refuse_unseen(work, config) or measure(work, config)
    if not fit.fits:
        raise DoesNotFit(explain_refusal(work, config, fit))
    return fit


def refuse_unseen(work, config):
    """The Fit of a step that by arithmetic alone needs more than twice what its device has; None for any other step.

    Tracing such a step can take minutes (--seq_len 1000000000), or fail.
    """
    least = least_bytes(config, work.count(config))
    limit = memory_limit(work.mesh.devices.flat[0]) or MOST_MEMORY
    return make_fit(work, config, least) if least > 2 * limit else None


def explain_refusal(work, config, fit):
    """One line: what a config that does not fit needs, what there is, and the nearest config that fits, compiled."""
    needs = f"{'at least ' if fit.compiled is None else ''}{gib(fit.peak_bytes)}"
    limit = f"the {fit.limit_bytes / GIB:.4g} GiB of " if fit.limit_bytes else "what there is on "
    nearest = "no smaller batch or model of this shape fits"
    if found := nearest_that_fits(work, config, fit):
        smaller, size = found
        names = [field.name for field in dataclasses.fields(config)]
        changed = [name for name in names if getattr(smaller, name) != getattr(config, name)]
        changes = ", ".join(f"{name}={getattr(smaller, name)}" for name in changed)
        nearest = f"{changes} fits, with {gib(size.peak_bytes)} GiB"
    return f"device_batch_size={config.device_batch_size}: a step needs {needs} GiB of {limit}{fit.where}; {nearest}"


def nearest_that_fits(work, config, fit):
    """(config, its Fit) of the nearest smaller config that fits, None if there is none; fit: of the refused config.

    Candidates whose activations, scaled from the last config that was refused, cannot fit are skipped without
    compiling.
    """
    for smaller in smaller_configs(config, work.mesh.size):
        count = work.count(smaller)
        scaled = fit.parts["activations"] * kept_activations(smaller) / kept_activations(config)
        expected = max(resident_bytes(count) + scaled, least_bytes(smaller, count))
        if expected < (fit.limit_bytes or MOST_MEMORY):
            found = measure(work, smaller)
            if found.fits:
                return smaller, found
            config, fit = smaller, found
    return None


def divisors(number):
    """The divisors of a positive integer, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def smaller_configs(config, devices):
    """Configs that need less memory, nearest first: divisors of the batch per device, remat, then smaller models."""
    per_device = config.total_batch_size // devices
    rows = [r for r in reversed(divisors(per_device)) if r < config.device_batch_size]
    yield from (dataclasses.replace(config, device_batch_size=r) for r in rows)
    yield from dataclasses.replace(config, device_batch_size=1).recomputing()
    yield from (dataclasses.replace(smaller, device_batch_size=1) for smaller in config.smaller_models())


# ----------------------------------------------------------------------------------------------------------------------
# Other batches


def explore(work, config, fit):
    """Yields lines: other microbatches, if there is an estimate of time; the largest batch, if there is a limit."""
    seconds, peaks = {}, {}
    if fit.step_seconds:
        peak = peak_rate(work, config)
        for rows, other in compare_microbatches(work, config, fit):
            seconds[rows], peaks[rows] = other.step_seconds, other.peak_bytes
            yield f"  device_batch_size {rows:2}: {describe_time(config, other, peak)}"
        yield f"  fastest by estimate: --device_batch_size {min(seconds, key=seconds.get)}"
    if fit.limit_bytes:
        yield "  searching for the largest device_batch_size: about ten programs, each as slow as the first if it fits"
        start = extrapolate_rows(peaks, fit.limit_bytes) or config.device_batch_size
        largest = find_largest_batch(work, config, fit.limit_bytes, start)
        yield f"  largest device_batch_size: {largest}, without accumulation"
    else:
        yield f"  largest device_batch_size: unknown, as the memory of {fit.where} is"


def compare_microbatches(work, config, fit):
    """Yields (rows, Fit) for microbatches of 1, 2, 4, 8 and 16 sequences that divide the batch per device and fit.

    fit: that of config itself, which is not compiled again.
    """
    for rows in (1, 2, 4, 8, 16):
        if config.total_batch_size // work.mesh.size % rows == 0:
            known = rows == config.device_batch_size
            other = fit if known else measure(work, dataclasses.replace(config, device_batch_size=rows))
            if other.fits:
                yield rows, other


def find_largest_batch(work, config, limit, start):
    """The most sequences a device with `limit` bytes can take at a time, without accumulation; start: first guess."""

    def peak_of(rows):
        whole = dataclasses.replace(config, device_batch_size=rows, total_batch_size=rows * work.mesh.size)
        fit = measure(work, whole)
        return None if fit.compiled is None else fit.peak_bytes

    return largest_that_fits(peak_of, limit, start)
