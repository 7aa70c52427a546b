"""Python programs of a chat model, run in a process that the kernel walls in; refused where it cannot.

What this protects from, and what it does not, is in docs/sandbox.md.
"""

import dataclasses
import functools
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from onechip.errors import UserError, require
from onechip.seccomp import build_filter

START = """
import sys, types
package = types.ModuleType("onechip")  # its rooms, without what importing it does
package.__path__ = [sys.argv[1]]
sys.modules["onechip"] = package
from onechip.jail import enter_jail
enter_jail(int(sys.argv[2]))
"""
WALLS = ("namespaces", "landlock")  # beside seccomp, which has to be there
WITHOUT = "switch the Python tool off; the calculator works without it"
PRELOADED = """
array base64 bisect calendar cmath collections contextlib copy csv dataclasses datetime decimal difflib enum fractions
functools hashlib heapq html inspect io itertools json linecache math numbers operator pprint queue random re secrets
statistics string struct tempfile textwrap time traceback types typing unicodedata uuid zlib
"""  # imported before the filter where no file can be opened after it
TICK = 0.05  # s between two looks at a folder's size
AFTER = 5.0  # s for the outer process to kill the others, before all are killed at once


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0  # by the clock, from before Python starts
    cpu: int = 5  # s of processor time
    memory: int = 256 << 20  # bytes of address space, of which Python itself takes about 40 MB
    output: int = 64 << 10  # bytes, of standard output and standard error each
    file_size: int = 1 << 20  # bytes a file
    disk: int = 8 << 20  # bytes of all files
    descriptors: int = 64
    code: int = 100_000  # characters

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), (int, float) if field.name == "seconds" else (int,)
            known = isinstance(value, kinds) and not isinstance(value, bool)
            most = 86_400 if field.name in ("seconds", "cpu") else 1 << 40
            require(known and 0 < value <= most, field.name, value, f"must be a number above 0, at most {most}")


@dataclasses.dataclass(frozen=True)
class PythonOutcome:
    """How a program ended. Both error and stopped are empty if it ran to its last line."""

    stdout: str  # what it printed, bytes that are no UTF-8 replaced
    error: str  # the traceback of what it raised, or what it wrote to standard error before it was stopped
    seconds: float  # by the clock
    stopped: (
        str  # "time", "cpu", "memory", "output", "disk", "signal 11", "exit status 3"; "" if nothing ended it early
    )

    @property
    def finished(self):
        """Whether the program ran to its last line."""
        return not (self.error or self.stopped)


def run_python(code, limits=None):
    """Runs a program, a string, in a sandbox; returns its PythonOutcome, limits.seconds and a little later at most.

    Raises UserError if the code is too long or no text, and where the kernel offers too little: describe_protection().
    """
    limits = limits or Limits()
    require(isinstance(code, str), "code", code, "must be a string")
    require(len(code) <= limits.code, "code", code, f"must have at most {limits.code} characters")
    walls, reasons = find_walls()
    if walls is None:
        raise UserError(f"Python's sandbox: {reasons}: {WITHOUT}")
    return run_behind(walls, code, limits)


def describe_protection():
    """In a line, what stands between a model's program and this machine; or why none is run."""
    walls, reasons = find_walls()
    if walls is None:
        return f"Python's sandbox refuses to run here: {reasons}; the calculator works"
    files = "its own folder and Python's library only" if walls else "no files at all, and only modules loaded before"
    missing = f" (not here: {reasons})" if reasons else ""
    return f"Python's sandbox: {', '.join(['seccomp', *walls])}; {files}{missing}"


@functools.lru_cache(maxsize=1)
def find_walls():
    """(walls that hold here beside seccomp, why others are missing); (None, why) if a program cannot be run safely.

    Found by running a program of nothing behind each wall. The least is seccomp: it alone refuses networks, other
    processes and signals; without namespaces or Landlock it refuses to open any file too.
    """
    if sys.platform != "linux":
        return None, f"needs Linux, this is {sys.platform}"
    if build_filter(platform.machine(), True) is None:
        return None, f"no list of system calls for {platform.machine()}"
    reasons = {}
    for walls in [(), *((wall,) for wall in WALLS)]:
        try:
            outcome = run_behind(walls, "", Limits(seconds=20.0))
            if not outcome.finished:
                last = (outcome.error.strip() or "no word").splitlines()[-1][:200]
                reasons[walls] = f"a program of nothing ended with {outcome.stopped or 'an error'}: {last}"
        except UserError as error:
            reasons[walls] = str(error)
    if () in reasons:
        return None, reasons[()]
    return tuple(wall for wall in WALLS if (wall,) not in reasons), "; ".join(reasons.values())


def run_behind(walls, code, limits):
    """Runs a program behind seccomp and the walls named, of WALLS. Raises UserError if one cannot be raised."""
    base = tempfile.mkdtemp(prefix="sandbox-")
    try:
        folder, canary = Path(base, "folder"), Path(base, "outside")
        folder.mkdir()
        canary.write_text("what the sandbox must not be able to open\n")
        request = dataclasses.asdict(limits) | {"walls": walls, "code": code, "folder": str(folder)}
        request |= {"canary": str(canary), "modules": [] if walls else PRELOADED.split(), "parent": os.getpid()}
        request["filter"] = build_filter(platform.machine(), bool(walls)).hex()
        return _Run(request, limits).outcome()
    finally:
        shutil.rmtree(base, ignore_errors=True)


class _Run:
    """One program's processes, from their start to their end."""

    def __init__(self, request, limits):
        """request: what jail.py reads, JSON."""
        self._limits, self._folder, self._started = limits, request["folder"], time.monotonic()
        self._watched = "namespaces" not in request["walls"]  # a folder on disk, not in memory
        self._received = {"stdout": b"", "stderr": b"", "report": b""}
        self._stopped = ""
        report, report_end = os.pipe()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
            try:
                self._process = self._start(stdin, report_end, request["folder"])
            except OSError:
                os.close(report)
                raise
            finally:
                os.close(report_end)
        self._pipes = {"stdout": self._process.stdout, "stderr": self._process.stderr, "report": open(report, "rb", 0)}

    def _start(self, stdin, report, folder):
        """Python without site-packages and without anybody's settings, leader of a group of processes."""
        command = [
            sys.executable,
            "-I",
            "-S",
            "-B",
            "-u",
            "-X",
            "utf8",
            "-c",
            START,
            str(Path(__file__).parent),
            str(report),
        ]
        streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
        return subprocess.Popen(command, **streams, env={}, cwd=folder, pass_fds=(report,), start_new_session=True)

    def outcome(self):
        """Waits for the end; kills what is left, whatever happens. Raises UserError if a wall could not be raised."""
        try:
            self._follow(self._started + self._limits.seconds)
        finally:
            self._end()
        seconds = time.monotonic() - self._started
        report = json.loads(self._received["report"] or "{}")
        said = report.get("said", "")
        if said and not said.startswith("ready"):
            raise UserError(said)
        stopped = self._stopped or self._how(report, said.removeprefix("ready "))
        stdout, error = (self._text(name) for name in ("stdout", "stderr"))
        return PythonOutcome(stdout, error if stopped or not said.endswith("finished") else "", seconds, stopped)

    def _text(self, name):
        return self._received[name][: self._limits.output].decode("utf-8", "replace")

    def _how(self, report, said):
        """What ended a program; empty if it ended by itself, at its last line or by an exception."""
        if "status" not in report:
            return "killed from outside"
        code = os.waitstatus_to_exitcode(report["status"])
        if (code, said) in ((0, "finished"), (1, "error")):
            return ""
        if said == "memory":
            return said
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report["cpu"] >= self._limits.cpu):
            return "cpu"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _follow(self, deadline):
        """Reads what comes until the report is closed, which all processes have done when they have ended."""
        with selectors.DefaultSelector() as selector:
            for name, pipe in self._pipes.items():
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, name)
            while not self._stopped:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._stopped = "time"
                for key, _ in selector.select(min(max(left, 0), TICK)):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                        if key.data == "report":
                            return
                if self._watched and not self._stopped and folder_size(self._folder) > self._limits.disk:
                    self._stopped = "disk"

    def _read(self, name):
        """Takes what a pipe holds; false at its end. Notes when there is too much."""
        try:
            chunk = os.read(self._pipes[name].fileno(), 1 << 16)
        except BlockingIOError:
            return self._process.returncode is None
        self._received[name] += chunk
        if len(self._received[name]) > self._limits.output:
            self._stopped = self._stopped or "output"
            return False
        return bool(chunk)

    def _end(self):
        """Has the outer process kill the others and wait for them, then takes what they had written."""
        self._process.terminate()
        try:
            self._process.wait(AFTER)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for name, pipe in self._pipes.items():
            while len(self._received[name]) <= self._limits.output and self._read(name):
                pass
            pipe.close()


def folder_size(path):
    """Bytes of a folder's files, without folders in it, and 4,096 for each file."""
    try:
        with os.scandir(path) as entries:
            return sum(4096 + entry.stat(follow_symlinks=False).st_size for entry in entries)
    except FileNotFoundError:  # a file that went while it was looked at
        return 0
