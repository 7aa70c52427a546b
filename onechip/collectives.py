"""What a compiled program sends between devices: bytes by kind of collective, and the time of that by the links' speed.

The TPU's compiler gives no cycles for it. A ring sends (n - 1) / n of what is gathered, scattered or exchanged among n
devices, and twice that of what is summed for all (https://jax-ml.github.io/scaling-book/sharding). A collective that
the compiler has taken apart and put between other work counts as hidden; the others make the chip wait.
"""

import math
import re

import numpy as np

from onechip.hlo import add_up, split_computations

WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}  # bytes of a number
# {kind: bytes that a device sends of each that comes out, by the devices n that take part}
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(SENT)})(-start)?\(")


def bytes_in(shapes):
    """The bytes of each array in a piece of HLO: "(f32[2,3]{{1,0}}, bf16[8])" -> [24, 16]."""
    found = re.findall(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]", shapes)
    return [WIDTHS[kind] * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in found]


def devices_in(line, devices):
    """How many devices take part in a collective: the size of its groups, or all of them."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return groups[1].count(",") + 1
    groups = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(groups[1]) if groups else devices


def sent_by(line, devices):
    """(kind, bytes that a device sends, whether it is started only) of a line of HLO; None for any other line."""
    found = COLLECTIVE.search(line)
    if not found:
        return None
    shapes, kind, started = found.groups()
    sizes = bytes_in(shapes)
    if started and kind != "all-reduce":  # its operands, then its results
        sizes = sizes[len(sizes) // 2 :]
    return kind, sum(sizes) * SENT[kind](devices_in(line, devices)), bool(started)


def collectives_in(lines, devices):
    """[(kind, bytes sent)] of the collectives among the lines of a fused computation."""
    found = [sent for line in lines if (sent := sent_by(line, devices))]
    if any(" dynamic-slice(" in line for line in lines):  # of a sum, each device takes its share
        return [("reduce-scatter", size / 2) if kind == "all-reduce" else (kind, size) for kind, size, _ in found]
    return [(kind, size) for kind, size, _ in found]


def traffic(hlo, devices):
    """{kind: (bytes that a device sends hidden, bytes for which it waits)} of a program, loops as often as they run."""
    inside = {name: collectives_in(lines, devices) for name, lines in split_computations(hlo)[0].items()}

    def count(line):
        total = np.zeros((len(SENT), 2))
        if fusion := re.search(r"%(\S+) = .* fusion\(.*calls=%?([\w.-]+)", line):
            starts = fusion[1].startswith("async-collective-start")
            # A collective taken apart is in all of its pieces, and counts where it starts.
            piece = not starts and ("async_collective" in fusion[2] or fusion[1].startswith("async-collective"))
            found = [] if piece else [(kind, size, starts) for kind, size in inside.get(fusion[2], ())]
        else:
            found = [sent] if (sent := sent_by(line, devices)) else []
        for kind, size, hidden in found:
            total[list(SENT).index(kind), 0 if hidden else 1] += size
        return total

    total = np.zeros((len(SENT), 2)) + add_up(hlo, count)
    return {kind: tuple(map(float, pair)) for kind, pair in zip(SENT, total, strict=True) if any(pair)}


def seconds_of(sent, links):
    """(hidden, waited for): seconds of `traffic` by links, bytes/s that a chip sends."""
    return tuple(sum(pair[i] for pair in sent.values()) / links for i in (0, 1))
