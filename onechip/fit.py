"""Will a training step fit, and how fast will it be? Compiled, not guessed, before anything is downloaded."""

import contextlib
import dataclasses
import math
from typing import NamedTuple

import jax

from onechip.chips import GIB
from onechip.errors import UserError


def memory_parts(config, params, peak):
    """{what: bytes} of a training step with `params` parameters; what is left of the peak is activations."""
    width, tokens = (2 if config.dtype == "bfloat16" else 4), config.device_batch_size * config.seq_len
    parts = {"parameters": 4 * params, "moments": 8 * params, "gradients": 4 * params}
    if width == 2:
        parts["bfloat16 weights"] = 2 * params
    parts["logits"] = min(config.loss_slice, tokens) * config.vocab_size * width
    return {**parts, "activations": max(0, peak - sum(parts.values()))}


class Fit(NamedTuple):
    """What a compiler says of a training step. Bytes and times are of one device.

    limit_bytes: what the device has, None if unknown. bytes_per_token: moved to and from HBM in one microbatch, the
    update included. step_seconds: estimate, TPUs only. compiled is None for a step that was refused by the compiler.
    """

    where: str
    peak_bytes: int
    limit_bytes: int | None
    parts: dict
    flops_per_token: float
    bytes_per_token: float | None
    step_seconds: float | None
    compile_seconds: float
    compiled: jax.stages.Compiled | None

    @property
    def fits(self):
        return self.compiled is not None and (self.limit_bytes is None or self.peak_bytes <= self.limit_bytes)


def describe_fit(config, fit, peak_rate):
    """A Fit in four lines; peak_rate: tokens/s at the devices' peak FLOPS, for MFU, or None."""
    gib = lambda n: f"{n / GIB:.3g}"
    of = f" of {fit.limit_bytes / GIB:.4g}" if fit.limit_bytes else ""
    parts = ", ".join(f"{what} {gib(n)}" for what, n in fit.parts.items())
    lines = [
        f"step compiled for {fit.where} in {fit.compile_seconds:.0f} s",
        f"  memory {gib(fit.peak_bytes)}{of} GiB: {parts}",
    ]
    moved = f", {fit.bytes_per_token / 1e6:.1f} MB moved" if fit.bytes_per_token else ""
    lines.append(f"  work a token: {fit.flops_per_token / 1e9:.3g} GFLOP{moved}")
    if fit.step_seconds:
        hours = fit.step_seconds * config.num_iterations / 3600
        estimate = describe_time(config, fit, peak_rate)
        lines.append(f"  compiler's estimate: {estimate}; {config.num_iterations:,} steps in {hours:.1f} h")
    return "\n".join(lines)


def describe_time(config, fit, peak_rate):
    """A Fit's estimated time and rate, with MFU where the device's peak is known, and its bytes."""
    rate = config.total_batch_size * config.seq_len / fit.step_seconds
    mfu = f", MFU {rate / peak_rate:.1%}" if peak_rate else ""
    return (
        f"{1e3 * fit.step_seconds:.1f} ms a step, {rate / 1e3:,.0f} thousand tok/s{mfu}, {fit.peak_bytes / GIB:.3g} GiB"
    )


def smaller_configs(config, devices):
    """Configs that need less memory, nearest first: divisors of the batch per device, then fewer layers or heads."""
    per_device = config.total_batch_size // devices
    rows = [r for r in range(config.device_batch_size - 1, 0, -1) if per_device % r == 0]
    yield from (dataclasses.replace(config, device_batch_size=r) for r in rows)
    explicit = "n_layer" in (f.name for f in dataclasses.fields(config))
    for n in range((config.n_layer if explicit else config.n_head) - 1, 0, -1):
        heads = {"n_head": n, "n_kv_head": n if config.n_kv_head == config.n_head else math.gcd(n, config.n_kv_head)}
        with contextlib.suppress(UserError):  # a width that makes no whole number of layers
            yield dataclasses.replace(config, device_batch_size=1, **({"n_layer": n} if explicit else heads))


def explain_refusal(config, fit, count_params, measure, devices):
    """One line: what a config that does not fit needs, what there is, and the nearest config that fits, measured.

    count_params(config) and measure(config) -> Fit are those of its model. What is hopeless by the refused config's
    activations, scaled, is not compiled.
    """
    bulk = lambda c: c.device_batch_size * c.seq_len * c.n_layer * c.n_embd
    needs = f"{'at least ' if fit.compiled is None else ''}{fit.peak_bytes / GIB:.3g}"
    there = f"the {fit.limit_bytes / GIB:.4g} GiB of " if fit.limit_bytes else "what there is on "
    told = f"a step needs {needs} GiB of {there}{fit.where}"
    nearest = "no smaller batch or model of this shape fits"
    for smaller in smaller_configs(config, devices):
        resident = 12 * count_params(smaller)
        scaled = fit.parts["activations"] * bulk(smaller) / bulk(config)
        if fit.limit_bytes is None or resident + scaled < fit.limit_bytes:
            if (found := measure(smaller)).fits:
                names = [f.name for f in dataclasses.fields(config)]
                new = {n: getattr(smaller, n) for n in names if getattr(smaller, n) != getattr(config, n)}
                changes = ", ".join(f"{name}={value}" for name, value in new.items())
                nearest = f"{changes} fits, with {found.peak_bytes / GIB:.3g} GiB"
                break
    return f"device_batch_size={config.device_batch_size}: {told}; {nearest}"


def aim(known, limit):
    """Rows at which the line through the two largest of known {rows: bytes} meets the limit; None if it does not."""
    if len(known) < 2:
        return None
    (r1, p1), (r2, p2) = sorted(known.items())[-2:]
    return r2 + int((limit - p2) * (r2 - r1) / (p2 - p1)) if p2 > p1 else None


def largest_that_fits(peak_of, limit, start):
    """The most rows whose program fits, 0 if not even one row does. peak_of(rows): its bytes, or None if refused.

    Bisection, aimed: memory grows by nearly the same for each row, so the line through the last two programs that fit
    names the next guess. Near the limit the compiler trades memory for time and the line is flat, or falls: a guess
    is at most 64 or twice what fits, and one that was refused is followed by two thirds of the way, not by half, as
    refusing takes the compiler a sixth of the time of finishing.
    """
    known, low, high, rows = {}, 0, None, start
    while high is None or high - low > 1:
        peak = peak_of(rows)
        if fits := peak is not None and peak <= limit:
            known[rows], low = peak, rows
        else:
            high = rows
        between = low + 2 * (high - low) // 3 if high else 2 * low
        rows = (fits and aim(known, limit)) or between
        most = high - 1 if high else max(64, 2 * low)
        rows = min(max(rows, low + 1), most)
    return low


def compare_microbatches(config, fit, devices, measure):
    """Yields (rows, Fit) for microbatches of 1, 2, 4, 8 and 16 sequences that divide the batch per device and fit.

    fit: that of config itself; measure(config) -> Fit of another.
    """
    for rows in (1, 2, 4, 8, 16):
        if config.total_batch_size // devices % rows == 0:
            known = rows == config.device_batch_size
            found = fit if known else measure(dataclasses.replace(config, device_batch_size=rows))
            if found.fits:
                yield rows, found


def find_largest_batch(config, fit, devices, measure, start):
    """The most sequences a device can take at a time, without accumulation, by bisection over real programs.

    fit: that of config, with a limit_bytes; measure(config) -> Fit of another; start: the first guess.
    """

    def peak_of(rows):
        found = measure(dataclasses.replace(config, device_batch_size=rows, total_batch_size=rows * devices))
        return found.peak_bytes if found.fits else None

    return largest_that_fits(peak_of, fit.limit_bytes, start)


def look_further(config, fit, devices, measure, peak_rate):
    """Yields lines: other microbatches, if there is an estimate of time; the largest batch, if there is a limit.

    fit, measure: as in compare_microbatches; peak_rate: tokens/s at the devices' peak FLOPS, for MFU, or None.
    """
    seconds, peaks = {}, {}
    if fit.step_seconds:
        for rows, other in compare_microbatches(config, fit, devices, measure):
            seconds[rows], peaks[rows] = other.step_seconds, other.peak_bytes
            yield f"  device_batch_size {rows:2}: {describe_time(config, other, peak_rate)}"
        yield f"  fastest by estimate: --device_batch_size {min(seconds, key=seconds.get)}"
    if fit.limit_bytes:
        yield "  looking for the largest device_batch_size: some ten programs, those that fit take as long as the first"
        start = aim(peaks, fit.limit_bytes) or config.device_batch_size
        largest = find_largest_batch(config, fit, devices, measure, start)
        yield f"  largest device_batch_size: {largest}, without accumulation"
    else:
        yield f"  largest device_batch_size: unknown, as the memory of {fit.where} is"
