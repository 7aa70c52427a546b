"""One .ipynb alone on Colab: the opening cell fetches the repository, upgrades nothing and says what is missing."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import nbformat
import pytest
from conftest import ROOT, SUPPORT
from execute import TINY, check_outputs, copy_repository, run_cells, run_notebook, set_overrides, train_before
from hub import Hub

COLAB = SUPPORT / "colab"
GITHUB = "https://github.com/some-fork/chips"
EXTRAS = ["tiktoken", "tensorboard", "xprof", "wandb", "sweeps", "starlette", "uvicorn"]
NOBODY = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "-c", "commit.gpgsign=false"]


def git(folder, *arguments):
    command = ["git", "-C", str(folder), *NOBODY, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder, message):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def siblings(tmp_path):
    """A small repository with two commits, whose `jax` finds whatever device FAKE_DEVICE names."""
    folder = tmp_path / "origin"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    shutil.copytree(ROOT / "onechip", folder / "onechip", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "jax.py").write_text("import os\n\ndef default_backend():\n    return os.environ['FAKE_DEVICE']\n")
    (folder / "01_tokenizer.py").write_text("VERSION = 1\n")
    commit(folder, "one")
    (folder / "01_tokenizer.py").write_text("VERSION = 2\n")
    commit(folder, "two")
    return folder


@pytest.fixture
def content(tmp_path):
    """An empty working folder, as Colab's."""
    folder = tmp_path / "content"
    folder.mkdir()
    return folder


def colab(tmp_path, repository, **more):
    """The environment of a Colab kernel: stand-in google.colab and pip first on the path."""
    path = os.pathsep.join([str(COLAB), os.environ["PYTHONPATH"]])
    places = {"PIP_LOG": str(tmp_path / "pip.jsonl"), "COLAB_UNASSIGNED": str(tmp_path / "unassigned")}
    return {"PYTHONPATH": path, "ONECHIP_REPO": repository and str(repository), "FAKE_DEVICE": "cpu", **places} | more


def open_cell(folder, environment, constant=("main", "REPOSITORY_URL"), arguments=()):
    """Runs the opening cell as a kernel does (no __file__), then one line that needs a sibling."""
    cell = (ROOT / "tools" / "opening_cell.py").read_text()
    cell = cell.replace('REF = "main"', f'REF = "{constant[0]}"').replace("REPOSITORY_URL", str(constant[1]))
    then = "import importlib; print(importlib.import_module('01_tokenizer').VERSION)"
    command = [sys.executable, "-c", f"{cell}\n{then}\n", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def pip_calls(tmp_path):
    log = tmp_path / "pip.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def clone_of(repository, ref="main"):
    """The name of the folder that the opening cell fetches a repository to."""
    return f"{repository.parent.name}.{repository.name}@{ref}"


def version(done):
    """What the sibling that was imported says of itself: the last line printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------
# Fetching and installing


def test_fetches_the_repository_and_misses_the_tpu(tmp_path, siblings, content):
    """On a wrong machine the cell says what was found and what to choose in the menu, and the run continues."""
    done = open_cell(content, colab(tmp_path, siblings))
    assert version(done) == "2"
    assert [path.name for path in content.iterdir()] == [clone_of(siblings)]
    assert "NO TPU: JAX found only CPU" in done.stdout
    assert "Runtime > Change runtime type > v6e-1 TPU" in done.stdout


def test_says_one_line_with_a_tpu(tmp_path, siblings, content):
    """Where everything is as it should be, the cell says which files it uses and nothing else."""
    done = open_cell(content, colab(tmp_path, siblings, FAKE_DEVICE="tpu"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Using main of {siblings}, as set here.\n2\n", "")


def test_installs_only_what_is_missing(tmp_path, siblings, content):
    """Every installed package is held at its version: a newer jax would bring another numpy and force a restart."""
    open_cell(content, colab(tmp_path, siblings, HIDDEN_MODULES="xprof wandb"))
    [call] = pip_calls(tmp_path)
    assert call["arguments"] == ["install", "-q", "-c", "/dev/stdin", "xprof", "wandb"]
    for name in ("jax", "jaxlib", "numpy", "protobuf", "huggingface_hub"):
        assert f"{name}==={importlib.metadata.version(name)}" in call["constraints"]


def test_leaves_pip_alone_when_nothing_is_missing(tmp_path, siblings, content):
    """A second Run all, or an image that has the packages by now, costs no call to pip."""
    (siblings / "wandb.py").write_text("")
    commit(siblings, "wandb for those who lack it")
    assert open_cell(content, colab(tmp_path, siblings)).returncode == 0
    assert pip_calls(tmp_path) == []


def test_continues_when_pip_fails(tmp_path, siblings, content):
    """A package that cannot be installed is named in a line and costs no other package."""
    done = open_cell(content, colab(tmp_path, siblings, HIDDEN_MODULES=" ".join(EXTRAS), PIP_EXIT="1"))
    assert version(done) == "2"
    _, first, second, *_ = done.stdout.splitlines()
    assert first.startswith("Continuing without tiktoken: ")
    assert second.startswith("Continuing without tensorboard, xprof, wandb, sweeps: ")
    groups = [EXTRAS[:1], EXTRAS[1:5], EXTRAS[5:]]  # each fails by itself
    assert [call["arguments"][4:] for call in pip_calls(tmp_path)] == groups


def test_second_run_reuses_the_clone(tmp_path, siblings, content):
    """After a session restart nothing is fetched again, and a user's edit in the clone is kept."""
    environment = colab(tmp_path, siblings)
    open_cell(content, environment)
    (content / clone_of(siblings) / "01_tokenizer.py").write_text("VERSION = 'mine'\n")
    siblings.rename(tmp_path / "gone")
    assert version(open_cell(content, environment)) == "mine"


def test_takes_a_commit_hash(tmp_path, siblings, content):
    """REF may be a commit, which `git clone --branch` does not take and a repeatable run needs."""
    first = git(siblings, "rev-parse", "HEAD~1")
    assert version(open_cell(content, colab(tmp_path, siblings, ONECHIP_REF=first))) == "1"


def test_each_ref_and_repository_has_its_folder(tmp_path, siblings, content):
    """Another REF or repository gets its own files, not those fetched before; a/b and a-b are two refs."""
    git(siblings, "branch", "try/one", "HEAD~1")
    git(siblings, "branch", "try-one", "HEAD")
    assert version(open_cell(content, colab(tmp_path, siblings))) == "2"
    assert version(open_cell(content, colab(tmp_path, siblings, ONECHIP_REF="try/one"))) == "1"
    assert version(open_cell(content, colab(tmp_path, siblings, ONECHIP_REF="try-one"))) == "2"
    git(siblings, "clone", "-q", siblings, tmp_path / "fork")
    (tmp_path / "fork" / "01_tokenizer.py").write_text("VERSION = 'forked'\n")
    commit(tmp_path / "fork", "a change")
    assert version(open_cell(content, colab(tmp_path, tmp_path / "fork"))) == "forked"
    assert len(list(content.iterdir())) == 4


def test_unknown_ref_is_one_clear_line(tmp_path, siblings, content):
    """The last line names ref and repository; the half-made folder does not pass for a clone the next time."""
    environment = colab(tmp_path, siblings, ONECHIP_REF="no-such-branch")
    for _ in range(2):
        done = open_cell(content, environment)
        assert done.returncode == 1
        message = done.stderr.splitlines()[-1]
        assert message.startswith(f"RuntimeError: cannot fetch 'no-such-branch' of {siblings}: ")
        assert "couldn't find remote ref" in message
    git(siblings, "branch", "no-such-branch")
    assert version(open_cell(content, environment)) == "2"


def test_missing_repository_is_one_clear_line(tmp_path, content):
    """Without network, with a private repository or a typing error, the line holds git's own reason."""
    done = open_cell(content, colab(tmp_path, tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: cannot fetch 'main' of ")
    assert "does not appear to be a git repository" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["ONECHIP_REF", "ONECHIP_REPO"])
def test_a_leading_dash_never_reaches_git(tmp_path, siblings, content, name):
    """A repository or ref that git would read as an option is refused in one line, before any folder is made."""
    done = open_cell(content, colab(tmp_path, siblings) | {name: f"--upload-pack=touch {tmp_path}/ran"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: ") and "begin with a dash" in done.stderr
    assert done.stdout == "", "what is refused is not announced"
    assert list(content.iterdir()) == [] and not (tmp_path / "ran").exists()


def test_a_clone_on_colab_is_used_as_it_is(tmp_path, siblings):
    """In a folder that holds the repository, on Colab too, its files are used and nothing is fetched."""
    assert version(open_cell(siblings, colab(tmp_path, tmp_path / "nowhere"))) == "2"


def test_does_nothing_elsewhere(tmp_path, siblings):
    """Next to its siblings, or in notebooks/ one folder down: no clone, no pip, no word about TPUs."""
    (siblings / "notebooks").mkdir()
    environment = colab(tmp_path, tmp_path / "nowhere", HIDDEN_MODULES="google.colab wandb")
    for folder in (siblings, siblings / "notebooks"):
        before = sorted(siblings.rglob("*"))
        done = open_cell(folder, environment | {"PYTHONDONTWRITEBYTECODE": "1"})
        assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
        assert sorted(siblings.rglob("*")) == before
    assert pip_calls(tmp_path) == []


def test_alone_elsewhere_is_one_clear_line(tmp_path, siblings, content):
    """Off Colab nothing is cloned unasked: one line says where to open the notebook, the folder stays as it is."""
    done = open_cell(content, colab(tmp_path, siblings, HIDDEN_MODULES="google.colab"))
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: no 01_tokenizer.py here or one folder up")
    assert list(content.iterdir()) == []


def test_script_and_import_do_nothing(tmp_path, siblings, content):
    """`python 02_train.py` in a Colab terminal, or 03 importing 02, fetches, installs and prints nothing."""
    shutil.copy(ROOT / "tools" / "opening_cell.py", content / "notebook.py")
    environment = os.environ | colab(tmp_path, siblings, PYTHONDONTWRITEBYTECODE="1", HIDDEN_MODULES="wandb")
    for command in ([sys.executable, "notebook.py"], [sys.executable, "-c", "import notebook"]):
        done = subprocess.run(command, cwd=content, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in content.iterdir()] == ["notebook.py"]
    assert pip_calls(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------
# Which repository: where Colab opened the notebook from


def session(address, kernel="another", key="path"):
    """A session as Colab's notebook server lists it, for a file opened from `address`."""
    return {"id": "1", key: f"fileId={quote(address, safe='')}", "type": "notebook", "kernel": {"id": kernel}}


def opened(ref, repository=GITHUB, name="02_train"):
    return f"{repository}/blob/{ref}/notebooks/{name}.ipynb"


class SessionServer(BaseHTTPRequestHandler):
    """Answers /api/sessions with `answer`, in pieces with `pause` seconds between them."""

    answer, pause = b"[]", 0.0

    def do_GET(self):
        self.send_response(200 if self.path == "/api/sessions" else 404)
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that no longer waits
            for i in range(0, len(self.answer), 10 if self.pause else 1 << 20):
                self.wfile.write(self.answer[i : i + 10 if self.pause else None])
                self.wfile.flush()
                time.sleep(self.pause)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def ask(tmp_path, siblings, content):
    """Runs the opening cell where Colab's server gives this answer: ask(sessions, pause=0.0, **environment).

    git takes the fork on GitHub, and it alone, from this machine; the cell's constant names a repository elsewhere.
    """
    git(siblings, "branch", "try/one", "HEAD~1")
    mine = tmp_path / "constant"
    git(tmp_path, "clone", "-q", siblings, mine)
    (mine / "01_tokenizer.py").write_text("VERSION = 'constant'\n")
    commit(mine, "the repository that the cell names")
    handler = type("Handler", (SessionServer,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    places = {"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": str(server.server_port)}
    here = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{siblings}.insteadOf", "GIT_CONFIG_VALUE_0": GITHUB}

    def run(sessions, pause=0.0, constant=("main", mine), arguments=(), **more):
        handler.answer = sessions if isinstance(sessions, bytes) else json.dumps(sessions).encode()
        handler.pause = pause
        environment = colab(tmp_path, None, FAKE_DEVICE="tpu") | places | here | more
        environment = {name: value for name, value in environment.items() if value is not None}
        return open_cell(content, environment, constant=constant, arguments=arguments)

    yield run
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("key", ["path", "name"])
def test_a_fork_is_fetched_without_an_edit(ask, key):
    """Opened from a fork's branch, a notebook runs that fork at that branch, and says so in a line."""
    done = ask([session(opened("try/one"), key=key)])
    assert version(done) == "1"
    assert done.stdout.splitlines()[0] == f"Using try/one of {GITHUB}, where this notebook is from."


def test_a_slash_in_a_ref_may_be_encoded(ask):
    """A branch's slash comes plain or encoded once more, as GitHub's addresses have it."""
    assert version(ask([session(opened("try%2Fone"))])) == "1"
    assert version(ask([{"path": f"fileId={opened('try/one')}", "kernel": {"id": "k"}}])) == "1"


def test_what_the_user_sets_wins(ask, siblings):
    """A REF that was edited, and ONECHIP_REPO and ONECHIP_REF, win over where the notebook was opened from."""
    first = git(siblings, "rev-parse", "HEAD~1")
    assert version(ask([session(opened("main"))])) == "2"
    assert version(ask([session(opened("main"))], constant=(first, "nowhere"))) == "1"
    assert version(ask([session(opened("main"))], ONECHIP_REF="try/one")) == "1"
    done = ask([session(opened("try/one"))], ONECHIP_REPO=str(siblings))
    assert version(done) == "2" and "as set here" in done.stdout


def test_several_sessions_are_no_riddle(ask):
    """Of several open notebooks this kernel's counts; where that is unknown, all from GitHub must agree."""
    both = [session(opened("try/one"), "aaaa"), session(opened("main", name="03_worker"), "bbbb")]
    argv = ["-f", "/runtime/kernel-bbbb.json"]
    assert version(ask(both, arguments=argv)) == "2"
    assert version(ask(both)) == "constant"
    drive = {"path": "fileId=1AbCdEf", "kernel": {"id": "cccc"}}
    assert version(ask([drive, *both[1:]])) == "2"
    assert version(ask([drive, *both[1:]], arguments=["-f", "/runtime/kernel-cccc.json"])) == "constant"


@pytest.mark.parametrize(
    "address",
    [
        opened("main", "https://github.com.evil/some-fork/chips"),
        opened("main", "https://evil/github.com/some-fork/chips"),
        opened("main", "https://gitlab.com/some-fork/chips"),
        opened("main", "http://github.com/some-fork/chips"),
        opened("main", "https://user@github.com/some-fork/chips"),
        opened("main", "https://github.com/some-fork/chips/../../evil/x"),
        opened("main", "https://github.com/some-fork/.."),
        opened("main", "https://github.com/-some-fork/chips"),
        opened("--upload-pack=evil"),
        opened("-x"),
        opened("a b"),
        opened(""),
        f"{opened('main')} https://evil",
        "https://github.com/some-fork/chips/blob/main/02_train.ipynb",
    ],
)
def test_only_a_github_repository_is_used(ask, address):
    """Whatever else a session names, another host or a ref that begins with a dash, the cell's constant is used."""
    done = ask([session(address)])
    assert version(done) == "constant" and done.stderr == ""
    assert "as set here" in done.stdout.splitlines()[0]


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[[1]", b"{}", b"7", b"[null]", b'[{"kernel": 3}]', b"\xff" * 99])
def test_nonsense_is_no_answer(ask, answer):
    """An answer that is no list of sessions costs nothing and prints no traceback."""
    done = ask(answer)
    assert version(done) == "constant" and done.stderr == ""


@pytest.mark.parametrize("pause", [9.0, 0.5])
def test_a_slow_server_costs_two_seconds(ask, pause):
    """A server that is silent, or sends a little now and then for a minute, is not waited for beyond 2 s."""
    began = time.monotonic()
    done = ask([session(opened("try/one"))] * 20, pause=pause)
    assert version(done) == "constant" and done.stderr == ""
    assert 2 <= time.monotonic() - began < 5


def test_without_a_server_the_constant_counts(ask):
    """No variable that names the server, or nobody who listens there: the cell's constant, in a line."""
    for places in ({"COLAB_JUPYTER_IP": None}, {"KMP_TARGET_PORT": "1"}, {"KMP_TARGET_PORT": "x"}):
        done = ask([session(opened("try/one"))], **places)
        assert version(done) == "constant" and done.stderr == ""


# ---------------------------------------------------------------------------------------------------------------
# Whole notebooks


@pytest.mark.slow
@pytest.mark.colab
def test_secrets_as_colab_gives_them(tmp_path):
    """A secret granted, denied, missing or late: its value, or None with one line that says why; never an error."""
    secrets = {"GRANTED": "s3cret", "DENIED": "NotebookAccessError", "LATE": "TimeoutException"}
    environment = colab(tmp_path, "nowhere", COLAB_SECRETS=json.dumps(secrets))
    reads = [f"print('->', read_secret({name!r}))" for name in ("GRANTED", "DENIED", "LATE", "MISSING")]
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from onechip.machine import read_secret"
    printed = run_cells([start, *reads], tmp_path, **environment)
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("->")] == ["-> s3cret", "-> None", "-> None", "-> None"]
    said = [line for line in lines if not line.startswith("->")]
    for line, reason in zip(said, ["no access", "not answer in time", "not among"], strict=True):
        assert reason in line


@pytest.fixture
def origin(tmp_path):
    """A repository on this machine with the working tree in one commit."""
    folder = tmp_path / "origin"
    (folder / "notebooks").mkdir(parents=True)
    copy_repository(folder, "pyproject.toml")
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "the working tree")
    return folder


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("name", sorted(TINY))
def test_notebook_alone_on_colab(name, tmp_path, content, origin):
    """One .ipynb alone runs from top to bottom: it fetches the rest, replaces no package and says there is no TPU.

    Its secrets are denied or late; the machine, asked to be given back, stays, as nothing could be uploaded.
    """
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", content / f"Copy of {name}.ipynb")
    notebook = nbformat.read(content / f"Copy of {name}.ipynb", as_version=4)
    set_overrides(notebook, TINY[name])
    train_before(name, content)
    offers = [cell for cell in notebook.cells if cell.source.startswith("GIVE_BACK = False")]
    for cell in offers:
        cell.source = cell.source.replace("GIVE_BACK = False", "GIVE_BACK = True")
    secrets = json.dumps({"HF_TOKEN": "NotebookAccessError", "WANDB_API_KEY": "TimeoutException"})
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # where TensorBoard is
    environment = {"TMPDIR": str(tmp_path), "PATH": path, "COLAB_SECRETS": secrets, "HIDDEN_MODULES": "wandb"}
    printed = run_notebook(notebook, content, **colab(tmp_path, origin), **environment)
    assert (content / clone_of(origin) / "onechip").is_dir()
    first, _, second, *_ = printed.splitlines()
    assert first == f"Using main of {origin}, as set here."
    assert second == "NO TPU: JAX found only CPU.", printed[:500]
    assert [call["arguments"][4:] for call in pip_calls(tmp_path)] == [["wandb"]]
    assert not (tmp_path / "unassigned").exists() and printed.count("machine: kept") == len(offers)
    check_outputs(notebook)
    if name == "02_train":
        assert "google.colab.kernel.proxyPort" in json.dumps(notebook), "TensorBoard's frame"


@pytest.mark.slow
@pytest.mark.colab
def test_the_machine_is_given_back_when_all_is_on_the_hub(tmp_path, content, origin):
    """With a granted token and GIVE_BACK ticked: the model and its card are on the Hub before the machine goes."""
    notebook = nbformat.read(ROOT / "notebooks" / "02_train.ipynb", as_version=4)
    set_overrides(notebook, f"{TINY['02_train']} --name mine")
    [last] = [cell for cell in notebook.cells if cell.source.startswith("GIVE_BACK = False")]
    last.source = last.source.replace("GIVE_BACK = False", "GIVE_BACK = True")
    assert last is notebook.cells[-1]
    with Hub(users={"hf_secret_word": "someone"}) as hub:
        environment = colab(tmp_path, origin, COLAB_SECRETS=json.dumps({"HF_TOKEN": "hf_secret_word"}))
        # Without TensorBoard, as where pip failed: that costs the curves in the notebook, and nothing else.
        hidden = {"HIDDEN_MODULES": "tensorboard"}
        printed = run_notebook(notebook, content, **environment, **hub.environment(), **hidden)
        arrived = hub.files("someone/onechip-mine")
    assert (tmp_path / "unassigned").exists() and "hf_secret_word" not in json.dumps(notebook)
    assert {"README.md", "params.safetensors", "tokenizer.json"} <= set(arrived), printed
    assert "TensorBoard is not installed here" in printed
