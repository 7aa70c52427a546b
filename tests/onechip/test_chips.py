"""onechip/chips.py: what a device has, and the devices of a TPU that is not attached."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from onechip.chips import GIB, memory_limit, name_of, topology_devices
from onechip.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def device(kind, stats=None, platform="tpu"):
    """A device that reports `stats`, or only a description of one."""

    def memory_stats():
        if stats is None:
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not attached")
        return stats

    return SimpleNamespace(platform=platform, device_kind=kind, memory_stats=memory_stats)


def test_memory_is_what_the_device_reports_or_else_what_is_known_of_its_kind():
    """A CPU has the machine's memory; a chip that is neither attached nor in the table has none that is known."""
    assert memory_limit(jax.devices("cpu")[0]) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limit(device("TPU v6 lite", {"bytes_limit": 7 * GIB})) == 7 * GIB
    assert memory_limit(device("TPU v6 lite", {})) == memory_limit(device("TPU v6 lite")) == int(31.25 * GIB)
    assert memory_limit(device("TPU v4")) is None
    assert memory_limit(device("a new one", platform="gpu")) is None


def test_no_topology_means_the_attached_devices():
    """So that one call serves --preflight here and --preflight v6e:1x1."""
    assert topology_devices("") == jax.local_devices()
    assert name_of(jax.sharding.Mesh(topology_devices("")[:1], ("data",))) == "1 x cpu"


def test_an_unknown_topology_is_refused_in_one_line():
    """A misspelt topology, or a machine without libtpu: the name and the remedy, not XLA's page."""
    with pytest.raises(UserError, match="topology='v6e-1'") as caught:
        topology_devices("v6e-1")
    assert "\n" not in str(caught.value) and "jax[tpu]" in str(caught.value)


def test_a_compiler_without_a_chip_is_quiet():
    """libtpu asks for the type of the TPU and its hosts, and complains at length where it gets no answer."""
    pytest.importorskip("libtpu", reason="compiling for v6e needs libtpu: jax[tpu]")
    code = 'import onechip; from onechip.chips import topology_devices; print(len(topology_devices("v5e:2x4")))'
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")
