"""What a chip can do, and what its compiler says of a program before it runs: bytes by kind, and time by estimate.

The estimate is the TPU compiler's own. It writes `estimated_cycles` on every fusion and product of an optimized
program; this adds them up, loops times their trip counts. Of a Pallas kernel it says nothing, so kernels are counted in
instruction bundles, one a cycle, as Mosaic schedules them for a tile. Against published v6e timings of this model
family the sum is 20 % too low for einsum attention and 20 to 25 % too high for Splash: compare estimates with
estimates, and trust ratios more than milliseconds.
"""

import math
import re

from onechip.chips import CHIPS, GIB


def peak_bytes(compiled, platform):
    """Bytes in use at the fullest moment of a compiled program on one device."""
    m = compiled.memory_analysis()
    if platform == "tpu":
        return m.peak_memory_in_bytes
    # elsewhere that figure leaves the temporaries out
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def bytes_needed(error):
    """The bytes that an out-of-memory error of XLA names, or None if it is another error or names none."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    sizes = [float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)\s*([KMGT])i?B?\b", text)]
    return int(max(sizes, default=0))


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
