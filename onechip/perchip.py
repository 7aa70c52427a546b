"""One process for each chip of this host, which sees that chip and no other."""

import contextlib
import glob
import os
import re
import signal
import subprocess
import threading
import time

from onechip.errors import say
from onechip.machine import count_tpus, deferred_interrupt

PORT = 8476  # of the first process of a TPU; one each: libtpu listens there
VIRTUAL = r"--xla_force_host_platform_device_count=(\d+)"
PATIENCE = 20.0  # seconds for processes to end that were asked twice


def chips_here():
    """("tpu", "gpu" or "cpu", numbers of the chips that a process would see), found without opening any.

    A chip belongs to the process that has opened it. On a CPU its virtual devices are the chips.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if count_tpus() and wanted in ("", "tpu"):
        return "tpu", visible("TPU_VISIBLE_CHIPS", count_tpus())
    gpus = visible("CUDA_VISIBLE_DEVICES", len(glob.glob("/dev/nvidia[0-9]*")))
    if gpus and wanted in ("", "cuda", "gpu"):
        return "gpu", gpus
    asked = re.search(VIRTUAL, os.environ.get("XLA_FLAGS", ""))
    count = os.environ.get("JAX_NUM_CPU_DEVICES") or (asked[1] if asked else "1")
    return "cpu", [str(i) for i in range(int(count))]


def visible(name, count):
    """The numbers in an environment's list of what may be seen, or 0 to count - 1, as text."""
    given = os.environ.get(name)
    return [part.strip() for part in given.split(",") if part.strip()] if given else [str(i) for i in range(count)]


def environment_of(platform, chip, index):
    """The variables by which a process sees one chip only; index: 0, 1, ... among the processes of this host.

    For a TPU they are those that jax's own tests of several processes set (jax/_src/test_multiprocess.py): libtpu takes
    the process for all there is of a slice of one chip, and lets others open theirs.
    """
    if platform == "tpu":
        bounds = dict.fromkeys(("TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_PROCESS_BOUNDS"), "1,1,1")
        port = str(PORT + index)
        alone = {"TPU_PROCESS_ADDRESSES": f"localhost:{port}", "TPU_PROCESS_PORT": port, "CLOUD_TPU_TASK_ID": "0"}
        return {"TPU_VISIBLE_CHIPS": chip, **bounds, **alone, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if platform == "gpu":
        return {"CUDA_VISIBLE_DEVICES": chip}
    flags = re.sub(VIRTUAL, "", os.environ.get("XLA_FLAGS", "")).strip()
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=1".strip(), "JAX_NUM_CPU_DEVICES": "1"}


class ChipProcess:
    """A command that runs on one chip; what it prints is printed here, line by line, with the chip's number."""

    def __init__(self, command, platform, chip, index, ready=""):
        """ready: `is_ready` is set by the first line that begins so."""
        own = environment_of(platform, chip, index) | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        # A session of its own: a terminal's Ctrl-C reaches it once, from here.
        self.process = subprocess.Popen(command, env=os.environ | own, start_new_session=True, **pipes)
        self.is_ready, self._chip, self._ready = threading.Event(), chip, ready
        self._thread = threading.Thread(target=self._relay, name=f"chip {chip}", daemon=True)
        self._thread.start()

    def _relay(self):
        for line in self.process.stdout:
            say(f"chip {self._chip}: {line.rstrip()}")
            if line.startswith(self._ready):
                self.is_ready.set()

    @property
    def runs(self):
        """Whether it has not ended."""
        return self.process.poll() is None

    def interrupt(self):
        """Asks it to end, as Ctrl-C would."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def finish(self):
        """Its exit code, after its last line."""
        self._thread.join()
        return self.process.wait()


def run_on_each_chip(command, ready=""):
    """Runs a command, a list of words, once for each chip here; returns the exit codes in the order of the chips.

    The first one begins alone, until it prints a line that begins with `ready`; if it never does, it stays alone. An
    interrupt is passed on to all; a second one passes a second one on, and is raised.
    """
    platform, chips = chips_here()
    say(f"chips: {len(chips)} x {platform}, a process for each")
    running = []
    with deferred_interrupt() as interrupt:
        try:
            for index, chip in enumerate(chips):
                running.append(ChipProcess(command, platform, chip, index, ready))
                _wait(running, lambda: running[0].is_ready.is_set() or interrupt.requested)
                if interrupt.requested or not running[0].is_ready.is_set():
                    break
            _wait(running, lambda: interrupt.requested)
            for one in running if interrupt.requested else []:
                one.interrupt()
            _wait(running, lambda: False)
        finally:
            _end(running)
    return [one.finish() for one in running]


def _wait(running, condition):
    """Waits until a condition holds or all processes have ended."""
    while any(one.runs for one in running) and not condition():
        time.sleep(0.05)


def _end(running):
    """Ends what still runs, in spite of all: when this process ends, its chips are free."""
    for one in running:
        if one.runs:
            one.interrupt()
    end = time.monotonic() + PATIENCE
    _wait(running, lambda: time.monotonic() > end)
    for one in running:
        if one.runs:
            one.process.kill()
