"""The machine a notebook runs on: its folders, devices, secrets, signals, its commit, and Colab's own."""

import contextlib
import ctypes
import glob
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from onechip.errors import say

# PCI ids of TPU v2 to v7, as JAX's own hardware check lists them.
TPU_PCI_IDS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def home():
    """The folder for what all runs share (shards, tokenizers, compiled programs): ONECHIP_HOME or ~/.cache/onechip."""
    return Path(os.environ.get("ONECHIP_HOME") or Path.home() / ".cache" / "onechip")


def in_notebook():
    """True in a Jupyter or Colab kernel, false in a script and in a terminal's IPython."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


def has_tpu():
    """Whether a TPU chip is on this machine's PCI bus."""
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        device = Path(vendor).with_name("device")
        with contextlib.suppress(OSError):
            if Path(vendor).read_text().strip() == "0x1ae0" and device.read_text().strip() in TPU_PCI_IDS:
                return True
    return False


def quiet_jax():
    """Keeps libtpu, installed here for its compiler, from looking for a TPU that is not there, at length, on stderr."""
    if not has_tpu():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_LOG_DIR", "disabled")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # What it would ask the cloud for. A program is compiled for the topology that is named, whatever stands here,
        # but libtpu 0.0.23 (jax 0.7.2) aborts in cost_analysis() if this is a v6e or a v4.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        if not any(map(os.path.exists, GPU_FILES)):
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            if "jax" in sys.modules:  # it has read the variable already
                sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def keep_compiled():
    """Keeps compiled programs on disk: the next start of the same config reaches its first step sooner."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(home() / "compiled"))
        # the default keeps what took a second: a start has a dozen programs that take less, and two seconds together
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def keep_freed_memory():
    """Has the C library keep what XLA frees after each step on a CPU, instead of giving it back to the system.

    Fresh pages for XLA's temporaries cost a fifth of a small model's step (LOG 2026-11-20). These are glibc's settings
    M_ARENA_MAX 1, M_MMAP_MAX 0 and M_TRIM_THRESHOLD never, for threads that are yet to come: call it before JAX is
    used. A C library without mallopt is left as it is.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for name, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
            library.mallopt(name, value)


def read_secret(name):
    """The value of a secret such as HF_TOKEN, or None: the environment first, then Colab's secrets. Never printed.

    Colab's `userdata.get` asks the browser and raises if the secret is missing, not granted or late (10 s), so read
    each secret once, early; a public download needs none.
    """
    if os.environ.get(name, "").strip():
        return os.environ[name].strip()  # pasted with a line's end, it would stand in the client's error message
    if not in_notebook():
        return None
    try:
        from google.colab import userdata
    except ImportError:
        return None
    try:
        return (userdata.get(name) or "").strip() or None
    except Exception as error:  # three classes of Colab's own, by their names
        reason = {
            "SecretNotFoundError": "it is not among this account's secrets (key icon, left)",
            "NotebookAccessError": "this notebook has no access to it (key icon, left)",
            "TimeoutException": "the browser did not answer in time",
        }.get(type(error).__name__, type(error).__name__)
        say(f"secret {name}: {reason}; going on without it")
        return None


class _Interrupt:
    requested = False
    insisted = False  # a second one: KeyboardInterrupt was raised, in the middle of anything


@contextlib.contextmanager
def deferred_interrupt():
    """Notes the first SIGINT or SIGTERM in `.requested` instead of ending the program; a second one is raised.

    Only a program's main thread gets signals: elsewhere this does nothing.
    """
    noted = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum, frame):
        if noted.requested:
            noted.insisted = True
            raise KeyboardInterrupt
        noted.requested = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def git_commit():
    """The commit of the files that run, with "+" behind it if they were changed since; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def open_tensorboard(run_dir):
    """Shows TensorBoard below the cell on Colab; elsewhere says how to start it."""
    if "google.colab" not in sys.modules:
        say(f"curves and profile: uv run tensorboard --logdir {run_dir}")
        return
    try:
        from tensorboard import notebook
    except ImportError:  # pip could not install it, which the opening cell has said
        say(f"curves and profile: there is no TensorBoard here; it can be shown {run_dir} on another machine")
        return
    notebook.start(f"--logdir {shlex.quote(str(run_dir))}")


def give_back_machine(uploaded):
    """Ends Colab's session, and its cost with it; not while what was made is nowhere else (`uploaded` is empty)."""
    if "google.colab" not in sys.modules:
        return
    if not uploaded:
        say("machine: kept, as its disk is the only place where the model is")
        return
    from google.colab import runtime

    runtime.unassign()
