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
import time
from pathlib import Path

from onechip.errors import in_notebook, print_safely, report_in_one_line, say
from onechip.files import clear_abandoned, require_writable
from onechip.lock import process_start

IMPORTED = time.monotonic()  # s

# PCI ids of TPU v2 to v7, as JAX's own hardware check lists them.
TPU_PCI_IDS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def home():
    """The folder for what all runs share (shards, tokenizers, compiled programs): ONECHIP_HOME or ~/.cache/onechip."""
    return Path(os.environ.get("ONECHIP_HOME") or Path.home() / ".cache" / "onechip")


def count_tpus():
    """How many TPU chips are on this machine's PCI bus."""
    count = 0
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        device = Path(vendor).with_name("device")
        with contextlib.suppress(OSError):
            count += Path(vendor).read_text().strip() == "0x1ae0" and device.read_text().strip() in TPU_PCI_IDS
    return count


def has_tpu():
    """Whether a TPU chip is on this machine's PCI bus."""
    return count_tpus() > 0


def process_age():
    """Seconds since this process, a kernel or a script, was started; elsewhere than on Linux since the import."""
    try:
        started = float(process_start(os.getpid())) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, TypeError, ValueError, IndexError):
        return time.monotonic() - IMPORTED


def quiet_jax():
    """Keeps libtpu, installed for its compiler, from searching at length, and loudly, for a TPU that is not here."""
    if not has_tpu():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_LOG_DIR", "disabled")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # What libtpu would ask the cloud for. A program is compiled for the topology it names, whatever is set here,
        # but libtpu 0.0.23 (jax 0.7.2) aborts in cost_analysis() if this is a v6e or a v4.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        if not any(map(os.path.exists, GPU_FILES)):
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            if "jax" in sys.modules:  # it has read the variable already
                sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def prepare():
    """What a notebook's run cell calls first: errors in one line, safe printing, memory and compiled programs kept.

    UserError if nothing can be written to home(): shards, tokenizers and a checkpoint that has no other place go there.
    """
    report_in_one_line()
    print_safely()
    require_writable(home(), "set ONECHIP_HOME to a folder that can")
    for folder in (home(), *home().glob("*"), *home().glob("tokenizers/*")):
        clear_abandoned(folder)
    keep_freed_memory()
    keep_compiled()


def wants_a_look():
    """Whether a notebook's small checks run: in a kernel, and in a script that was given no flags."""
    return in_notebook() or len(sys.argv) == 1


def keep_compiled():
    """Keeps compiled programs on disk: the next start of the same config reaches its first step sooner."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(home() / "compiled"))
        # The default keeps programs that took a second: a start has a dozen shorter ones, two seconds together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def keep_freed_memory():
    """Has the C library keep what XLA frees after each step on a CPU, instead of returning it to the system.

    Fresh pages for XLA's temporaries cost a fifth of a small model's step (LOG.md, "Page faults"). These are glibc's
    M_ARENA_MAX 1, M_MMAP_MAX 0 and M_TRIM_THRESHOLD never, for threads started later: call it before JAX is used. A C
    library without mallopt is left as it is.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for name, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
            library.mallopt(name, value)


# Why Colab did not hand out a secret, by the name of the exception: three classes of Colab's own.
SECRET_REFUSALS = {
    "SecretNotFoundError": "it is not among this account's secrets (key icon, left)",
    "NotebookAccessError": "this notebook has no access to it (key icon, left)",
    "TimeoutException": "the browser did not answer in time",
}


def read_secret(name):
    """The value of a secret such as HF_TOKEN, or None: the environment first, then Colab's secrets. Never printed.

    Colab's `userdata.get` asks the browser and raises if the secret is missing, not granted or late (10 s), so read
    each secret once, early; a public download needs none.
    """
    if os.environ.get(name, "").strip():
        return os.environ[name].strip()  # a line break pasted with it would show up in the client's error message
    if not in_notebook():
        return None
    try:
        from google.colab import userdata
    except ImportError:
        return None
    try:
        return (userdata.get(name) or "").strip() or None
    except Exception as error:
        kind = type(error).__name__
        say(f"secret {name}: {SECRET_REFUSALS.get(kind, kind)}; continuing without it")
        return None


class Interrupt:
    """Whether the program was asked to stop."""

    requested = False
    insisted = False  # asked a second time: KeyboardInterrupt was raised, at any point of the program


_noting = []  # the Interrupts of deferred_interrupts that are open, the innermost last


def is_interrupted():
    """Whether this thread, the main one, is asked to stop by an interrupt that a deferred_interrupt has noted."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and bool(_noting) and _noting[-1].requested


@contextlib.contextmanager
def deferred_interrupt(raise_at_once=False):
    """Yields an Interrupt that notes SIGINT, SIGTERM and SIGHUP; the first does nothing else, a second one raises.

    raise_at_once: the first one raises KeyboardInterrupt, too. A repeated SIGHUP raises nothing, and where SIGHUP is
    ignored, as under nohup, it stays ignored. Only a program's main thread gets signals: elsewhere this does nothing.
    """
    noted = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none

    def note(number, frame):
        repeated = noted.requested
        if repeated and number == hangup:  # a closing terminal sends it twice
            return
        noted.requested, noted.insisted = True, repeated
        if repeated or raise_at_once:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.signal(number, note) for number in numbers}
    _noting.append(noted)
    try:
        yield noted
    finally:
        _noting.remove(noted)
        for number, handler in before.items():
            signal.signal(number, handler)


def git_commit():
    """The commit of the files that run, with a "+" if they were changed since; None outside a git checkout."""
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
    except ImportError:  # pip could not install it, which the opening cell reported
        say(f"curves and profile: TensorBoard is not installed here; open {run_dir} with it on another machine")
        return
    notebook.start(f"--logdir {shlex.quote(str(run_dir))}")


def give_back_machine(uploaded):
    """Ends Colab's session, and its cost; keeps it if `uploaded` is empty: the results are then nowhere else."""
    if "google.colab" not in sys.modules:
        return
    if not uploaded:
        say("machine: kept, since the model is on its disk only")
        return
    from google.colab import runtime

    runtime.unassign()
