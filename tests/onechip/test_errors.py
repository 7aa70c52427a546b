"""onechip/errors.py: bad input in one line, and printing that never ends a run."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from fakes import pretend_notebook

from onechip.errors import (
    NonFiniteLoss,
    SafeStream,
    UserError,
    first_line,
    print_one_line_errors,
    print_safely,
    report_in_one_line,
    require,
    say,
    stop_here,
)


def test_errors_of_a_script_are_one_line_or_a_traceback(capsys):
    """Bad input is reported in one line on stderr; a bug keeps its traceback, which is what its reporter needs."""
    for kind in (UserError, NonFiniteLoss):
        print_one_line_errors(kind, kind("depth=0: must be more"), None)
        assert capsys.readouterr() == ("", "error: depth=0: must be more\n")
    try:
        raise RuntimeError("a bug")
    except RuntimeError as error:
        print_one_line_errors(type(error), error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err


def test_the_hook_is_set_in_a_script_and_never_in_a_notebook(monkeypatch):
    """A kernel's excepthook is not ours to change; a second call changes nothing."""
    hook = lambda *args: None
    monkeypatch.setattr(sys, "excepthook", hook)
    with monkeypatch.context() as patch:
        pretend_notebook(patch)
        report_in_one_line()
        assert sys.excepthook is hook
    for _ in range(2):
        report_in_one_line()
        assert sys.excepthook is print_one_line_errors


def test_require_names_field_value_and_remedy():
    """A value of any length, of several lines or too long for Python to write, still gives one short line."""
    require(True, "depth", 0, "must be more")
    values = {0: "0", "a\nb": "'a\\nb'", "x" * 900: "'xxx", 10**9999: "a number of thousands of digits"}
    for value, shown in values.items():
        with pytest.raises(UserError) as raised:
            require(False, "depth", value, "must be more")
        message = str(raised.value)
        assert message.startswith(f"depth={shown}") and message.endswith(": must be more")
        assert "\n" not in message and len(message) < 250


def test_the_first_line_of_an_error_is_short_and_never_empty():
    """Some libraries' messages are pages, others have none."""
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(ValueError("\n one\n")) == "one"
    assert first_line(ValueError()) == "ValueError" and len(first_line(ValueError("x" * 999))) == 200


def test_what_is_done_ends_without_an_error():
    """A script ends with status 0; a notebook, which asks the exception for its traceback, shows none."""
    with pytest.raises(SystemExit) as ended:
        stop_here()
    assert not ended.value.code and ended.value._render_traceback_() == []


# ----------------------------------------------------------------------------------------------------------------------
# Printing, in processes whose terminal is not what it should be

SAYING = """
import pathlib, sys, warnings
from onechip.errors import print_one_line_errors, print_safely, say
if {safely}:
    print_safely()
say("first naïve 数据")
sys.stdin.readline()
for i in range(3000):
    say(f"line {{i}}")
if {safely}:
    for i in range(3000):
        print("naïve 数据", i)
        print("naïve 数据", i, file=sys.stderr)
    warnings.warn("数据")
    sys.stdout.isatty(), sys.stderr.isatty(), sys.stderr.flush()
pathlib.Path({done!r}).touch()
"""


def start_saying(folder, safely, prefix="", **pipes):
    """A process that says and prints, started by a shell that may redirect it first: (process, file it leaves)."""
    done = folder / "done"
    (folder / "saying.py").write_text(SAYING.format(safely=safely, done=str(done)), encoding="utf-8")
    command = f"exec {sys.executable} {folder / 'saying.py'} {prefix}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"} | pipes.pop("env", {})
    return subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, env=environment, **pipes), done


def finish(process):
    """(exit status, what came out of its pipes) of a process that may continue now."""
    out, err = process.communicate(b"\n", timeout=60)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.mark.parametrize("safely", [False, True])
@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_an_ascii_terminal_shows_escapes(tmp_path, safely, env):
    """What the terminal cannot show is written as an escape; nothing is raised, by print() neither."""
    process, done = start_saying(tmp_path, safely, env=env, **PIPES)
    code, out, err = finish(process)
    assert code == 0 and done.exists() and out.startswith("first na\\xefve \\u6570\\u636e\nline 0\n")
    assert not safely or ("na\\xefve \\u6570\\u636e 2999" in out and "na\\xefve \\u6570\\u636e 2999" in err)


FULL, CLOSED = "/dev/full", "&-"


@pytest.mark.parametrize(
    "redirected, safely",
    [
        (f">{CLOSED}", False),
        (f">{FULL}", False),
        (f">{CLOSED}", True),
        (f">{FULL}", True),
        (f"2>{CLOSED}", True),
        (f"2>{FULL}", True),
        (f">{CLOSED} 2>{CLOSED}", True),
        (f">{FULL} 2>{FULL}", True),
    ],
)
def test_a_stream_that_is_closed_or_full_ends_nothing(tmp_path, redirected, safely):
    """Exit status 0, all steps done, no traceback; where only stdout is full, one line on stderr says so."""
    process, done = start_saying(tmp_path, safely, redirected, **PIPES)
    code, out, err = finish(process)
    assert code == 0 and done.exists() and "Traceback" not in err and "Exception" not in err
    assert err.count("stdout failed") == (redirected == f">{FULL}")
    assert ("line 2999\n" in out) == redirected.startswith("2>")


@pytest.mark.parametrize("safely", [False, True])
def test_a_reader_that_leaves_ends_nothing(tmp_path, safely):
    """`| head -1` has what it wants after the first line; the rest is dropped, and said once."""
    process, done = start_saying(tmp_path, safely, **PIPES)
    assert process.stdout.readline().startswith(b"first")
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0 and done.exists()
    assert "Exception" not in err and err.count("stdout failed ([Errno 32] Broken pipe); continuing without it\n") == 1


@pytest.mark.parametrize("safely", [False, True])
def test_a_terminal_that_is_closed_ends_nothing(tmp_path, safely):
    """Both streams are a terminal whose window is closed: each write fails with an I/O error from then on."""
    ours, its = os.openpty()
    process, done = start_saying(tmp_path, safely, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    assert os.read(ours, 5) == b"first"
    os.close(ours)
    assert finish(process)[0] == 0 and done.exists()


FAILING = """
import sys
from onechip.errors import UserError, print_safely, report_in_one_line
report_in_one_line()
{safely}
raise UserError("depth=0: must be more, 数据")
"""


@pytest.mark.parametrize("safely", ["", "print_safely()"])
@pytest.mark.parametrize("place", ["", "2>&-", "2> /dev/full"])
def test_an_error_is_reported_wherever_there_is_room(safely, place):
    """On stderr, or on stdout where stderr was closed; the exit status says it in any case."""
    code = FAILING.format(safely=safely)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = ["sh", "-c", f'exec "$0" -c "$1" {place}', sys.executable, code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    line = "error: depth=0: must be more, \\u6570\\u636e\n"
    found = {"": ("", line), "2>&-": (line, ""), "2> /dev/full": ("", "")}[place]
    assert done.returncode == 1 and (done.stdout, done.stderr) == found


def test_say_prints_a_line_at_once(monkeypatch):
    """Colab holds back what is not flushed; a stream that the program itself closed is no reason to fail."""
    flushed = []
    stream = io.StringIO()
    stream.flush = lambda: flushed.append(stream.getvalue())
    monkeypatch.setattr(sys, "stdout", stream)
    say("text")
    assert flushed == ["text\n"]
    stream.close()
    say("more")


def test_a_safe_stream_is_the_stream_otherwise(monkeypatch):
    """Whatever else a library asks of it, the stream itself answers; it is wrapped once, and never in a kernel."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    safe = SafeStream(stream)
    assert safe.write("naïve 数\n") == 8 and safe.encoding == "latin-1" and not safe.isatty()
    safe.flush()
    assert stream.buffer.getvalue() == "naïve \\u6570\n".encode("latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    with monkeypatch.context() as patch:
        pretend_notebook(patch)
        print_safely()
        assert sys.stdout is stream
    print_safely()
    once = sys.stdout, sys.stderr
    print_safely()
    assert (sys.stdout, sys.stderr) == once and all(isinstance(s, SafeStream) for s in once)
    assert once[1].isatty() is False and once[1].write("x") == 1
