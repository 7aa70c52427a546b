"""What preflight prints: a step's bytes and estimated time, and what a whole run is of Colab's days."""

import math

from onechip.chips import GIB
from onechip.stages import count_tokens, stages_of
from onechip.writer import DISK_SPEED, pause_seconds

COLAB_HOURS = 23.0  # of a session, which ends after 24 at the latest


def gib(size):
    """Bytes as GiB with three digits."""
    return f"{size / GIB:.3g}"


def describe(config, fit, peak):
    """A Fit in four or five lines; peak: tokens/s as peak_rate returns it, for MFU."""
    limit = f" of {fit.limit_bytes / GIB:.4g}" if fit.limit_bytes else ""
    parts = ", ".join(f"{what} {gib(size)}" for what, size in fit.parts.items())
    moved = f", {fit.bytes_per_token / 1e6:.1f} MB moved" if fit.bytes_per_token else ""
    state = fit.whole_bytes
    pause = f"training pauses {pause_seconds(state):.0f} s for it on a disk of {DISK_SPEED / 1e6:.0f} MB/s"
    lines = [
        f"step compiled for {fit.where} in {fit.compile_seconds:.0f} s",
        f"  memory {gib(fit.peak_bytes)}{limit} GiB: {parts}",
        f"  a checkpoint has {state / 1e9:.3g} GB; {pause}",
        f"  work a token: {fit.flops_per_token / 1e9:.3g} GFLOP{moved}",
    ]
    if fit.traffic:
        lines.append(describe_traffic(fit.traffic))
    if fit.step_seconds:
        lines.append(f"  compiler's estimate: {describe_time(config, fit, peak)}")
    return "\n".join(lines)


def describe_traffic(traffic):
    """What a device sends to others in a step, on one line."""
    kinds = ", ".join(f"{kind} {(a + b) / 1e9:.2f} GB" for kind, (a, b) in traffic.items())
    hidden, total = (sum(map(part, traffic.values())) for part in (lambda pair: pair[0], sum))
    return f"  sent to other devices a step: {kinds}; {hidden / total:.0%} of it next to other work"


def describe_time(config, fit, peak):
    """A Fit's estimated time, rate and bytes on one line, with MFU where the device's peak is known."""
    rate = config.total_batch_size * config.seq_len / fit.step_seconds
    mfu = f", MFU {rate / peak:.1%}" if peak else ""
    return f"{1e3 * fit.step_seconds:.1f} ms a step, {rate / 1e3:,.0f} thousand tok/s{mfu}, {gib(fit.peak_bytes)} GiB"


def describe_with_ratio(kind, fit, ratio, count):
    """An estimated step's time with the ratio of measured to estimated that `count` steps had, on one line."""
    steps = f"{count} steps" if count > 1 else "a step"
    return (
        f"  measured on {kind} by chip_check, {steps}: x {ratio:.2f} -> {1e3 * ratio * fit.step_seconds:.0f} ms a step"
    )


def describe_run(config, fits, peaks, units_per_hour=0.0):
    """Lines on a whole run, one for each stage but the last if there are several; [] without estimates of time.

    fits, peaks: the Fit of each stage's step, and tokens/s as peak_rate returns it; units_per_hour: describe_day's.
    """
    if not all(fit.step_seconds for fit in fits):
        return []
    lines, start, seconds = [], 0, 0.0
    for (end, c), fit, peak in zip(stages_of(config), fits, peaks, strict=True):
        seconds, start = seconds + fit.step_seconds * (end - start), end
        if end < config.num_iterations:
            batch = f"{c.total_batch_size} x {c.seq_len}"
            lines.append(f"  stage to step {end:,}, {batch} tokens: {describe_time(c, fit, peak)}")
    day = describe_day(config, seconds / 3600, units_per_hour)
    return [*lines, f"  the day: {config.num_iterations:,} steps, {day}"]


def describe_day(config, hours, units_per_hour=0.0):
    """What a run of so many hours is of Colab's days, in words; units_per_hour: compute units, 0 if not known."""
    count = math.ceil(hours / COLAB_HOURS)
    days = f"{hours / COLAB_HOURS:.0%} of a Colab session" if count == 1 else f"{count} Colab sessions"
    units = f", {hours * units_per_hour:,.0f} compute units at {units_per_hour:g} an hour" if units_per_hour else ""
    return f"{count_tokens(config) / 1e9:.3g} billion tokens in {hours:.1f} h: {days} of {COLAB_HOURS:g} h{units}"
