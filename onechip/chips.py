"""What a chip can do: peak FLOP/s, memory and clock by device kind; the devices of a TPU that is not attached."""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from onechip.errors import UserError, first_line

GIB = 2**30


class Chip(NamedTuple):
    """peak_flops: dense bfloat16 FLOP/s; memory: bytes that a program may use; clock: Hz, where times are estimated.

    links: bytes/s that it sends to its neighbours, along both axes of a slice that has no wrap-around, which halves
    what is published (scaling book: 180e9 an axis of a v6e, 90e9 of a v5e, both ways, with it).
    """

    peak_flops: float
    memory: int | None = None
    clock: float | None = None
    links: float | None = None


CHIPS = {  # by jax's device_kind; sources: cloud.google.com/tpu/docs and NVIDIA's data sheets, memory as XLA reports it
    "TPU v6 lite": Chip(918e12, int(31.25 * GIB), 1.75e9, 180e9),
    "TPU v5 lite": Chip(197e12, int(15.75 * GIB), 1.5e9, 90e9),
    "TPU v4": Chip(275e12),
    "NVIDIA A100-SXM4-40GB": Chip(312e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
}


def memory_limit(device):
    """Bytes that one program may use on a device, attached or not. For a CPU the machine's memory. None if unknown."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = CHIPS.get(device.device_kind)
    try:
        stats = device.memory_stats() or {}
    except Exception:  # only described, not attached: there is no device to ask
        stats = {}
    return stats.get("bytes_limit") or (chip and chip.memory)


def topology_devices(topology):
    """The devices of a TPU topology such as "v6e:1x1" or "v5e:2x4", attached or not; the attached ones if it is empty.

    UserError names a topology that libtpu does not know, and what to install where there is no libtpu.
    """
    if not topology:
        return jax.devices()  # of all hosts
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **bounds).devices
    except Exception as error:
        remedy = "(libtpu, the compiler: pip install 'jax[tpu]')"
        raise UserError(f"topology={topology!r}: {first_line(error)} {remedy}") from None


def name_of(mesh):
    """The devices of a mesh in words: "1 x TPU v6 lite"."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
