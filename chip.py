"""What a chip can do, and what its compiler says of a program before it runs: bytes by kind, and time by estimate.

The estimate is the TPU compiler's own. It writes `estimated_cycles` on every fusion and product of an optimized
program; this adds them up, loops times their trip counts. Of a Pallas kernel it says nothing, so kernels are counted in
instruction bundles, one a cycle, as Mosaic schedules them for a tile. Against published v6e timings of this model
family the sum is 20 % too low for einsum attention and 20 to 25 % too high for Splash: compare estimates with
estimates, and trust ratios more than milliseconds.
"""

import contextlib
import dataclasses
import math
import os
import re
from typing import NamedTuple

import jax

import common

GIB = 2**30


class Chip(NamedTuple):
    """peak_flops: dense bfloat16 FLOP/s; memory: bytes that a program may use; clock: Hz, where an estimate exists."""

    peak_flops: float
    memory: int | None = None
    clock: float | None = None


CHIPS = {  # by jax's device_kind: cloud.google.com/tpu/docs and NVIDIA's data sheets; memory as XLA states it
    "TPU v6 lite": Chip(918e12, int(31.25 * GIB), 1.75e9),
    "TPU v5 lite": Chip(197e12, int(15.75 * GIB), 1.5e9),
    "TPU v4": Chip(275e12),
    "NVIDIA A100-SXM4-40GB": Chip(312e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
}


def memory_limit(device):
    """Bytes that one program may use on a device, attached or not: for a CPU the machine's memory; None if unknown."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = CHIPS.get(device.device_kind)
    try:
        return (device.memory_stats() or {}).get("bytes_limit") or (chip and chip.memory)
    except Exception:  # a device that is only described, not attached, has none to ask
        return chip and chip.memory


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def peak_bytes(compiled, platform):
    """Bytes in use at the fullest moment of a compiled program on one device."""
    m = compiled.memory_analysis()
    if platform == "tpu":
        return m.peak_memory_in_bytes
    # elsewhere that figure leaves the temporaries out
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def memory_parts(config, params, peak):
    """{what: bytes} of a training step with `params` parameters; what is left of the peak is activations."""
    width, tokens = (2 if config.dtype == "bfloat16" else 4), config.device_batch_size * config.seq_len
    parts = {"parameters": 4 * params, "moments": 8 * params, "gradients": 4 * params}
    if width == 2:
        parts["bfloat16 weights"] = 2 * params
    parts["logits"] = min(config.loss_slice, tokens) * config.vocab_size * width
    return {**parts, "activations": max(0, peak - sum(parts.values()))}


def bytes_needed(error):
    """The bytes that an out-of-memory error of XLA names, or None if it is another error or names none."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    sizes = [float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)\s*([KMGT])i?B?\b", text)]
    return int(max(sizes, default=0))


# ----------------------------------------------------------------------------------------------------------------------
# Time

# Bundles of one head, forward and backward together. Ours: per block of 512 tokens (RoPE, norms) and per visited tile.
FUSED_BUNDLES = {128: (408 + 725, 535 + 1341), 256: (595 + 1370, 741 + 1342)}
# Splash: per visited block, {(block, head_dim): bundles}.
SPLASH_BUNDLES = {
    (256, 128): 993 + 1013 + 658, (512, 128): 1504 + 1722 + 1255, (1024, 128): 4225 + 5126 + 3937,
    (256, 256): 986 + 1155 + 730, (512, 256): 1569 + 1912 + 1391, (1024, 256): 4341 + 5536 + 4277,
}  # fmt: skip


def kernel_cycles(config, sequences):
    """Cycles of all attention kernels over so many sequences: 0 without kernels, None for a shape never looked at."""
    c, total = config, 0
    if c.attn_impl not in ("pallas", "splash"):
        return 0
    import kernels

    block = kernels.block_size(c.seq_len) if c.attn_impl == "pallas" else math.gcd(c.seq_len, kernels.SPLASH_BLOCK)
    ours, splash = FUSED_BUNDLES.get(c.head_dim), SPLASH_BUNDLES.get((block, c.head_dim))
    for window in c.windows:
        visited = sum(1 for _ in kernels.tiles(c.seq_len, window, block))
        if c.attn_impl == "splash" and splash:
            total += visited * splash
        elif c.attn_impl == "pallas" and ours and block == 512:
            total += c.seq_len // block * ours[0] + visited * ours[1]
        else:
            return None
    return total * sequences * c.n_head


def split_computations(hlo):
    """({name: its lines}, the entry's name) of an HLO module's text."""
    computations, entry, lines = {}, None, None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*->.*\{$", line)
        if header:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def bound_of(condition):
    """What a loop that counts from 0 counts up to: the one constant that its condition compares with."""
    return max((int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)), default=1)


def xla_cycles(hlo):
    """The sum of a TPU program's estimated cycles, what a loop does times the times it does it; 0 if it has none."""
    computations, entry = split_computations(hlo)

    def cycles(name):
        total = 0
        for line in computations.get(name, ()):
            if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                total += cycles(loop[2]) * (int(known[1]) if known else bound_of(computations[loop[1]]))
            elif call := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
                total += cycles(call[1])
            elif estimate := re.search(r'"estimated_cycles":"(\d{1,15})"', line):  # 2 ** 63 - 1 says that there is none
                total += int(estimate[1])
        return total

    return cycles(entry)


def step_seconds(config, compiled, device):
    """Estimated seconds of a compiled step on one TPU chip; None where there is no estimate."""
    chip, sequences = CHIPS.get(device.device_kind), config.total_batch_size
    if device.platform != "tpu" or not (chip and chip.clock):
        return None
    xla, kernel = xla_cycles(compiled.as_text()), kernel_cycles(config, sequences)
    return (xla + kernel) / chip.clock if xla and kernel is not None else None


# ----------------------------------------------------------------------------------------------------------------------
# Will it fit, and how fast?


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


def name_of(mesh):
    """The devices of a mesh in words."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


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
        with contextlib.suppress(common.UserError):  # a width that makes no whole number of layers
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
