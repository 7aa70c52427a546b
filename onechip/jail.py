"""The processes of a sandbox, as onechip.sandbox starts them; they import Python's standard library and walls only.

There are three. The outer one makes the namespaces, and waits for the others. The middle one is the first in its
process namespace; it reports how the inner one ended. The inner one raises the walls, tries them, and runs the
program: if one cannot be raised or does not hold, it says so, and the program is not run.
"""

import ast  # noqa: F401  (a traceback needs it, and a program may have left no descriptor to import it with)
import functools
import json
import linecache
import os
import resource
import signal
import sys
import traceback
import types

from onechip.walls import call_kernel, check_walls, die_with_parent, enter_namespaces, raise_walls, set_limit


def import_all(modules):
    """Imports modules by name, while files can still be opened."""
    for name in modules:
        __import__(name)


def traceback_of(error):
    """An exception as Python prints it, without this file's frame, its middle left out if it is long."""
    try:
        if error.__traceback__:
            error.__traceback__ = error.__traceback__.tb_next
        if isinstance(error, MemoryError):
            traceback.clear_frames(error.__traceback__)
        text = "".join(traceback.format_exception(error))
    except BaseException:
        text = f"{type(error).__name__}\n"
    return text if len(text) < 4000 else f"{text[:1500]}\n...\n{text[-1500:]}"


def run_program(code, say):
    """Runs a program as Python's main module. say: gets in one word how it ended."""
    write, leave = os.write, os._exit  # which a program may replace
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    linecache.cache["<program>"] = (len(code), None, code.splitlines(True), "<program>")
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), main.__dict__)
    except BaseException as error:
        if isinstance(error, MemoryError):
            main.__dict__.clear()  # makes room for the report
        say(b"memory" if isinstance(error, MemoryError) else b"error")
        write(2, traceback_of(error).encode("utf-8", "backslashreplace"))
        leave(1)
    say(b"finished")
    leave(0)


def inner_process(request, pipe):
    """The process that runs the program; pipe: the descriptor by which it says how far it came."""
    try:
        die_with_parent()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        import_all(request["modules"])
        code, memory = request["code"], request["memory"]
        raise_walls(request)
        check_walls(request["canary"])
        set_limit("AS", memory, memory)
        os.write(pipe, b"ready ")  # from here on nothing that is said is taken for a refusal
    except BaseException as error:
        os.write(pipe, f"{error}".encode()[:500])
        os._exit(1)
    run_program(code, functools.partial(os.write, pipe))


def middle_process(request, report):
    """The parent of the program's process: writes how it ended to the descriptor report, as JSON, once it has."""
    die_with_parent()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.close(report)
        inner_process(request, write)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    said = os.read(read, 500).decode(errors="replace")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(report, json.dumps({"status": status, "said": said, "cpu": used.ru_utime + used.ru_stime}).encode())
    os._exit(0)


def outer_process(request, report):
    """The process that onechip.sandbox started: ends with it, or after its time, whatever happens."""
    die_with_parent()
    if os.getppid() != request["parent"]:
        os._exit(1)
    call_kernel("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: the inner process is waited for too
    signal.alarm(int(request["seconds"]) + 10)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # should memory run out, this is what to kill
    except OSError:
        pass
    if "namespaces" in request["walls"]:
        try:
            enter_namespaces()
        except OSError as error:
            os.write(report, json.dumps({"status": 0, "said": f"namespaces: {error.strerror}"}).encode())
            os._exit(0)
    child = os.fork()
    if not child:
        middle_process(request, report)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGKILL))
    try:
        while True:
            os.wait()
    except ChildProcessError:
        os._exit(0)


def enter_jail(report):
    """Reads the request, JSON, from standard input. report: the descriptor to tell the end to."""
    with open(0, "rb", closefd=False) as file:
        request = json.loads(file.read())
    os.environ.clear()
    sys.argv, sys.orig_argv = [""], []
    outer_process(request, report)
