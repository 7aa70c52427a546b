"""What is known about a step before it runs: bytes at its fullest moment, and an estimate of its time.

The estimate of time is the TPU compiler's own. It writes `estimated_cycles` on every fusion and product of an optimized
program. This module adds them up, each loop's as often as the loop runs. The compiler reports nothing about Pallas
kernels and lookups. For those, the instruction bundles that it schedules are counted, one bundle a cycle. Against
the v6e timings of this model family in vorushin/tpuchat (https://github.com/vorushin/tpuchat), the sum is 20 % too low
for einsum attention and 20 to 25 % too high for Splash: compare estimates with estimates, and trust ratios more than
milliseconds. It says nothing of what goes between devices either: collectives.py counts that.
"""

import math
import re

from onechip.chips import CHIPS, GIB
from onechip.collectives import seconds_of, traffic
from onechip.hlo import add_up

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
    parts = {"parameters": count["param_bytes"], "optimizer": count["state_bytes"], "gradients": 4 * count["held"]}
    if width == 2:
        parts["bfloat16 weights"] = 2 * count["held"]
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


def xla_cycles(hlo):
    """The sum of a TPU program's estimated cycles; 0 if the program has none."""

    def count(line):
        estimate = re.search(r'"estimated_cycles":"(\d{1,15})"', line)  # 2 ** 63 - 1: none
        return int(estimate[1]) if estimate else row_cycles(line)

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
    hidden, waited = seconds_of(traffic(hlo, mesh.size), chip.links) if mesh.size > 1 else (0, 0)
    return max((xla + kernel) / chip.clock, hidden) + waited
