"""What a chip can do: peak FLOP/s, memory and clock by device kind."""

import os
from typing import NamedTuple

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


def name_of(mesh):
    """The devices of a mesh in words."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
