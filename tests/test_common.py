"""common.py: settings, secrets, one-line errors, whole files, a deferred interrupt, and a quiet libtpu."""

import dataclasses
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import types

import pytest
from conftest import ROOT

from onechip.card import describe_result
from onechip.errors import UserError, print_one_line_errors
from onechip.files import atomic_write
from onechip.machine import (
    deferred_interrupt,
    git_commit,
    give_back_machine,
    has_tpu,
    home,
    keep_compiled,
    quiet_jax,
    read_secret,
)
from onechip.settings import parse_settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dials:
    """What can be turned."""

    depth: int = setting(3, "how deep")
    rate: float = setting(0.5, "how fast, in % of all")
    title: str = setting("", "what it is called")
    loud: bool = setting(False, "whether it is heard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switches:
    """What can be switched."""

    engine: str = setting("steam", "what drives it")


@pytest.fixture
def command_line(monkeypatch):
    """Sets sys.argv, and puts the excepthook back that parse_settings replaces."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return lambda *words: monkeypatch.setattr(sys, "argv", ["script.py", *words])


@pytest.fixture
def notebook(monkeypatch):
    """Makes common believe that it runs in a kernel: returns a function that adds Colab's userdata, with `get`."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: object()
    monkeypatch.setitem(sys.modules, "IPython", ipython)

    def add_colab(get):
        userdata = types.ModuleType("google.colab.userdata")
        userdata.get = get
        colab = types.ModuleType("google.colab")
        colab.userdata = userdata
        google = types.ModuleType("google")
        google.colab = colab
        for module in (google, colab, userdata):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return add_colab


# ---------------------------------------------------------------------------------------------------------------
# Files


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_atomic_write_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    """A file is written into a folder that may not be there yet, replaces the old one, and is alone afterwards."""
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with atomic_write(path) as part:
            assert part.parent.parent == path.parent, "a rename is atomic only within one file system"
            part.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert listing(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_atomic_write_keeps_the_old_file_when_the_writer_fails(tmp_path, error):
    """Whatever is raised in the middle of writing passes through; the old content stays, and nothing beside it."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught:
        with atomic_write(path) as part:
            part.write_text("half")
            raise error
    assert caught.value is error
    assert path.read_text() == "old" and listing(tmp_path) == ["file.txt"]


def test_atomic_write_of_a_folder_is_all_or_nothing(tmp_path):
    """A folder appears under its name with all its files, or not at all and without a trace."""
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError):
        with atomic_write(path) as part:
            part.mkdir()
            (part / "a").write_text("1")
            raise RuntimeError
    assert listing(tmp_path) == []
    with atomic_write(path) as part:
        part.mkdir()
        (part / "a").write_text("1")
        (part / "deeper").mkdir()
        (part / "deeper" / "b").write_text("2")
        assert not path.exists()
    assert listing(tmp_path) == ["folder", "folder/a", "folder/deeper", "folder/deeper/b"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_atomic_write_tells_a_full_disk_in_one_line(tmp_path, number):
    """A full disk or quota is a UserError of one line with the path; the old file stays whole."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UserError, match="disk is full") as caught:
        with atomic_write(path) as part:
            part.write_text("half")
            raise OSError(number, os.strerror(number))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == "old" and listing(tmp_path) == ["file.txt"]


def test_atomic_write_tells_a_disk_that_fills_up_at_the_fsync(tmp_path, monkeypatch):
    """Delayed allocation reports a full disk at fsync, after the last write: that is told and cleaned up as well."""

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        with atomic_write(tmp_path / "file.txt") as part:
            part.write_text("whole")
    assert listing(tmp_path) == []


def record_disk_calls(monkeypatch):
    """The order of fsyncs and renames, as ("fsync", inode) and ("rename", inode of what is renamed)."""
    calls, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(fd):
        calls.append(("fsync", os.fstat(fd).st_ino))
        real_fsync(fd)

    def replace(source, target):
        calls.append(("rename", os.stat(source).st_ino))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return calls


def test_atomic_write_forces_a_file_to_disk_before_its_name(tmp_path, monkeypatch):
    """After a power cut a name must never stand for an empty file: fsync the file, rename, fsync the folder."""
    calls = record_disk_calls(monkeypatch)
    with atomic_write(tmp_path / "file.txt") as part:
        part.write_text("text")
    file, folder = os.stat(tmp_path / "file.txt").st_ino, os.stat(tmp_path).st_ino
    assert calls == [("fsync", file), ("rename", file), ("fsync", folder)]


def test_atomic_write_forces_a_folder_and_its_entries_to_disk_before_its_name(tmp_path, monkeypatch):
    """A folder's list of names is data of its own: it and all below it are fsynced before the rename."""
    calls = record_disk_calls(monkeypatch)
    path = tmp_path / "folder"
    with atomic_write(path) as part:
        (part / "deeper").mkdir(parents=True)
        (part / "a").write_text("1")
        (part / "deeper" / "b").write_text("2")
    inode = lambda place: os.stat(place).st_ino
    rename = calls.index(("rename", inode(path)))
    synced = {number for kind, number in calls[:rename] if kind == "fsync"}
    for name in ("a", "deeper/b", "deeper", "."):
        assert inode(path / name) in synced, f"{name} is not on disk when the folder gets its name"
    assert calls[-1] == ("fsync", inode(tmp_path)) and rename == len(calls) - 2


# ---------------------------------------------------------------------------------------------------------------
# Secrets

CANARY = "hf_canary_0123456789"


def test_a_secret_comes_from_the_environment_first(monkeypatch, notebook, capsys):
    """The environment wins, and Colab, which would ask the browser, is not even asked."""
    notebook(lambda name: pytest.fail("Colab was asked"))
    monkeypatch.setenv("SECRET_X", CANARY)
    assert read_secret("SECRET_X") == CANARY
    assert CANARY not in "".join(capsys.readouterr())


def test_a_secret_comes_from_colab_where_the_environment_has_none(monkeypatch, notebook, capsys):
    """An unset or empty variable leads to Colab's secret of the same name; its value is never printed."""
    asked = []
    notebook(lambda name: asked.append(name) or CANARY)
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
def test_each_failure_of_colabs_secrets_is_told_in_a_line(monkeypatch, notebook, capsys, name, reason):
    """Whatever userdata.get raises, the answer is None and one line says why, without the exception's own text."""

    def get(key):
        raise type(name, (Exception,), {})(f"{key} {CANARY}")

    notebook(get)
    monkeypatch.delenv("SECRET_X", raising=False)
    assert read_secret("SECRET_X") is None
    out, err = capsys.readouterr()
    assert reason in out and "SECRET_X" in out and out.count("\n") == 1 and err == ""
    assert CANARY not in out


def test_a_missing_secret_is_none_and_silent_outside_colab(monkeypatch, notebook, capsys):
    """A script asks nobody, a kernel without google.colab neither, and an empty Colab secret is none."""
    monkeypatch.delenv("SECRET_X", raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", None)  # importing it fails
    assert read_secret("SECRET_X") is None
    notebook(lambda name: "")
    assert read_secret("SECRET_X") is None
    notebook(lambda name: pytest.fail("a script asked Colab"))
    monkeypatch.delitem(sys.modules, "ipykernel")
    assert read_secret("SECRET_X") is None
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------
# Settings


def test_settings_from_a_command_line_have_their_fields_types(command_line):
    """Only what was given comes back, one dict per class, converted to the field's type; both spellings of a value."""
    command_line("--depth", "7", "--rate=1e-3", "--loud", "true", "--engine", "diesel")
    dials, switches = parse_settings(Dials, Switches)
    assert dials == {"depth": 7, "rate": 1e-3, "loud": True} and switches == {"engine": "diesel"}
    assert type(dials["depth"]) is int and type(dials["rate"]) is float and dials["loud"] is True
    command_line()
    assert parse_settings(Dials, Switches) == [{}, {}]


@pytest.mark.parametrize("word, value", [("true", True), ("1", True), ("Yes", True), ("FALSE", False), ("0", False)])
def test_a_bool_setting_is_read_as_a_word(command_line, word, value):
    """bool("false") is True: words are needed, and False must come out as False."""
    command_line("--loud", word)
    assert parse_settings(Dials)[0] == {"loud": value}


@pytest.mark.parametrize(
    "words, named",
    [
        (["--depht", "4"], ["--depht", "--depth"]),
        (["--engin=4"], ["--engin", "--engine"]),
        (["--dep", "4"], ["--dep"]),  # no abbreviations: a later field could make them mean something else
        (["--depth", "four"], ["--depth", "int", "'four'"]),
        (["--depth", "4.5"], ["--depth", "int", "'4.5'"]),
        (["--rate", "fast"], ["--rate", "float", "'fast'"]),
        (["--loud", "perhaps"], ["--loud", "bool", "'perhaps'"]),
        (["--depth"], ["--depth"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_helps(command_line, words, named):
    """A wrong name, type or missing value is a UserError of one line with what was given, and the nearest name."""
    command_line(*words)
    with pytest.raises(UserError) as caught:
        parse_settings(Dials, Switches)
    message = str(caught.value)
    assert "\n" not in message and "--help" in message and "_parse" not in message
    for name in named:
        assert name in message


def test_overrides_come_before_the_command_line(command_line):
    """In a script the command line has the last word over the OVERRIDES text."""
    command_line("--depth", "5")
    assert parse_settings(Dials, overrides="--depth 4 --title x")[0] == {"depth": 5, "title": "x"}


def test_in_a_notebook_only_the_overrides_count(command_line, notebook):
    """A kernel's own command line (-f connection.json) is not the user's, and its excepthook is not ours to change."""
    hook = sys.excepthook
    command_line("-f", "/tmp/kernel.json", "--depth", "5")
    assert parse_settings(Dials, overrides="--title x")[0] == {"title": "x"}
    assert sys.excepthook is hook
    with pytest.raises(UserError, match="--depth"):
        parse_settings(Dials, overrides="--dept 4")


def test_help_shows_every_setting_with_its_default(command_line, capsys):
    """--help lists name, meaning and default of each field, % signs included, and ends the program with success."""
    command_line("--help")
    with pytest.raises(SystemExit) as ended:
        parse_settings(Dials, Switches)
    assert not ended.value.code
    shown = " ".join(capsys.readouterr().out.split())
    for cls in (Dials, Switches):
        assert cls.__doc__.strip() in shown
        for field in dataclasses.fields(cls):
            assert f"--{field.name}" in shown
            assert f"{field.metadata['help']} (default: {field.default!r})" in shown


def test_errors_of_a_script_are_one_line_or_a_traceback(capsys):
    """Bad input is told in one line on stderr; a bug keeps its traceback, which is what its reporter needs."""
    print_one_line_errors(UserError, UserError("depth=0: must be more"), None)
    assert capsys.readouterr() == ("", "error: depth=0: must be more\n")
    try:
        raise RuntimeError("a bug")
    except RuntimeError as error:
        print_one_line_errors(type(error), error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# Interrupts


def test_the_first_interrupt_is_noted_and_the_second_is_raised():
    """One Ctrl-C asks for a clean end, two break off; afterwards the old handler is back."""
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RuntimeError), deferred_interrupt() as stop:
        assert not stop.requested, "a new one begins afresh"
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_deferred_interrupt_does_nothing_in_another_thread():
    """signal.signal raises outside the main thread, where a sweep's agent calls train: there it must do nothing."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with deferred_interrupt() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


# ---------------------------------------------------------------------------------------------------------------
# Where things are and what they are


def test_home_is_where_the_environment_says(monkeypatch):
    """ONECHIP_HOME moves everything that is shared between runs; empty counts as unset."""
    monkeypatch.setenv("ONECHIP_HOME", "/somewhere")
    assert str(home()) == "/somewhere"
    monkeypatch.setenv("ONECHIP_HOME", "")
    assert home().parts[-2:] == (".cache", "onechip")


def test_git_commit_marks_changed_files(tmp_path, monkeypatch):
    """A run's record names the commit, with + behind it once a tracked file is changed; None outside a checkout."""
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None

    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "common.py").write_text("1\n")
    git("add", "common.py")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("a run's own output is no change\n")
    assert git_commit() == commit and len(commit) == 40
    (tmp_path / "common.py").write_text("2\n")
    assert git_commit() == commit + "+"


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
    monkeypatch.setattr(common.glob, "glob", lambda pattern: [str(tmp_path / "vendor")])
    assert has_tpu() is found


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
    monkeypatch.setattr(common, "has_tpu", lambda: tpu)
    monkeypatch.setattr(common, "GPU_FILES", (__file__,) if gpu else ("/nonexistent",))
    updates = []
    jax = types.SimpleNamespace(config=types.SimpleNamespace(update=lambda *pair: updates.append(pair)))
    monkeypatch.setitem(sys.modules, "jax", jax)
    quiet_jax()
    return {name: os.environ.get(name) for name in NOTED}, updates


def test_quiet_jax_sends_jax_to_the_cpu_where_there_is_nothing_else(monkeypatch):
    """Without TPU and GPU, libtpu is kept quiet, and a jax that is imported already is told as well."""
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


def test_importing_common_is_enough_for_silence():
    """A fresh process that imports common, then jax, prints nothing on stderr when it looks for its devices."""
    code = "import common, jax, json; print(json.dumps([d.platform for d in jax.devices()]))"
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


def test_a_machine_is_only_given_back_on_colab(monkeypatch, capsys):
    """Anywhere else there is nothing to give back, and not a word about it."""
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    give_back_machine("an address")
    assert capsys.readouterr().out == ""


def test_what_is_left_in_a_run_is_what_is_there(tmp_path):
    """The last line names files and folders as they are, of this start or an earlier one; event files once."""
    for name in ("profile", "checkpoints", "model"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "events.out.tfevents.17", "events.out.tfevents.18"):
        (tmp_path / name).touch()
    train = importlib.import_module("02_train")
    result = types.SimpleNamespace(step=3, val_bpb=None, samples=[("a", "b")], run_dir=tmp_path)
    lines = describe_result(result, train.Config(num_iterations=7)).splitlines()
    assert lines[0] == "trained: 3 of 7 steps"
    assert lines[-1] == f"left in {tmp_path}: checkpoints/, config.json, events.*, model/, profile/"
