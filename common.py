"""Plumbing that every notebook needs and no notebook teaches: settings, secrets, one-line errors, whole files."""

import argparse
import contextlib
import dataclasses
import difflib
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# PCI ids of TPU v2 to v7, as JAX's own hardware check lists them.
TPU_PCI_IDS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


class UserError(ValueError):
    """Bad input. The message is one line: the field or file, its value, and what would be right."""


def say(text):
    """Prints one line at once: Colab holds unflushed lines back."""
    print(text, flush=True)


def home():
    """The folder for what all runs share (shards, tokenizers, compiled programs): ONECHIP_HOME or ~/.cache/onechip."""
    return Path(os.environ.get("ONECHIP_HOME") or Path.home() / ".cache" / "onechip")


def in_notebook():
    """True in a Jupyter or Colab kernel, false in a script and in a terminal's IPython."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


# ---------------------------------------------------------------------------------------------------------------
# Devices


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
        if not any(map(os.path.exists, GPU_FILES)):
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            if "jax" in sys.modules:  # it has read the variable already
                sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


quiet_jax()


# ---------------------------------------------------------------------------------------------------------------
# Settings: dataclasses are the only list of what can be set


def setting(default, help):
    """A dataclass field with a default and the line that `--help` shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}. --help lists every setting")


def _parse_bool(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")


def _make_parser(classes):
    parser = _Parser(prog=Path(sys.argv[0]).name, allow_abbrev=False, usage="%(prog)s [--name value ...]")
    for cls in classes:
        group = parser.add_argument_group(cls.__name__, (cls.__doc__ or "").strip().splitlines()[0])
        for field in dataclasses.fields(cls):
            group.add_argument(
                f"--{field.name}",
                type=_parse_bool if field.type is bool else field.type,
                default=argparse.SUPPRESS,
                metavar=field.type.__name__.upper(),
                help=f"{field.metadata.get('help', '')} (default: {field.default!r})".replace("%", "%%"),
            )
    return parser


def parse_settings(*classes, overrides=""):
    """What a user set, as one dict of field values per dataclass in `classes`.

    In a notebook that is the text `overrides` ("--n_head 4 --data offline"), in a script the command line after it.
    Raises UserError on a wrong name, with the nearest right one, and on a value of the wrong type.
    """
    if not in_notebook():
        sys.excepthook = print_one_line_errors
    words = overrides.split() + ([] if in_notebook() else sys.argv[1:])
    given, unknown = _make_parser(classes).parse_known_args(words)
    if unknown:
        names = [field.name for cls in classes for field in dataclasses.fields(cls)]
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"unknown setting {unknown[0]!r}{hint} --help lists every setting")
    return [{f.name: getattr(given, f.name) for f in dataclasses.fields(cls) if f.name in given} for cls in classes]


def print_one_line_errors(kind, error, traceback):
    """An excepthook for scripts: bad input is told in one line, anything else with its traceback."""
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# ---------------------------------------------------------------------------------------------------------------
# Secrets


def read_secret(name):
    """The value of a secret such as HF_TOKEN, or None: the environment first, then Colab's secrets. Never printed.

    Colab's `userdata.get` asks the browser and raises if the secret is missing, not granted or late (10 s), so read
    each secret once, early; a public download needs none.
    """
    if os.environ.get(name):
        return os.environ[name]
    if not in_notebook():
        return None
    try:
        from google.colab import userdata
    except ImportError:
        return None
    try:
        return userdata.get(name) or None
    except Exception as error:  # three classes of Colab's own, by their names
        reason = {
            "SecretNotFoundError": "it is not among this account's secrets (key icon, left)",
            "NotebookAccessError": "this notebook has no access to it (key icon, left)",
            "TimeoutException": "the browser did not answer in time",
        }.get(type(error).__name__, type(error).__name__)
        say(f"secret {name}: {reason}; going on without it")
        return None


# ---------------------------------------------------------------------------------------------------------------
# Files: whole or not at all


def fsync_path(path):
    """Forces a file's or folder's content to disk, so that a rename after it cannot outlive it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a path beside `path` to write a file or folder to; renames it to `path` on success, removes it on failure.

    A reader sees the old file or the new one, never a part, whatever moment the machine dies at. A full disk raises
    UserError and leaves nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)) / path.name
    try:
        yield beside
        for file in [f for f in beside.rglob("*") if f.is_file()] if beside.is_dir() else [beside]:
            fsync_path(file)
        os.replace(beside, path)
        fsync_path(path.parent)
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise UserError(
                f"{path}: the disk is full; free some space and run again, nothing half-written is left"
            ) from None
        raise
    finally:
        shutil.rmtree(beside.parent, ignore_errors=True)


class _Interrupt:
    requested = False


@contextlib.contextmanager
def deferred_interrupt():
    """Notes the first KeyboardInterrupt in `.requested` instead of raising it; a second one is raised.

    Only a program's main thread gets signals: elsewhere this does nothing.
    """
    noted = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum, frame):
        if noted.requested:
            raise KeyboardInterrupt
        noted.requested = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def git_commit():
    """The commit of the files that run, with "+" behind it if they were changed since; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")
