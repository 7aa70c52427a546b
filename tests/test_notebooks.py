"""The notebooks as files: what .py and .ipynb hold, share and import, and that each runs from top to bottom."""

import ast
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections import defaultdict

import jupytext
import nbformat
import pytest
from conftest import ROOT
from execute import TINY, run_notebook, set_overrides

NAMES = sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))
HUBS = ["01_tokenizer", "02_train"]
# What a leaf such as 04 defines anew on purpose, to hand it to the hub's one training loop.
INTERFACE = {"Config", "init_layer", "init_params", "backbone", "PRESETS"}
# Names of the opening and the run cell: the same line on purpose.
EVERYWHERE = {"REPOSITORY", "REF", "OVERRIDES", "open_notebook"}
MAGICS = re.compile(r"%(load_ext tensorboard|tensorboard --logdir \S+|matplotlib inline)")
each_notebook = pytest.mark.parametrize("name", NAMES)


def read_ipynb(name, root=ROOT):
    return nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell.source for cell in read_ipynb(name).cells if cell.cell_type == "code"]


def parse(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def copy_tree(folder):
    """A copy of everything that the sync script reads or writes."""
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "uv.lock", ROOT / "update_notebooks.sh"]:
        shutil.copy(path, folder)
    for part in ("tools", "notebooks"):
        shutil.copytree(ROOT / part, folder / part)
    return folder


def snapshot(folder):
    """Every file below `folder` with its bytes and its time stamp."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def update(root):
    """Runs update_notebooks.sh with the environment that the tests run in, as it is."""
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(["bash", str(root / "update_notebooks.sh")], check=True, env=environment)


# ---------------------------------------------------------------------------------------------------------------
# One source, two forms


def test_all_notebooks_are_there():
    """A glob that finds nothing would pass every test below; an .ipynb without its .py is left from a renaming."""
    assert set(HUBS) <= set(NAMES)
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@each_notebook
def test_py_and_ipynb_hold_the_same_cells(name):
    """Somebody edits the .py and forgets update_notebooks.sh, or edits the .ipynb, which is not the source."""
    source = jupytext.read(ROOT / f"{name}.py", fmt="py:percent")
    pairs = [[(cell.cell_type, cell.source) for cell in nb.cells] for nb in (source, read_ipynb(name))]
    assert pairs[0] == pairs[1], "run: bash update_notebooks.sh"


def test_updating_changes_nothing(tmp_path):
    """The committed files are what update_notebooks.sh writes: not a byte, id or time stamp moves."""
    before = snapshot(copy_tree(tmp_path))
    update(tmp_path)
    assert snapshot(tmp_path) == before


def test_ids_survive_edits(tmp_path):
    """An edited cell keeps its id, a new cell moves no other's, and two developers get the same new id."""
    texts = []
    for clone in ("a", "b"):
        (tmp_path / clone).mkdir()
        root = copy_tree(tmp_path / clone)
        source = root / "01_tokenizer.py"
        old = [cell.id for cell in read_ipynb("01_tokenizer", root).cells]
        text = source.read_text().replace("# %%\nimport ast\n", "# %%\nimport ast  # edited\n")
        source.write_text(text + '\n# %%\nprint("one more cell")\n\n# %%\nprint("one more cell")\n')
        update(root)
        cells = read_ipynb("01_tokenizer", root).cells
        assert [cell.id for cell in cells[:-2]] == old
        assert len({cell.id for cell in cells}) == len(old) + 2
        assert any("import ast  # edited" in cell.source for cell in cells)
        texts.append((root / "notebooks" / "01_tokenizer.ipynb").read_text())
    assert texts[0] == texts[1]


def test_a_fork_changes_one_line(tmp_path):
    """The repository's address stands in pyproject.toml alone: a fork's reaches every badge and opening cell."""
    project = copy_tree(tmp_path) / "pyproject.toml"
    project.write_text(project.read_text().replace("github.com/onechip/onechip", "github.com/some-fork/chips"))
    (tmp_path / "README.md").write_text(f"[open]({badge_url('02_train')})\n")
    update(tmp_path)
    written = [*tmp_path.glob("[0-9]*.py"), *tmp_path.glob("notebooks/*"), tmp_path / "README.md"]
    for path in written:
        assert "onechip/onechip" not in path.read_text()
        assert "github/some-fork/chips/blob/main/notebooks/" in path.read_text()


@each_notebook
def test_ipynb_has_no_outputs_and_unique_ids(name):
    """A notebook saved after a run would put its outputs, and whatever they show, into the repository."""
    # Not by nbformat, which mends equal ids as it reads.
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    assert [c for c in cells if c.get("outputs") or c.get("execution_count") is not None] == []
    assert len({cell["id"] for cell in cells}) == len(cells)


# ---------------------------------------------------------------------------------------------------------------
# What Colab reads


@each_notebook
def test_ipynb_asks_for_a_v6e(name):
    """Without this metadata Colab opens the notebook on a CPU machine."""
    metadata = read_ipynb(name).metadata
    assert metadata.accelerator == "TPU"
    assert metadata.colab == {"gpuType": "V6E1", "machine_shape": "hm", "provenance": []}
    assert metadata.kernelspec.name == "python3"


def badge_url(name):
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner, repo = address.split("/")[-2:]
    return f"https://colab.research.google.com/github/{owner}/{repo}/blob/main/notebooks/{name}.ipynb"


@each_notebook
def test_badge_opens_this_notebook(name):
    """A badge copied from another notebook opens that one."""
    first = read_ipynb(name).cells[0]
    assert first.cell_type == "markdown"
    assert re.fullmatch(r"\[!\[\w+\]\(https://\S+\.svg\)\]\((\S+)\)", first.source.splitlines()[0])[1] == badge_url(
        name
    )


@each_notebook
def test_opening_cell_is_the_same(name):
    """One opening cell: what a fix to it changes, it changes in every notebook."""
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    cell = (ROOT / "tools" / "opening_cell.py").read_text().replace("REPOSITORY_URL", address)
    assert code_cells(name)[0] == cell.strip()
    assert [source for source in code_cells(name)[1:] if "def open_notebook" in source] == []


@each_notebook
def test_magics_stand_alone(name):
    """A magic is not Python: as the only line under an `if` it breaks the .py, and not all of them exist elsewhere."""
    for source in code_cells(name):
        lines = source.splitlines()
        if any(re.match(r"\s*[%!]", line) for line in lines):
            assert all(MAGICS.fullmatch(line) for line in lines if not line.startswith("#")), source
        else:
            ast.parse(source)


@each_notebook
def test_what_is_collapsed_has_a_title_and_only_defines(name):
    """Colab shows a collapsed cell by its title alone: nothing that runs, and nothing to fill in, hides in one."""
    for cell in read_ipynb(name).cells[1:]:
        titled = cell.source.startswith("# @title ")
        assert titled == (cell.metadata.get("cellView") == "form"), cell.source[:60]
        if titled and "def open_notebook" not in cell.source:
            assert "__main__" not in cell.source and "@param" not in cell.source


@each_notebook
def test_forms_are_lines_that_colab_reads(name):
    """A field is an assignment of a plain value with its kind behind it; a typing error there shows no field."""
    kind = r'(\{type:"(string|boolean)"\}|\[("[^"]*"(, )?)+\] \{allow-input: true\})'
    fields = [line for source in code_cells(name) for line in source.splitlines() if "@param" in line]
    assert any(line.startswith("REF = ") for line in fields) and any(line.startswith("OVERRIDES = ") for line in fields)
    for line in fields:
        assert re.fullmatch(rf'[A-Z_]+ = ("[^"]*"|True|False)  # @param {kind}', line), line


# ---------------------------------------------------------------------------------------------------------------
# Imports and definitions

PROBE = """
import importlib, os, sys, threading
def report(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        os.write(2, f"{event} {args}".encode())  # told even where the error is caught
        raise ConnectionError("no network on import")
sys.addaudithook(report)
sys.path.insert(0, sys.argv[1])
importlib.import_module(sys.argv[2])
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was used"
"""


@each_notebook
def test_import_is_silent(name, tmp_path):
    """A sibling's import prints nothing, writes nothing, starts nothing and asks neither network nor device."""
    for folder in ("tree", "home", "tmp"):
        (tmp_path / folder).mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path / "tree")
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG")}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROBE, str(tmp_path / "tree"), name]
    before = snapshot(tmp_path)
    done = subprocess.run(command, cwd=tmp_path / "tree", env=kept | places, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert snapshot(tmp_path) == before


def test_nothing_is_defined_twice():
    """The ancestor's fixes had to be walked through seven copies, and one never was."""
    places, bodies = defaultdict(list), defaultdict(list)
    for name in [*NAMES, "common", "chip", "kernels"]:
        for node in parse(name).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in EVERYWHERE:
                places[node.name].append(name)
                bodies[ast.dump(node).replace(f"name='{node.name}'", "")].append(f"{name}.{node.name}")
            elif (
                isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
            ):
                places[node.targets[0].id].append(name)
    assert [where for where in bodies.values() if len(where) > 1] == []
    twice = {name for name, where in places.items() if len(where) > 1}
    assert twice <= INTERFACE | EVERYWHERE


@each_notebook
def test_imports_go_to_the_hubs(name):
    """`tok = importlib.import_module("01_tokenizer")`: by a namespace, from a hub, never a later notebook or a star."""
    tree = parse(name)
    stars = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert stars == []
    named = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    at_top = {node.value for node in named}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            assert node in at_top, f"line {node.lineno}: assign the imported notebook to a name at top level"
            assert node.args[0].value in [hub for hub in HUBS if hub < name], f"line {node.lineno}"


def test_functions_fit_a_screen():
    """Sixty lines at most, tests and tools included."""
    long = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []


def test_no_machine_is_named():
    """No tracked file names a path or a package registry of the machine it was written on."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files are tracked")
    machine = re.compile(r"(?<![\w.<])/(?:work|root|home|Users)/\w|pypi\.|pythonhosted|index-url", re.IGNORECASE)
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = []
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".lock") and name != "tests/test_notebooks.py":
            found += [f"{name}: {match}" for match in machine.findall(path.read_text())]
    assert found == []


# ---------------------------------------------------------------------------------------------------------------
# Running them


def test_tests_run_offline():
    """A test that quietly downloads passes here and fails on a train: neither this process nor its children can."""
    with pytest.raises(ConnectionError, match="without network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    ask = "import socket; socket.getaddrinfo('example.com', 80)"
    child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert "tests run without network" in child.stderr


@pytest.mark.slow
@each_notebook
def test_runs_from_top_to_bottom(name, tmp_path):
    """Run all, with the smallest settings, where the siblings lie one folder up as in a clone."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "notebooks").mkdir()
    notebook = read_ipynb(name)
    set_overrides(notebook, TINY[name])
    printed = run_notebook(notebook, tmp_path / "notebooks")
    assert printed.strip()
    assert "NO TPU" not in printed, "the opening cell speaks on Colab only"
    assert json.dumps(notebook).count('"output_type": "error"') == 0
    for outputs in (cell.get("outputs", []) for cell in notebook.cells):
        assert sum("image/png" in output.get("data", {}) for output in outputs) <= 1, (
            "a picture takes the last one's place"
        )
        texts = [output.get("text", "") for output in outputs]
        assert sum(text.count("step/s") for text in texts) <= 1, "a progress bar is one line"
        assert sum(text.count("\n") for text in texts) <= 40, "a cell's text fits a screen"


@pytest.mark.slow
def test_a_picture_is_live(tmp_path):
    """Each picture takes the place of the last one of its cell, above the text, and another cell has its own."""
    save = "from matplotlib.figure import Figure\nfor n in '123': Figure(figsize=(int(n), 1)).savefig(n + '.png')"
    first = "common.show_picture(None); print('text'); show_picture('1.png'); show_picture('2.png')"
    cells = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common\n{save}",
        first,
        "common.show_picture('3.png')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    run_notebook(notebook, tmp_path)
    [picture, text], [other] = (cell.outputs for cell in notebook.cells[1:])
    for output, name in ((picture, "2.png"), (other, "3.png")):
        assert base64.b64decode(output.data["image/png"]) == (tmp_path / name).read_bytes()
    assert text.text == "text\n"
