"""What is known about a step before it runs: bytes at its fullest moment, and an estimate of its time.

The estimate of time is the TPU compiler's own. It writes `estimated_cycles` on every fusion and product of an optimized
program. This module adds them up, each loop's as often as the loop runs. The compiler reports nothing about Pallas
kernels and lookups. For those, the instruction bundles that it schedules are counted, one bundle a cycle. Against
the v6e timings of this model family in vorushin/tpuchat (https://github.com/vorushin/tpuchat), the sum is 20 % too low
for einsum attention and 20 to 25 % too high for Splash: compare estimates with estimates, and trust ratios more than
milliseconds. It says nothing of sums over devices either: for those, their bytes are divided by the published speed of
a chip's links, and nothing is taken to overlap.
"""

import math
import re

from onechip.chips import CHIPS, GIB

# ----------------------------------------------------------------------------------------------------------------------
# Memory


def peak_bytes(compiled, platform):
    """Bytes in use at the fullest moment of a compiled program on one device."""
    m = compiled.memory_analysis()
    if platform == "tpu":
        return m.peak_memory_in_bytes
    # On other platforms that figure leaves out the temporaries.
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def bytes_needed(error):
    """The largest size in an out-of-memory error of XLA, in bytes, 0 if it states none; None for any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    sizes = [float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)\s*([KMGT])i?B?\b", text)]
    return int(max(sizes, default=0))


def compute_width(config):
    """Bytes of a number in the compute type."""
    return 2 if config.dtype == "bfloat16" else 4


def memory_parts(config, count, peak):
    """{what: bytes} of a training step that needs `peak` bytes; count as Workload.count returns it.

    Gradients are float32. What is left of the peak is activations.
    """
    width, tokens = compute_width(config), config.device_batch_size * config.seq_len
    params = count["params"]
    parts = {"parameters": count["param_bytes"], "optimizer": count["state_bytes"], "gradients": 4 * params}
    if width == 2:
        parts["bfloat16 weights"] = 2 * params
    parts["logits"] = min(config.loss_slice, tokens) * config.vocab_size * width
    return {**parts, "activations": max(0, peak - sum(parts.values()))}


def resident_bytes(count):
    """Bytes that stay on the device from step to step: parameters and the optimizer's state."""
    return count["param_bytes"] + count["state_bytes"]


def layer_inputs(config):
    """Numbers in the inputs of all layers."""
    return config.device_batch_size * config.seq_len * config.n_layer * config.n_embd


KEPT = {"none": 1.0, "dots": 0.25, "all": 0.05}  # share of a layer's activations with each kind of remat, counted low


def kept_activations(config):
    """What activations are taken to be proportional to."""
    return layer_inputs(config) * KEPT[config.remat]


def least_bytes(config, count):
    """Bytes that a step cannot do without, counted low; count as Workload.count returns it.

    Parameters, optimizer, and each layer's input, which even recomputation keeps. With them either the logits of a
    slice, or the scores of an eighth of the queries in the attentions that write scores down.
    """
    tokens = config.device_batch_size * config.seq_len
    logits = min(config.loss_slice, tokens) * config.vocab_size
    scores = config.n_head * tokens * config.seq_len // 8 if config.attn_impl in ("einsum", "jax") else 0
    return resident_bytes(count) + compute_width(config) * (layer_inputs(config) + max(logits, scores))


# ----------------------------------------------------------------------------------------------------------------------
# Time

# Instruction bundles of one head, forward + backward.
# Ours: {head_dim: (per block of 512 tokens, for RoPE and norms; per visited tile)}.
FUSED_BUNDLES = {128: (408 + 725, 535 + 1341), 256: (595 + 1370, 741 + 1342)}
GATED_BUNDLES = {128: 35 + 115, 256: 34 + 238}  # more per block of 512 tokens, where a layer adds to its values
# Splash: {(block, head_dim): per visited block}.
SPLASH_BUNDLES = {
    (256, 128): 993 + 1013 + 658, (512, 128): 1504 + 1722 + 1255, (1024, 128): 4225 + 5126 + 3937,
    (256, 256): 986 + 1155 + 730, (512, 256): 1569 + 1912 + 1391, (1024, 256): 4341 + 5536 + 4277,
}  # fmt: skip


def kernel_cycles(config, sequences):
    """Cycles of all attention kernels for that many sequences; None for a shape that the tables lack."""
    c, total = config, 0
    if c.attn_impl not in ("pallas", "splash"):
        return 0
    from onechip import kernels  # here, because Pallas takes 0.3 s to import
    from onechip.splash import SPLASH_BLOCK

    block = kernels.block_size(c.seq_len) if c.attn_impl == "pallas" else math.gcd(c.seq_len, SPLASH_BLOCK)
    ours, splash = FUSED_BUNDLES.get(c.head_dim), SPLASH_BUNDLES.get((block, c.head_dim))
    for window, gated in zip(c.windows, c.gated_layers, strict=True):
        visited = sum(1 for _ in kernels.tiles(c.seq_len, window, block))
        if c.attn_impl == "splash" and splash:
            total += visited * splash
        elif c.attn_impl == "pallas" and ours and block == 512:
            total += c.seq_len // block * (ours[0] + gated * GATED_BUNDLES[c.head_dim]) + visited * ours[1]
        else:
            return None
    return total * sequences * c.n_head


# Embeddings. Bundles of XLA's lookup of a row, and for each 128 of its channels; bundles of onechip/rows.py for each
# 128 channels of 256 tokens, and for each distinct token among them, whose float32 sums go to the chip and back.
LOOKUP_BUNDLES, ADD_BUNDLES, DISTINCT_BUNDLES = (7.5, 0.72), 218, 39
DISTINCT = 0.6  # of 256 tokens in a row; 0.45 in Python's own sources
HBM_BYTES_A_CYCLE = 937  # v6e: 1.64e12 a second at 1.75 GHz


def row_cycles(line):
    """Cycles of a line of HLO that looks rows of an embedding up, or adds rows to sums; 0 for any other."""
    if found := re.search(r"%gather_fusion\S* = \w+\[(\d+),(\d+)\]", line):
        rows, channels = int(found[1]), int(found[2])
        return round(rows * (LOOKUP_BUNDLES[0] + LOOKUP_BUNDLES[1] * channels / 128))
    # jax 0.7.2 gives no kernel its name: of ours, this one begins with two lists of integers
    kernel = r"= f32\[\d+,(\d+),128\]\S* custom-call\(.*_constraints=\{s32\[(\d+)\]\{0\}, s32\[\d+\]\{0\}, s32\["
    found = re.search(kernel, line)
    if not found:
        return 0
    parts, rows = int(found[1]), int(found[2])
    moved = 2 * parts * 128 * 4 / HBM_BYTES_A_CYCLE
    return round(rows * (ADD_BUNDLES * parts / 256 + DISTINCT * (DISTINCT_BUNDLES + moved)))


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
    """How often a loop that counts from 0 runs: the constant that its condition compares with."""
    return max((int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)), default=1)


def add_up(hlo, count):
    """The sum of count(line) over a program's instructions, a loop's times its number of runs."""
    computations, entry = split_computations(hlo)

    def total_of(name):
        total = 0
        for line in computations.get(name, ()):
            if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                total += total_of(loop[2]) * (int(known[1]) if known else bound_of(computations[loop[1]]))
            elif call := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
                total += total_of(call[1])
            else:
                total += count(line)
        return total

    return total_of(entry)


def xla_cycles(hlo):
    """The sum of a TPU program's estimated cycles; 0 if the program has none."""

    def count(line):
        estimate = re.search(r'"estimated_cycles":"(\d{1,15})"', line)  # 2 ** 63 - 1: none
        return int(estimate[1]) if estimate else row_cycles(line)

    return add_up(hlo, count)


WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}  # bytes of a number


def reduced_bytes(hlo):
    """Bytes of all arrays that a program sums over its devices; the compiler gives no cycles for that."""

    def count(line):
        found = re.search(r" = (.*?) all-reduce(-start)?\(", line)
        if not found:
            return 0
        arrays = re.findall(r"\b(f32|s32|u32|bf16|f16|pred)\[([\d,]*)\]", found[1])
        return sum(WIDTHS[kind] * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in arrays)

    return add_up(hlo, count)


def step_seconds(config, compiled, mesh):
    """Estimated seconds of a compiled step, each device with its share of the batch; None if there is no estimate."""
    device = mesh.devices.flat[0]
    chip = CHIPS.get(device.device_kind)
    if device.platform != "tpu" or not (chip and chip.clock):
        return None
    hlo = compiled.as_text()
    xla, kernel = xla_cycles(hlo), kernel_cycles(config, config.total_batch_size // mesh.size)
    if not xla or kernel is None:
        return None
    # All that a device has is sent once to be summed and once as a sum, but for its own share.
    sent = 2 * reduced_bytes(hlo) * (mesh.size - 1) / mesh.size
    return (xla + kernel) / chip.clock + sent / chip.links
