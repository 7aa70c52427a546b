"""onechip/machine.py: folders, devices, secrets, signals, the commit, and a quiet libtpu."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import types

import pytest
from conftest import ROOT
from fakes import pretend_notebook

from onechip import machine
from onechip.errors import SafeStream, print_one_line_errors
from onechip.machine import (
    deferred_interrupt,
    git_commit,
    give_back_machine,
    has_tpu,
    home,
    keep_compiled,
    open_tensorboard,
    prepare,
    quiet_jax,
    read_secret,
)

# ----------------------------------------------------------------------------------------------------------------------
# Secrets

CANARY = "hf_canary_0123456789"


def test_a_secret_comes_from_the_environment_first(monkeypatch, capsys):
    """The environment wins, and Colab, which would ask the browser, is not even asked."""
    pretend_notebook(monkeypatch, lambda name: pytest.fail("Colab was asked"))
    monkeypatch.setenv("SECRET_X", CANARY)
    assert read_secret("SECRET_X") == CANARY
    assert CANARY not in "".join(capsys.readouterr())


def test_a_secret_comes_from_colab_where_the_environment_has_none(monkeypatch, capsys):
    """An unset or empty variable leads to Colab's secret of the same name; its value is never printed."""
    asked = []
    pretend_notebook(monkeypatch, lambda name: asked.append(name) or CANARY)
    for value in (None, ""):
        monkeypatch.delenv("SECRET_X", raising=False)
        if value is not None:
            monkeypatch.setenv("SECRET_X", value)
        assert read_secret("SECRET_X") == CANARY
    assert asked == ["SECRET_X"] * 2
    assert CANARY not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "name, reason",
    [
        ("SecretNotFoundError", "not among"),
        ("NotebookAccessError", "no access"),
        ("TimeoutException", "in time"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_each_failure_of_colabs_secrets_is_reported_in_a_line(monkeypatch, capsys, name, reason):
    """Whatever userdata.get raises, the answer is None and one line says why, without the exception's own text."""

    def get(key):
        raise type(name, (Exception,), {})(f"{key} {CANARY}")

    pretend_notebook(monkeypatch, get)
    monkeypatch.delenv("SECRET_X", raising=False)
    assert read_secret("SECRET_X") is None
    out, err = capsys.readouterr()
    assert reason in out and "SECRET_X" in out and out.count("\n") == 1 and err == ""
    assert CANARY not in out


def test_a_missing_secret_is_none_and_silent_outside_colab(monkeypatch, capsys):
    """A script asks nobody, a kernel without google.colab neither, and an empty Colab secret is none."""
    monkeypatch.delenv("SECRET_X", raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", None)  # importing it fails
    assert read_secret("SECRET_X") is None
    pretend_notebook(monkeypatch, lambda name: "")
    assert read_secret("SECRET_X") is None
    pretend_notebook(monkeypatch, lambda name: pytest.fail("a script asked Colab"))
    monkeypatch.delitem(sys.modules, "ipykernel")
    assert read_secret("SECRET_X") is None
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------------------
# Signals

HANDLED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def handlers():
    """{signal: handler}, the usual ones, however pytest itself was started; a test must leave them in place."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    left = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert left == usual, "a handler was left behind"


@pytest.mark.parametrize("first", HANDLED)
def test_the_first_interrupt_is_noted_and_the_second_is_raised(handlers, first):
    """One Ctrl-C asks for a clean end, two break off; afterwards the old handlers are back."""
    with deferred_interrupt() as stop:
        assert not stop.requested
        signal.raise_signal(first)
        assert stop.requested and not stop.insisted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested and stop.insisted
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers
    with pytest.raises(RuntimeError), deferred_interrupt() as stop:
        assert not stop.requested, "a new one starts from nothing"
        raise RuntimeError


@pytest.mark.parametrize("first", HANDLED)
def test_raised_at_once_an_interrupt_is_noted_as_well(handlers, first):
    """For code that only an exception ends, and that asks afterwards what it was."""
    with deferred_interrupt(raise_at_once=True) as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(first)
        assert stop.requested and not stop.insisted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert stop.insisted


@pytest.mark.parametrize("first", HANDLED)
def test_a_repeated_hang_up_does_not_insist(handlers, first):
    """A closing terminal sends SIGHUP from the kernel and from the shell: the second must not break off the save."""
    with deferred_interrupt() as stop:
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
        assert stop.requested and not stop.insisted


def test_under_nohup_a_hang_up_stays_ignored(handlers):
    """A run that is started with nohup is meant to outlive the terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with deferred_interrupt() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_deferred_interrupt_does_nothing_in_another_thread(handlers):
    """signal.signal raises outside the main thread, where a sweep's agent calls train: there it must do nothing."""
    seen = []

    def work():
        with deferred_interrupt() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, handlers[signal.SIGINT])]


WORKING = """
import os, signal, sys, time
from onechip.errors import print_safely, say
from onechip.machine import deferred_interrupt
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # however pytest itself was started
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first terminal that a new session opens is its own
print_safely()
with deferred_interrupt() as stop:
    say("working")
    until = time.monotonic() + 60
    while not stop.requested and time.monotonic() < until:
        time.sleep(0.01)
    for i in range(100):
        say(i)
        print(i, file=sys.stderr)
open(sys.argv[1], "w").write(f"{stop.requested} {stop.insisted}")
"""


def test_a_closed_terminal_asks_for_a_clean_end(tmp_path):
    """A process whose terminal window is closed notes it, can print, and ends as it meant to."""
    ours, its = os.openpty()
    command = [sys.executable, "-c", WORKING, str(tmp_path / "done")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True)
    os.close(its)
    assert os.read(ours, 7) == b"working"
    os.close(ours)
    assert process.wait(60) == 0 and (tmp_path / "done").read_text() == "True False"


# ----------------------------------------------------------------------------------------------------------------------
# Where things are and what they are


def test_home_is_where_the_environment_says(monkeypatch):
    """ONECHIP_HOME moves everything that is shared between runs; empty counts as unset."""
    monkeypatch.setenv("ONECHIP_HOME", "/somewhere")
    assert str(home()) == "/somewhere"
    monkeypatch.setenv("ONECHIP_HOME", "")
    assert home().parts[-2:] == (".cache", "onechip")


def test_a_home_that_takes_nothing_is_refused_first(tmp_path):
    """ONECHIP_HOME that is a file: one line before anything is prepared, in every notebook that prepares."""
    (tmp_path / "home").touch()
    command = [sys.executable, "-c", "from onechip.machine import prepare; prepare()"]
    environment = os.environ | {"ONECHIP_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    remedy = "set ONECHIP_HOME to a folder that can"
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf"error: {tmp_path}/home: cannot be written to \(.*\); {remedy}\n", done.stderr)


def test_what_killed_processes_left_at_home_is_swept(tmp_path, monkeypatch):
    """A tokenizer, a shard and a note that were half-written an hour ago go at the next start."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "keep_compiled", lambda: None)
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    for name in ("excepthook", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    left = (
        "tokenizers/stdlib/.tokenizer.json.abcd1234.part",
        "stdlib/.shard_00001.parquet.abcd1234.part",
        "a/.b.a1b2c3d4.part",
    )
    for name in left:
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "stdlib" / "shard_00000.parquet").touch()
    prepare()
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] == ["shard_00000.parquet"]
    assert not any((tmp_path / name).exists() for name in left)


def test_git_commit_marks_changed_files(tmp_path, monkeypatch):
    """A run's record names the commit, with a + once any tracked file is changed; None outside a checkout."""
    (tmp_path / "onechip").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "onechip" / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None

    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    for name in ("notebook.py", "onechip/machine.py"):
        (tmp_path / name).write_text("1\n")
        git("add", name)
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("a run's own output is no change\n")
    assert git_commit() == commit and len(commit) == 40
    for name in ("notebook.py", "onechip/machine.py"):
        (tmp_path / name).write_text("2\n")
        assert git_commit() == commit + "+"
        (tmp_path / name).write_text("1\n")


def test_git_commit_is_none_without_git(monkeypatch):
    """A machine without git can train all the same."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert git_commit() is None


@pytest.mark.parametrize(
    "vendor, device, found", [("0x1ae0", "0x006f", True), ("0x1ae0", "0x0042", False), ("0x8086", "0x006f", False)]
)
def test_a_tpu_is_known_by_its_pci_id(tmp_path, monkeypatch, vendor, device, found):
    """Google's vendor id alone is not enough (its network card has it too), nor the device's number alone."""
    (tmp_path / "vendor").write_text(vendor + "\n")
    (tmp_path / "device").write_text(device + "\n")
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: [str(tmp_path / "vendor")])
    assert has_tpu() is found


# ----------------------------------------------------------------------------------------------------------------------
# What is prepared before JAX is used

NOTED = (
    "TPU_SKIP_MDS_QUERY", "TPU_LOG_DIR", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES",
    "JAX_PLATFORMS",
)  # fmt: skip


def run_quiet_jax(monkeypatch, tpu, gpu, **given):
    """The six variables after quiet_jax() on a machine with these devices; jax's own configuration is kept."""
    for name in NOTED:
        monkeypatch.setenv(name, "x")  # so that what is set below is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "has_tpu", lambda: tpu)
    monkeypatch.setattr(machine, "GPU_FILES", (__file__,) if gpu else ("/nonexistent",))
    updates = []
    jax = types.SimpleNamespace(config=types.SimpleNamespace(update=lambda *pair: updates.append(pair)))
    monkeypatch.setitem(sys.modules, "jax", jax)
    quiet_jax()
    return {name: os.environ.get(name) for name in NOTED}, updates


def test_quiet_jax_sends_jax_to_the_cpu_where_there_is_nothing_else(monkeypatch):
    """Without TPU and GPU, libtpu is kept quiet, and a jax that is imported already is configured as well."""
    found, updates = run_quiet_jax(monkeypatch, tpu=False, gpu=False)
    assert found == dict(zip(NOTED, ("1", "disabled", "1", "v5litepod-1", "localhost", "cpu"), strict=True))
    assert updates == [("jax_platforms", "cpu")]


def test_quiet_jax_leaves_an_accelerator_alone(monkeypatch):
    """On a TPU nothing is set; on a GPU jax chooses its platform itself."""
    assert run_quiet_jax(monkeypatch, tpu=True, gpu=False) == (dict.fromkeys(NOTED), [])
    found, updates = run_quiet_jax(monkeypatch, tpu=False, gpu=True)
    assert found["JAX_PLATFORMS"] is None and found["TPU_SKIP_MDS_QUERY"] == "1" and updates == []


def test_quiet_jax_leaves_what_the_user_set(monkeypatch):
    """A variable that is set already is the user's word."""
    found, updates = run_quiet_jax(monkeypatch, tpu=False, gpu=False, JAX_PLATFORMS="cuda", TPU_LOG_DIR="/var/log")
    assert found["JAX_PLATFORMS"] == "cuda" and found["TPU_LOG_DIR"] == "/var/log"
    assert updates == [("jax_platforms", "cuda")]


def test_importing_onechip_is_enough_for_silence():
    """A fresh process that imports onechip, then jax, prints nothing on stderr when it looks for its devices."""
    code = "import onechip, jax, json; print(json.dumps([d.platform for d in jax.devices()]))"
    environment = {name: value for name, value in os.environ.items() if name not in NOTED}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)
    assert done.stderr == ""


def test_compiled_programs_are_kept_under_home_unless_a_user_chose_a_place(monkeypatch):
    """A second start finds the first one's programs; a cache folder that was set already stays the one in use."""
    import jax

    before = jax.config.jax_compilation_cache_dir
    try:
        for chosen, used in ((None, str(home() / "compiled")), ("elsewhere", "elsewhere")):
            jax.config.update("jax_compilation_cache_dir", chosen)
            keep_compiled()
            assert jax.config.jax_compilation_cache_dir == used
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_run_cell_prepares_everything_by_one_call(monkeypatch):
    """Errors in one line, safe streams, memory and compiled programs kept; in a notebook only the last two."""
    done = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: done.append("memory"))
    monkeypatch.setattr(machine, "keep_compiled", lambda: done.append("compiled"))
    for name in ("excepthook", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    before = sys.excepthook, sys.stdout, sys.stderr
    with monkeypatch.context() as patch:
        pretend_notebook(patch)
        prepare()
    assert (sys.excepthook, sys.stdout, sys.stderr) == before and done == ["memory", "compiled"]
    prepare()
    assert sys.excepthook is print_one_line_errors and done == ["memory", "compiled"] * 2
    assert isinstance(sys.stdout, SafeStream) and isinstance(sys.stderr, SafeStream)


# ----------------------------------------------------------------------------------------------------------------------
# Colab


def test_a_machine_is_only_given_back_on_colab(monkeypatch, capsys):
    """Anywhere else there is nothing to give back, and not a word about it."""
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    give_back_machine("an address")
    assert capsys.readouterr().out == ""


def test_tensorboard_is_shown_on_colab_only(monkeypatch, capsys, tmp_path):
    """Elsewhere, and where it is not installed, a line says how to see the curves; a folder's name is quoted."""
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    open_tensorboard("runs/x")
    assert capsys.readouterr().out == "curves and profile: uv run tensorboard --logdir runs/x\n"
    started = []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    notebook = types.SimpleNamespace(start=started.append)
    monkeypatch.setitem(sys.modules, "tensorboard", types.SimpleNamespace(notebook=notebook))
    open_tensorboard("my runs/x")
    assert started == ["--logdir 'my runs/x'"] and capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # importing it fails
    open_tensorboard("runs/x")
    said = capsys.readouterr().out
    assert "runs/x" in said and "not installed" in said and said.count("\n") == 1
