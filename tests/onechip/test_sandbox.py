"""onechip/sandbox.py, jail, walls and seccomp: hostile programs behind each set of walls that this kernel offers."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from onechip import sandbox
from onechip.errors import UserError
from onechip.sandbox import Limits, PythonOutcome, describe_protection, find_walls, run_behind, run_python

ROOT = Path(__file__).parents[2]
SETS = [(), ("landlock",), ("namespaces",), ("namespaces", "landlock")]
FAST = Limits(seconds=10.0)
POPEN = subprocess.Popen


class Behind:
    """Runs programs behind certain walls, with FAST's limits but for those named."""

    def __init__(self, walls):
        self.walls, self.has_files = walls, bool(walls)

    def __call__(self, code, **limits):
        return run_behind(self.walls, code, dataclasses.replace(FAST, **limits))


@pytest.fixture(params=SETS, ids=lambda walls: "+".join(["seccomp", *walls]))
def run(request, monkeypatch, tmp_path):
    """run(code, **limits) behind one set of walls; where the kernel has not all of it, the refusal is tested."""
    (tmp_path / "sandboxes").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "sandboxes"))
    walls, _ = find_walls()
    if walls is None or set(request.param) - set(walls):
        with pytest.raises(UserError):
            (run_python if walls is None else lambda code: run_behind(request.param, code, FAST))("")
        pytest.skip(describe_protection())
    yield Behind(request.param)
    assert list((tmp_path / "sandboxes").iterdir()) == []


@pytest.fixture
def offered():
    """Skips where run_python refuses, which test_refuses_where_too_little_is_offered then tests for real."""
    if find_walls()[0] is None:
        pytest.skip(describe_protection())


# ----------------------------------------------------------------------------------------------------------------------
# Programs that end by themselves


def test_a_program_runs(run):
    """It prints, it has a main module, and its outcome says that it came to its last line."""
    outcome = run(
        "import math\nclass A: pass\ndef f(n): return n * f(n - 1) if n else 1\nprint(f(5), __name__, A.__module__)"
    )
    assert (outcome.stdout, outcome.error, outcome.stopped) == ("120 __main__ __main__\n", "", "")
    assert outcome.finished and 0 < outcome.seconds < 10


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("print('a')\n1 / 0", "ZeroDivisionError: division by zero"),
        ("print('a'); import sys; sys.stderr.write('b\\n'); raise SystemExit", "SystemExit"),
        ("print('a'); input()", "EOFError: EOF when reading a line"),
        ("print('a')\ndef f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("print('a'); raise ValueError('x' * 10**7)", "x"),
        ("print('a'); raise type('E' * 10**6, (Exception,), {})", "E"),
        ("print('a')\nclass E(Exception):\n    def __str__(self): raise E\nraise E", "E: <exception str() failed>"),
        ("import os\nprint('a')\nwhile True: os.dup(1)", "OSError: [Errno 24] Too many open files"),
        ("print('a'); import sys; sys.stderr = sys.stdout = None; x", "NameError: name 'x' is not defined"),
    ],
)
def test_exceptions_are_reported(offered, code, last):
    """The traceback as Python prints it, and bounded; what was printed before is kept."""
    outcome = run_python(code, FAST)
    assert (outcome.stdout, outcome.stopped, outcome.finished) == ("a\n", "", False)
    assert outcome.error.splitlines()[-1].endswith(last) and len(outcome.error) < 4100
    assert "Traceback" in outcome.error and "jail" not in outcome.error


def test_what_is_no_program(offered):
    """Code that Python cannot read is an error of the program, not of the caller."""
    for code, last in [("x = (", "SyntaxError"), ("\0", "null bytes"), ("\ud800", "surrogates")]:
        outcome = run_python(code, FAST)
        assert last in outcome.error and outcome.stopped == "", code


def test_text_that_is_no_utf8(offered):
    """Bytes that are no UTF-8 are replaced; what is printed is UTF-8 in any locale; nothing is left out."""
    outcome = run_python("import os\nprint('ï€😀')\nos.write(1, b'a\\xff\\xfe\\n\\xc3')", FAST)
    assert outcome == PythonOutcome("ï€😀\na\ufffd\ufffd\n\ufffd", "", outcome.seconds, "")


def test_what_a_program_may_do(run):
    """Files in its folder where it may have any, asyncio, the usual modules; warnings are no errors."""
    code = "import hashlib, json, re, sys, random\nprint(hashlib.sha256(b'a').hexdigest()[:8], file=sys.stderr)\n"
    assert run(code).finished
    if run.has_files:
        code = "import asyncio, tempfile\nopen('a', 'w').write('b' * 9000)\nprint(len(open('a').read()))\n"
        code += "asyncio.run(asyncio.sleep(0.01))\nwith tempfile.TemporaryFile() as f: f.write(b'c')\n"
        outcome = run(code)
        assert (outcome.stdout, outcome.error, outcome.stopped) == ("9000\n", "", "")


@pytest.mark.parametrize(
    "name", ["os._exit", "os.write", "sys.stdout", "sys.modules", "builtins.print", "builtins.isinstance"]
)
def test_programs_that_replace_things(offered, name):
    """What a program replaces in its own process does not change how its end is reported."""
    code = f"import builtins, os, sys\nprint('a')\n{name} = None\n"
    assert run_python(code, FAST) == PythonOutcome("a\n", "", pytest.approx(5, abs=5), "")
    assert run_python(f"{code}1 / 0", FAST).error


# ----------------------------------------------------------------------------------------------------------------------
# Programs that are stopped


@pytest.mark.parametrize(
    ("code", "stopped"),
    [
        ("import time\nprint('a')\nwhile True: time.sleep(9)", "time"),
        ("import signal\nprint('a')\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nsignal.pause()", "time"),
        ("print('a')\nwhile True: pass", "cpu"),
        ("import re\nprint('a')\nre.match('(a*)*b', 'a' * 99)", "cpu"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nprint('a')\nwhile True: pass", "cpu"),
        ("class E(Exception):\n    def __str__(self):\n        while True: pass\nprint('a')\nraise E", "cpu"),
    ],
)
def test_programs_without_end(offered, code, stopped):
    """Endless loops and sleeps are ended in time, whatever they ignore; what was printed before is kept."""
    started = time.monotonic()
    outcome = run_python(code, Limits(seconds=1.5 if stopped == "time" else 20, cpu=1))
    assert (outcome.stdout, outcome.stopped, outcome.finished) == ("a\n", stopped, False)
    assert time.monotonic() - started < 12 and (stopped == "cpu" or 1.5 <= outcome.seconds < 4)


@pytest.mark.parametrize("stream", [1, 2])
def test_output_without_end(run, stream):
    """It is ended at the limit, and the outcome holds no more than that."""
    outcome = run(f"import os\nwhile True: os.write({stream}, b'y' * 9999)", output=12345)
    assert outcome.stopped == "output"
    assert (outcome.stdout, outcome.error) == (("y" * 12345, "") if stream == 1 else ("", "y" * 12345))


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10**11)",
        "x = []\nwhile True: x.append(bytes(10**6))",
        "x = {}\nwhile True: x[len(x)] = str(len(x)) * 99",
        "x = 1\nwhile True: x = x << 10**8 | x",
        "x = 'y' * 10**12",
        "x = []\ntry:\n    import mmap\n    while len(x) < 40: x.append(mmap.mmap(-1, 10**7))\n"
        "except (OSError, ImportError): raise MemoryError",
    ],
)
def test_memory(offered, code):
    """More than the limit is never there: the program ends with MemoryError."""
    outcome = run_python(code, dataclasses.replace(FAST, memory=150 << 20))
    assert outcome.stopped == "memory" and outcome.error.splitlines()[-1].startswith("MemoryError")


def test_memory_that_is_a_file(offered):
    """Memory beside the address space is not to be had: no anonymous file, no segment of System V's."""
    outcome = run_python("import os\nos.memfd_create('a')", FAST)
    assert "PermissionError" in outcome.error
    outcome = run_python("import ctypes\nprint(ctypes.CDLL(None).shmget(0, 10**9, 0o1600))", FAST)
    assert outcome.stdout == "-1\n"


def test_descriptors(offered):
    """No more files, pipes or sockets at once than the limit."""
    code = "import os, socket\nx = []\ntry:\n    while True: x.extend(os.pipe() + socket.socketpair())\n"
    code += "except OSError: print(len(x))"
    assert 20 < int(run_python(code, dataclasses.replace(FAST, descriptors=40)).stdout) < 40


FILL = "i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes({size}))\n    i += 1\n"


@pytest.mark.parametrize("size", [10**5, 0], ids=["many", "empty"])
def test_the_disk_is_not_filled(run, size):
    """Files up to the limit, of any size, and no more; without them where it may have none."""
    outcome = run(FILL.format(size=size), disk=3 << 20)
    if not run.has_files:
        assert "PermissionError" in outcome.error
    else:
        assert outcome.stopped == "disk" or "No space left on device" in outcome.error


def test_a_large_file(run):
    """A file ends at its limit."""
    outcome = run("f = open('a', 'wb', 0)\nfor _ in range(99): f.write(bytes(10**5))", file_size=250_000)
    assert ("File too large" if run.has_files else "PermissionError") in outcome.error


@pytest.mark.parametrize(
    ("code", "stopped"),
    [
        ("import os\nos._exit(0)", "exit status 0"),
        ("import os\nos._exit(77)", "exit status 77"),
        ("import ctypes\nctypes.string_at(0)", "signal 11"),
        ("import os\nos.abort()", "signal"),
        ("import os\nos.closerange(0, 999)", "exit status"),
        ("import os\nos.closerange(3, 999)\nos._exit(0)", "exit status 0"),
    ],
)
def test_programs_that_leave(offered, code, stopped):
    """To leave before the last line is no success, with status 0 neither; to have closed everything is none."""
    outcome = run_python(code, FAST)
    assert outcome.stopped.startswith(stopped) and not outcome.finished


# ----------------------------------------------------------------------------------------------------------------------
# Programs that reach for what is not theirs

ATTEMPTS = """
import contextlib, ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def number(*of):
    return dict(zip(("x86_64", "aarch64"), of))[os.uname().machine]
def kernel(*arguments):
    if libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]) < 0:
        raise OSError(ctypes.get_errno(), "")
def open_all(*paths, flags=os.O_RDONLY):
    for path in paths:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, flags)
            print("OPENED", path)
            print(os.read(descriptor, 99))
    raise PermissionError
def send(family, kind, address):
    socket.socket(family, kind).sendto(b"x", address)
def hand_over():
    os.symlink(SECRET, "link")
    print("OPENED", open("link").read())
def hard_link():
    os.link(SECRET, "hard")
    print("OPENED", open("hard").read())
def own_signals():
    import fcntl
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETOWN, PARENT)
def no_rights():
    os.close(os.open("closed", os.O_WRONLY | os.O_CREAT, 0))
    open_all("closed")
attempts = {
    "fork": os.fork,
    "clone3": lambda: kernel(435, ctypes.create_string_buffer(88), 88),
    "thread": lambda: __import__("threading").Thread(target=print).start(),
    "program": lambda: os.execv("/bin/sh", ["sh", "-c", "echo OPENED"]),
    "subprocess": lambda: __import__("subprocess").run([sys.executable, "-c", "print('OPENED')"]),
    "system": lambda: os.system("echo OPENED") and os.fork(),
    "tcp": lambda: socket.create_connection(TCP, 2).send(b"x"),
    "listen": lambda: socket.create_server(("127.0.0.1", 0)),
    "udp": lambda: send(socket.AF_INET, socket.SOCK_DGRAM, UDP),
    "ipv6": lambda: socket.socket(socket.AF_INET6),
    "unix": lambda: send(socket.AF_UNIX, socket.SOCK_DGRAM, UNIX),
    "abstract": lambda: send(socket.AF_UNIX, socket.SOCK_DGRAM, ABSTRACT),
    "pair": lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b"x", ABSTRACT),
    "pair's address": lambda: socket.socketpair()[0].sendto(b"x", ABSTRACT),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "raw": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "io_uring": lambda: kernel(425, 8, ctypes.create_string_buffer(120)),
    "kill parent": lambda: os.kill(PARENT, signal.SIGUSR1),
    "kill its own parent": lambda: os.kill(os.getppid() or 1, signal.SIGKILL),
    "kill all": lambda: os.kill(-1, signal.SIGUSR1),
    "kill group": lambda: os.killpg(0, signal.SIGKILL),
    "queue": lambda: kernel(number(129, 138), PARENT, 10, ctypes.create_string_buffer(128)),
    "pidfd": lambda: os.pidfd_open(PARENT),
    "own signals": own_signals,
    "ptrace": lambda: kernel(number(101, 117), 16, PARENT, 0, 0),
    "memory of parent": lambda: kernel(number(310, 270), PARENT, None, 0, None, 0, 0),
    "limits of parent": lambda: __import__("resource").prlimit(PARENT, 7, (9, 9)),
    "higher limits": lambda: __import__("resource").setrlimit(9, (2**40, 2**40)),
    "priority of parent": lambda: os.setpriority(os.PRIO_PROCESS, PARENT, 19),
    "session": os.setsid,
    "secret": lambda: open(SECRET).read() and print("OPENED"),
    "repository": lambda: open(REPOSITORY).read() and print("OPENED"),
    "link": hand_over,
    "hard link": hard_link,
    "list home": lambda: os.listdir(os.path.dirname(SECRET)) and print("OPENED"),
    "parents": lambda: open_all("../outside", "../../secret", "/tmp/../" + SECRET, "/proc/self/cwd/../outside"),
    "proc": lambda: open_all("/proc/self/environ", f"/proc/{PARENT}/environ", f"/proc/{PARENT}/maps", "/proc/1/environ",
                             f"/proc/{PARENT}/root" + SECRET, "/proc/self/root" + SECRET, "/proc/kallsyms"),
    "system's files": lambda: open_all("/etc/passwd", "/dev/mem", "/dev/tty", "/sys/kernel/vmcoreinfo"),
    "packages": lambda: open_all(*PACKAGES),
    "write secret": lambda: open_all(SECRET, LIBRARY, flags=os.O_WRONLY | os.O_APPEND),
    "new file": lambda: open_all(SECRET + "2", LIBRARY + "2", "/new", flags=os.O_WRONLY | os.O_CREAT),
    "capabilities": no_rights,
    "truncate": lambda: os.truncate(SECRET, 0),
    "remove": lambda: os.remove(SECRET),
    "rename": lambda: os.rename(SECRET, SECRET + "3"),
    "mode": lambda: os.chmod(SECRET, 0o777),
    "owner": lambda: os.chown(SECRET, 1, 1),
    "times": lambda: os.utime(SECRET),
    "device": lambda: os.mknod("device", 0o20666, os.makedev(1, 3)),
    "chroot": lambda: os.chroot("."),
    "unshare": lambda: libc.unshare(0x10000000) and kernel(0xFFFF),
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) and kernel(0xFFFF),
    "user": lambda: os.setuid(0) or os.setuid(12345),
    "handle": lambda: kernel(number(304, 265), -100, ctypes.create_string_buffer(64), 0),
    "bpf": lambda: kernel(number(321, 280), 0, ctypes.create_string_buffer(64), 64),
    "keys": lambda: kernel(number(250, 219), 0, -3, 1),
    "x32": lambda: kernel(0x40000000 + 41, 2, 1, 0),
}
print(sorted(os.environ), sys.argv)
for name, attempt in attempts.items():
    try:
        attempt()
        print(name, "DONE")
    except (OSError, RuntimeError, ImportError, LookupError) as error:
        print(name, "refused")
    except ValueError as error:
        print(name, "refused" if "limit" in str(error) else "DONE")
for descriptor in range(3, 64):
    with contextlib.suppress(OSError):
        os.set_blocking(descriptor, False)
        print("descriptor", descriptor, os.read(descriptor, 99))
print("end")
"""


@contextlib.contextmanager
def listeners(folder):
    """Servers of four kinds: {name: address}, and a function that counts what reached them."""
    sockets = {
        "TCP": socket.create_server(("127.0.0.1", 0)),
        "UDP": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "UNIX": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "ABSTRACT": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    }
    sockets["UDP"].bind(("127.0.0.1", 0))
    sockets["UNIX"].bind(os.path.relpath(folder / "unix"))  # short enough
    sockets["ABSTRACT"].bind(f"\0sandbox-{os.getpid()}")
    for each in sockets.values():
        each.setblocking(False)

    def reached():
        names = []
        for name, each in sockets.items():
            with contextlib.suppress(BlockingIOError):
                names.append((name, each.accept() if name == "TCP" else each.recv(9)))
        return names

    addresses = {name: each.getsockname() for name, each in sockets.items()} | {"UNIX": str(folder / "unix")}
    yield addresses, reached
    for each in sockets.values():
        each.close()


def kept(path):
    """What an attempt to change a file would change."""
    found = path.stat()
    return (
        found.st_mode,
        found.st_uid,
        found.st_gid,
        found.st_nlink,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


def test_attempts(run, tmp_path, monkeypatch):
    """Processes, networks, signals, files, others' memory, rights: each attempt is refused, and leaves no trace."""
    secret = tmp_path / "secret"
    secret.write_text("OPENED the secret")
    secret.chmod(0o666)
    before = kept(secret)
    monkeypatch.setenv("A_TOKEN", "OPENED")
    packages = [str(path) for path in Path(os.__file__).parent.glob("site-packages/**/*.py")][:3]
    with listeners(tmp_path) as (addresses, reached), open(secret) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        names = {"SECRET": str(secret), "REPOSITORY": sandbox.__file__, "LIBRARY": os.__file__, "PARENT": os.getpid()}
        names |= {"PACKAGES": packages or ["/none"], **addresses}
        head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        outcome = run(head + ATTEMPTS)
        assert reached() == []
    lines = outcome.stdout.splitlines()
    assert (outcome.error, outcome.stopped, lines[-1]) == ("", "", "end")
    assert [line for line in lines[1:-1] if not line.endswith(" refused")] == []
    assert lines[0] == "[] ['']" and len(lines) == ATTEMPTS.count('\n    "') + 2
    assert secret.read_text() == "OPENED the secret" and kept(secret) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sandboxes", "secret", "unix"]


# ----------------------------------------------------------------------------------------------------------------------
# The processes around a program


def session_of(pid):
    """The processes of a session, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.fixture
def started(monkeypatch):
    """The ids of the sandboxes' outer processes, which lead their sessions."""
    pids = []

    def recording(*arguments, **options):
        process = POPEN(*arguments, **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(sandbox.subprocess, "Popen", recording)
    return pids


def test_nothing_outlives_a_program(run, started):
    """Ended by itself, by time or by output: none of its processes is left when its outcome is there."""
    for code, stopped in [("", ""), ("import time; time.sleep(99)", "time"), ("while True: print('y')", "output")]:
        assert run(code, seconds=1.5, cpu=9).stopped == stopped
        assert session_of(started[-1]) == []
    assert len(started) == 3


def test_nothing_outlives_an_interrupt(run, started, monkeypatch):
    """Whatever ends the waiting, Ctrl-C say, ends the program."""

    def interrupted(self, deadline):
        time.sleep(0.5)
        assert len(session_of(started[-1])) == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox._Run, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(99)")
    assert session_of(started[-1]) == []


def test_nothing_outlives_its_caller(run):
    """If the process that waits is killed, the kernel ends the sandbox's."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom onechip import sandbox\nfrom onechip.sandbox import *\n"
    )
    code += (
        "popen = sandbox.subprocess.Popen\ndef told(*a, **k):\n    p = popen(*a, **k)\n    print(p.pid, flush=True)\n"
    )
    code += "    return p\nsandbox.subprocess.Popen = told\n"
    code += f"sandbox.run_behind({run.walls!r}, 'import time; time.sleep(99)', Limits(seconds=99.0))"
    caller = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={"TMPDIR": tempfile.gettempdir()}
    )
    pid = int(caller.stdout.readline())
    deadline = time.monotonic() + 20
    while len(session_of(pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    while session_of(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for left in Path(tempfile.gettempdir()).iterdir():  # whose remover was killed
        subprocess.run(["rm", "-r", str(left)], check=True)


def test_an_outer_process_that_does_not_end_is_killed(run, started, monkeypatch):
    """A caller waits for its sandbox only so long, then kills all its processes."""
    monkeypatch.setattr(sandbox, "AFTER", 0.3)
    monkeypatch.setattr(POPEN, "terminate", lambda self: None)
    assert run("import time; time.sleep(99)", seconds=1.5).stopped == "time"
    deadline = time.monotonic() + 5
    while session_of(started[-1]):
        assert time.monotonic() < deadline
    time.sleep(0.1)


def test_limits_that_the_caller_has(run):
    """A caller whose own limits are lower passes them on, and programs run."""
    code = f"import sys, resource; sys.path.insert(0, {str(ROOT)!r})\nfrom onechip.sandbox import *\n"
    lower = {"NOFILE": 30, "CPU": 3, "FSIZE": 99_999, "NPROC": 5000, "STACK": 1 << 22, "AS": 2 * 10**8}
    code += f"for name, most in {lower}.items():\n"
    code += "    resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (most, most))\n"
    program = "import resource; print(resource.getrlimit(7), resource.getrlimit(9)[0])"
    code += f"print(run_behind({run.walls!r}, {program!r}, Limits(seconds=20.0)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "(30, 30) 200000000" in done.stdout and "error=''" in done.stdout, done


def test_many_at_once(offered):
    """Programs in several threads do not see or stop one another."""
    outcomes = {}

    def one(number):
        code = (
            f"import os, time\nopen('a', 'x').write('{number}')\ntime.sleep(0.3)\nprint(open('a').read(), os.listdir())"
        )
        outcomes[number] = run_python(code if find_walls()[0] else f"print('{number}', ['a'])", Limits(seconds=30.0))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcomes[number].stdout for number in range(4)] == [f"{number} ['a']\n" for number in range(4)]


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture
def looked_for_anew():
    """What the machine offers is looked for in the test, and again after it."""
    find_walls.cache_clear()
    yield
    find_walls.cache_clear()


def check_refusal(reason):
    """run_python refuses in one line with a remedy, and describe_protection says why."""
    with pytest.raises(UserError) as refusal:
        run_python("print(1)")
    for line in (str(refusal.value), describe_protection()):
        assert reason in line and "calculator" in line and "\n" not in line


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sys.platform", "darwin", "needs Linux, this is darwin"),
        ("platform.machine", lambda: "riscv64", "no list of system calls for riscv64"),
        ("build_filter", lambda *_: b"\0" * 8, "seccomp: Invalid argument"),
        ("START", "import sys; sys.exit('broken')", "broken"),
    ],
)
def test_refuses_where_too_little_is_offered(looked_for_anew, monkeypatch, name, value, reason):
    """Another system, another processor, no seccomp, a Python that does not start: one line each, and no program."""
    monkeypatch.setattr(f"onechip.sandbox.{name}", value)
    check_refusal(reason if sys.platform == "linux" or name == "sys.platform" else "needs Linux")


def allowing(*names):
    """build_filter with calls that it refuses: {x86_64's number, aarch64's}."""
    numbers = {
        "socket": (41, 198),
        "open": (2, 56),
        "openat": (257, 56),
        "kill": (62, 129),
        "clone": (56, 220),
        "fork": (57, 220),
    }

    def built(machine, with_files):
        from onechip import seccomp

        column = seccomp.ARCHITECTURES[machine][1]
        start = seccomp._op(seccomp.LOAD, seccomp.NUMBER)
        more = [
            seccomp._op(seccomp.EQUAL, numbers[name][column], 0, 1) + seccomp._op(6, seccomp.ALLOW) for name in names
        ]
        return start + b"".join(more) + real(machine, with_files)

    real = sandbox.build_filter
    return built


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("socket",), "the network can be reached"),
        (("open", "openat"), "files can be read"),
        (("kill",), "signals can be sent"),
        (("clone", "fork"), "processes can be started"),
    ],
)
def test_refuses_where_a_wall_does_not_hold(offered, looked_for_anew, monkeypatch, names, reason):
    """A kernel that takes a filter and does not heed it is found out before a program is run."""
    monkeypatch.setattr(sandbox, "build_filter", allowing(*names))
    check_refusal(reason)


def test_says_what_is_missing(offered, looked_for_anew, monkeypatch):
    """Where a wall cannot be raised, the others stand, and the line names it; a program runs without files then."""
    behind = sandbox.run_behind

    def refusing(walls, code, limits):
        if set(walls) & set(refused):
            raise UserError(f"{walls[0]}: Operation not permitted")
        return behind(walls, code, limits)

    monkeypatch.setattr(sandbox, "run_behind", refusing)
    refused = ("landlock", "namespaces")
    assert "no files at all" in describe_protection() and describe_protection().count("not permitted") == 2
    assert run_python("print(1)").stdout == "1\n"
    assert "PermissionError" in run_python(f"open({__file__!r})").error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", 0),
        ("seconds", float("nan")),
        ("seconds", 1e9),
        ("cpu", 1.5),
        ("memory", -1),
        ("disk", True),
        ("code", "9"),
    ],
)
def test_limits_are_checked(field, value):
    """A limit that is no number above 0 is refused, by name."""
    with pytest.raises(UserError, match=f"^{field}="):
        Limits(**{field: value})


def test_code_is_checked(offered):
    """Code is text, and not longer than the limit."""
    for code in (b"1", None, "#" * 100_001):
        with pytest.raises(UserError, match="^code="):
            run_python(code)
