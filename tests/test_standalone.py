"""One .ipynb alone on Colab: the opening cell fetches its siblings, upgrades nothing and says what it misses."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from execute import TINY, run_cells, run_notebook, set_overrides
from hub import Hub

COLAB = ROOT / "tests" / "colab"
EXTRAS = ["tiktoken", "tensorboard", "xprof", "wandb", "sweeps"]
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
    (folder / "common.py").write_text("")
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
    return {"PYTHONPATH": path, "ONECHIP_REPO": str(repository), "FAKE_DEVICE": "cpu", **places} | more


def open_cell(folder, environment, then="import importlib; print(importlib.import_module('01_tokenizer').VERSION)"):
    """Runs the opening cell as a kernel does (no __file__), then one line that needs a sibling."""
    cell = (ROOT / "tools" / "opening_cell.py").read_text()
    command = [sys.executable, "-c", f"{cell}\n{then}\n"]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def pip_calls(tmp_path):
    log = tmp_path / "pip.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_fetches_siblings_and_says_there_is_no_tpu(tmp_path, siblings, content):
    """The first lines on a wrong machine tell what was found and what to choose in the menu, and the run goes on."""
    done = open_cell(content, colab(tmp_path, siblings))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in content.iterdir()] == ["onechip-main"]
    assert "NO TPU: JAX found only CPU" in done.stdout
    assert "Runtime > Change runtime type > v6e-1 TPU" in done.stdout
    assert done.stdout.splitlines()[-1] == "2"


def test_is_silent_with_a_tpu(tmp_path, siblings, content):
    """Nothing to say where everything is as it should be."""
    done = open_cell(content, colab(tmp_path, siblings, FAKE_DEVICE="tpu"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_installs_only_what_is_missing_and_pins_the_rest(tmp_path, siblings, content):
    """A newer jax drags numpy along and forces a restart: every installed package is held at its version."""
    open_cell(content, colab(tmp_path, siblings, HIDDEN_MODULES="xprof wandb"))
    [call] = pip_calls(tmp_path)
    assert call["arguments"] == ["install", "-q", "-c", "/dev/stdin", "xprof", "wandb"]
    for name in ("jax", "jaxlib", "numpy", "protobuf", "huggingface_hub"):
        assert f"{name}==={importlib.metadata.version(name)}" in call["constraints"]


def test_leaves_pip_alone_when_nothing_is_missing(tmp_path, siblings, content):
    """A second Run all, or an image that has them by now, costs no call to pip."""
    (siblings / "wandb.py").write_text("")
    commit(siblings, "wandb for those who lack it")
    assert open_cell(content, colab(tmp_path, siblings)).returncode == 0
    assert pip_calls(tmp_path) == []


def test_goes_on_when_pip_fails(tmp_path, siblings, content):
    """No profile viewer is no reason not to train."""
    done = open_cell(content, colab(tmp_path, siblings, HIDDEN_MODULES=" ".join(EXTRAS), PIP_EXIT="1"))
    assert done.returncode == 0
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("Going on without tiktoken: ")
    assert second.startswith("Going on without tensorboard, xprof, wandb, sweeps: ")
    assert [call["arguments"][4:] for call in pip_calls(tmp_path)] == [EXTRAS[:1], EXTRAS[1:]]  # one fails by itself
    assert done.stdout.splitlines()[-1] == "2"


def test_second_run_reuses_the_clone(tmp_path, siblings, content):
    """After a session restart nothing is fetched again, and a user's edit in the clone is kept."""
    environment = colab(tmp_path, siblings)
    open_cell(content, environment)
    (content / "onechip-main" / "01_tokenizer.py").write_text("VERSION = 'mine'\n")
    siblings.rename(tmp_path / "gone")
    done = open_cell(content, environment)
    assert done.stdout.splitlines()[-1] == "mine", done.stderr


def test_takes_a_commit_hash(tmp_path, siblings, content):
    """`git clone --branch` takes no hash; a run that must be repeatable has nothing else."""
    first = git(siblings, "rev-parse", "HEAD~1")
    done = open_cell(content, colab(tmp_path, siblings, ONECHIP_REF=first))
    assert done.stdout.splitlines()[-1] == "1", done.stderr


def test_another_ref_is_another_folder(tmp_path, siblings, content):
    """Who changes REF and runs again gets that version, not the one fetched before; a branch may hold a slash."""
    git(siblings, "branch", "try/one", "HEAD~1")
    open_cell(content, colab(tmp_path, siblings))
    done = open_cell(content, colab(tmp_path, siblings, ONECHIP_REF="try/one"))
    assert done.stdout.splitlines()[-1] == "1", done.stderr


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
    assert open_cell(content, environment).stdout.splitlines()[-1] == "2"


def test_missing_repository_is_one_clear_line(tmp_path, content):
    """No network, a private repository or a typing error: git's own reason stands in the line."""
    done = open_cell(content, colab(tmp_path, tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: cannot fetch 'main' of ")
    assert "does not appear to be a git repository" in done.stderr.splitlines()[-1]


def test_a_clone_on_colab_is_used_as_it_is(tmp_path, siblings):
    """Who cloned the repository on Colab and opened a terminal or a folder there wants those files."""
    done = open_cell(siblings, colab(tmp_path, tmp_path / "nowhere"))
    assert done.stdout.splitlines()[-1] == "2", done.stderr


def test_does_nothing_elsewhere(tmp_path, siblings):
    """Beside its siblings, or in notebooks/ one folder down: no clone, no pip, no word about TPUs."""
    (siblings / "notebooks").mkdir()
    environment = colab(tmp_path, tmp_path / "nowhere", HIDDEN_MODULES="google.colab wandb")
    for folder in (siblings, siblings / "notebooks"):
        before = sorted(siblings.rglob("*"))
        done = open_cell(folder, environment | {"PYTHONDONTWRITEBYTECODE": "1"})
        assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
        assert sorted(siblings.rglob("*")) == before
    assert pip_calls(tmp_path) == []


def test_alone_elsewhere_is_one_clear_line(tmp_path, siblings, content):
    """Off Colab nobody asked for a clone: say where to open the notebook, and leave the folder as it is."""
    done = open_cell(content, colab(tmp_path, siblings, HIDDEN_MODULES="google.colab"))
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: no 01_tokenizer.py here or one folder up")
    assert list(content.iterdir()) == []


def test_script_and_import_do_nothing(tmp_path, siblings, content):
    """`python 02_train.py` in a Colab terminal, or 03 importing 02, must not fetch, install or speak."""
    shutil.copy(ROOT / "tools" / "opening_cell.py", content / "notebook.py")
    environment = os.environ | colab(tmp_path, siblings, PYTHONDONTWRITEBYTECODE="1", HIDDEN_MODULES="wandb")
    for command in ([sys.executable, "notebook.py"], [sys.executable, "-c", "import notebook"]):
        done = subprocess.run(command, cwd=content, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in content.iterdir()] == ["notebook.py"]
    assert pip_calls(tmp_path) == []


@pytest.mark.slow
def test_secrets_as_colab_gives_them(tmp_path):
    """A secret granted, denied, missing or late: its value, or None with one line that says why; never an error."""
    secrets = {"GRANTED": "s3cret", "DENIED": "NotebookAccessError", "LATE": "TimeoutException"}
    environment = colab(tmp_path, "nowhere", COLAB_SECRETS=json.dumps(secrets))
    reads = [f"print('->', read_secret({name!r}))" for name in ("GRANTED", "DENIED", "LATE", "MISSING")]
    printed = run_cells(
        [f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common", *reads], tmp_path, **environment
    )
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("->")] == ["-> s3cret", "-> None", "-> None", "-> None"]
    told = [line for line in lines if not line.startswith("->")]
    for line, reason in zip(told, ["no access", "not answer in time", "not among"], strict=True):
        assert reason in line


@pytest.fixture
def origin(tmp_path):
    """A repository on this machine with the working tree in one commit."""
    folder = tmp_path / "origin"
    (folder / "notebooks").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "the working tree")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_notebook_alone_on_colab(name, tmp_path, content, origin):
    """Run all on a copy of one .ipynb and nothing else: cloned from git, nothing installed over, no TPU told on top.

    Its secrets are denied or late; the machine, asked to be given back, stays, as nothing could be uploaded.
    """
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", content / f"Copy of {name}.ipynb")
    notebook = nbformat.read(content / f"Copy of {name}.ipynb", as_version=4)
    set_overrides(notebook, TINY[name])
    offers = [cell for cell in notebook.cells if cell.source.startswith("GIVE_BACK = False")]
    for cell in offers:
        cell.source = cell.source.replace("GIVE_BACK = False", "GIVE_BACK = True")
    secrets = json.dumps({"HF_TOKEN": "NotebookAccessError", "WANDB_API_KEY": "TimeoutException"})
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # where TensorBoard is
    environment = {"TMPDIR": str(tmp_path), "PATH": path, "COLAB_SECRETS": secrets, "HIDDEN_MODULES": "wandb"}
    printed = run_notebook(notebook, content, **colab(tmp_path, origin), **environment)
    assert (content / "onechip-main" / "common.py").exists()
    assert printed.lstrip("=\n").startswith("NO TPU: JAX found only CPU"), printed[:500]
    assert [call["arguments"][4:] for call in pip_calls(tmp_path)] == [["wandb"]]
    assert not (tmp_path / "unassigned").exists() and printed.count("machine: kept") == len(offers)
    if name == "02_train":
        assert "google.colab.kernel.proxyPort" in json.dumps(notebook), "TensorBoard's frame"


@pytest.mark.slow
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
    assert "there is no TensorBoard here" in printed
