"""onechip/perchip.py: a process for each chip, which sees no other; real processes with JAX's virtual CPU devices."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from onechip import machine, perchip
from onechip.perchip import chips_here, environment_of, run_on_each_chip

LOOK = """
import sys, time, os, onechip, jax
print("open", flush=True)
print("sees", len(jax.devices()), "of", jax.devices()[0].platform, "at", int(time.time() * 1000), "pid", os.getpid())
print("draws no bar", os.environ["TQDM_DISABLE"], file=sys.stderr)
"""


def python(text):
    return [sys.executable, "-c", text]


@pytest.fixture
def three_chips(monkeypatch):
    """This machine as one with three virtual devices, for the processes that are started."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]))
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)


# ----------------------------------------------------------------------------------------------------------------------
# Which chips there are, and what a process is told


def test_the_chips_of_a_tpu_host_are_counted_without_opening_them(tmp_path, monkeypatch):
    """By its PCI bus: as many as are on it, or those that the environment lets a process see."""
    for i, (vendor, device) in enumerate([("0x1ae0", "0x006f")] * 5 + [("0x1ae0", "0xffff"), ("0x8086", "0x006f")]):
        (folder := tmp_path / str(i)).mkdir()
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    real = machine.glob.glob
    monkeypatch.setattr(machine.glob, "glob", lambda form: real(form.replace("/sys/bus/pci/devices", str(tmp_path))))
    for name in ("JAX_PLATFORMS", "TPU_VISIBLE_CHIPS"):
        monkeypatch.delenv(name, raising=False)
    assert chips_here() == ("tpu", ["0", "1", "2", "3", "4"]) and machine.has_tpu()
    monkeypatch.setenv("TPU_VISIBLE_CHIPS", "2, 4")
    assert chips_here() == ("tpu", ["2", "4"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert chips_here()[0] == "cpu", "as set"


def test_the_chips_of_a_gpu_host_are_its_device_files(monkeypatch):
    """As many as there are files, or those that CUDA is told of; none of them if that is none."""
    monkeypatch.setattr(perchip, "count_tpus", lambda: 0)
    monkeypatch.setattr(perchip.glob, "glob", lambda form: [f"/dev/nvidia{i}" for i in (0, 3)])
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert chips_here() == ("gpu", ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f2a")
    assert chips_here() == ("gpu", ["3", "GPU-8f2a"])
    assert environment_of("gpu", "GPU-8f2a", 1) == {"CUDA_VISIBLE_DEVICES": "GPU-8f2a"}


def test_a_tpus_process_is_told_of_one_chip_and_has_a_port_of_its_own():
    """The variables of jax's own tests: a slice of one chip, whatever the host has."""
    first, second = (environment_of("tpu", chip, index) for index, chip in enumerate(("4", "6")))
    assert first["TPU_VISIBLE_CHIPS"] == "4" and second["TPU_VISIBLE_CHIPS"] == "6"
    for one in (first, second):
        assert one["TPU_CHIPS_PER_PROCESS_BOUNDS"] == one["TPU_PROCESS_BOUNDS"] == "1,1,1"
        assert one["TPU_PROCESS_ADDRESSES"] == f"localhost:{one['TPU_PROCESS_PORT']}"
    assert first["TPU_PROCESS_PORT"] != second["TPU_PROCESS_PORT"]


@pytest.mark.parametrize("how", ["XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "neither"])
def test_a_cpus_chips_are_its_virtual_devices(monkeypatch, how):
    """However they were asked for, and one without; other flags stay."""
    monkeypatch.setattr(perchip, "count_tpus", lambda: 0)
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if how != "neither":
        monkeypatch.setenv(how, "--a=1 --xla_force_host_platform_device_count=5 --b" if "XLA" in how else "5")
    assert chips_here() == ("cpu", [str(i) for i in range(1 if how == "neither" else 5)])
    own = environment_of("cpu", "3", 3)
    assert own["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=1") and own["JAX_NUM_CPU_DEVICES"] == "1"
    assert how != "XLA_FLAGS" or ("--a=1" in own["XLA_FLAGS"] and "--b" in own["XLA_FLAGS"])


# ----------------------------------------------------------------------------------------------------------------------
# Real processes


def test_each_process_sees_one_device(three_chips, capsys):
    """Three of three, at the same time, each line with its chip; the others begin after the first one's line."""
    assert run_on_each_chip(python(LOOK), "open") == [0, 0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chips: 3 x cpu, a process for each" and lines[1] == "chip 0: open"
    seen = [line.split() for line in lines if " sees " in line]
    assert {words[1] for words in seen} == {"0:", "1:", "2:"} and {words[3] for words in seen} == {"1"}
    assert len({words[-1] for words in seen}) == 3 and sum("draws no bar 1" in line for line in lines) == 3
    environment = os.environ | {"TQDM_DISABLE": ""}
    alone = subprocess.run(python(LOOK), capture_output=True, text=True, env=environment)
    assert "sees 3 of cpu" in alone.stdout, "this machine as it is"


def test_the_others_do_not_begin_where_the_first_one_fails(three_chips, capsys):
    """What is wrong with the command is said once."""
    assert run_on_each_chip(python("print('no'); raise SystemExit(3)"), "open") == [3]
    assert capsys.readouterr().out.count("no\n") == 1


def test_one_that_fails_does_not_end_the_others(three_chips, tmp_path):
    """Each exit code is that of its chip."""
    text = f"import os, sys; print('open', flush=True); place = {str(tmp_path / 'taken')!r}"
    text += "; there = os.path.exists(place); open(place, 'w').close(); sys.exit(0 if there else 5)"
    assert run_on_each_chip(python(text), "open") == [5, 0, 0]


WAIT = """
import os, signal, sys, time
def end(*_):
    print("asked" if os.getsid(0) == os.getpid() else "a terminal would ask as well", flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, end)
print("open", flush=True)
time.sleep(60)
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_reaches_each_process_once(three_chips, capsys, in_time, number):
    """A notebook's stop button, a terminal's Ctrl-C, SIGTERM: all end in their own way, and their codes come back."""

    def strike():
        while capsys_lines().count("open") < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    heard = []
    capsys_lines = lambda: [heard.extend(capsys.readouterr().out.split()), heard][1]
    thread = threading.Thread(target=strike)
    thread.start()
    assert run_on_each_chip(python(WAIT), "open") == [0, 0, 0]
    thread.join()
    assert capsys_lines().count("asked") == 3


@pytest.mark.usefixtures("interruptible")
def test_a_process_that_does_not_end_is_killed(three_chips, monkeypatch, in_time):
    """Insisting: an error here, and no process that keeps its chip."""
    monkeypatch.setattr(perchip, "PATIENCE", 0.3)
    text = "import signal, time; signal.signal(2, signal.SIG_IGN); print('open', flush=True); time.sleep(60)"
    started, real = [], subprocess.Popen
    monkeypatch.setattr(perchip.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])

    def strike():
        while len(started) < 3:
            time.sleep(0.02)
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=strike).start()
    with pytest.raises(KeyboardInterrupt):
        run_on_each_chip(python(text), "open")
    assert [process.wait(5) for process in started] == [-signal.SIGKILL] * 3
