"""The notebooks as files: what .py and .ipynb hold, share and import, and that each runs from top to bottom."""

import ast
import base64
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections import defaultdict

import jupytext
import nbformat
import pytest
from conftest import ROOT
from execute import TINY, check_outputs, copy_repository, run_notebook, set_overrides

from onechip.machine import has_tpu

NAMES = sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))
HUBS = ["01_tokenizer", "02_train"]
ROOMS = sorted(path.stem for path in (ROOT / "onechip").glob("*.py"))
# What a leaf such as 04 defines again on purpose, to hand it to the hub's one training loop.
INTERFACE = {"Config", "Settings", "PRESETS"}
# Names of the opening, the first and the run cell: the same line on purpose.
EVERYWHERE = {"REPOSITORY", "REF", "OVERRIDES", "LOOK", "open_notebook", "opened_from"}
MAGICS = re.compile(r"%(load_ext tensorboard|tensorboard --logdir \S+|matplotlib inline)")
each_notebook = pytest.mark.parametrize("name", NAMES)


def read_ipynb(name, root=ROOT):
    return nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell.source for cell in read_ipynb(name).cells if cell.cell_type == "code"]


def parse(name):
    """The syntax tree of a notebook, or of a room where the name is "onechip/..."."""
    return ast.parse((ROOT / f"{name}.py").read_text())


def copy_tree(folder):
    """A copy of everything that the sync script reads or writes."""
    return copy_repository(folder, "pyproject.toml", "uv.lock", "update_notebooks.sh", "tools", "notebooks")


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
    """Each .py has its .ipynb and the reverse; and the globs above found something for the tests below."""
    assert set(HUBS) <= set(NAMES) and {"errors", "files", "machine"} <= set(ROOMS)
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@each_notebook
def test_py_and_ipynb_hold_the_same_cells(name):
    """The .ipynb holds the cells of its .py, which is the source."""
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
    """The repository's address is in pyproject.toml alone: a fork's reaches every badge and opening cell."""
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
    """No notebook in the repository holds outputs of a run, or two cells of one id."""
    # Not by nbformat, which repairs equal ids as it reads.
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    assert [c for c in cells if c.get("outputs") or c.get("execution_count") is not None] == []
    assert len({cell["id"] for cell in cells}) == len(cells)


# ---------------------------------------------------------------------------------------------------------------
# What Colab reads


@each_notebook
def test_ipynb_asks_for_a_v6e(name):
    """The metadata make Colab open the notebook on a v6e machine instead of a CPU."""
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
    """The badge opens the notebook that it is in."""
    first = read_ipynb(name).cells[0]
    assert first.cell_type == "markdown"
    assert re.fullmatch(r"\[!\[\w+\]\(https://\S+\.svg\)\]\((\S+)\)", first.source.splitlines()[0])[1] == badge_url(
        name
    )


@each_notebook
def test_opening_cell_is_the_same(name):
    """Every notebook starts with the opening cell of tools/opening_cell.py, and has no other."""
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    cell = (ROOT / "tools" / "opening_cell.py").read_text().replace("REPOSITORY_URL", address)
    assert code_cells(name)[0] == cell.strip()
    assert [source for source in code_cells(name)[1:] if "def open_notebook" in source] == []


@each_notebook
def test_magics_stand_alone(name):
    """A magic is a cell of its own, as it is not Python, and one that exists outside Colab too."""
    for source in code_cells(name):
        lines = source.splitlines()
        if any(re.match(r"\s*[%!]", line) for line in lines):
            assert all(MAGICS.fullmatch(line) for line in lines if not line.startswith("#")), source
        else:
            ast.parse(source)


@each_notebook
def test_what_is_collapsed_has_a_title_and_only_defines(name):
    """A collapsed cell has a title, which is all that Colab shows of it; nothing that runs or is set hides in one."""
    for cell in read_ipynb(name).cells[1:]:
        titled = cell.source.startswith("# @title ")
        assert titled == (cell.metadata.get("cellView") == "form"), cell.source[:60]
        if titled and "def open_notebook" not in cell.source:
            assert not re.search("__main__|^if LOOK|@param", cell.source, re.MULTILINE), cell.source[:60]


@each_notebook
def test_forms_are_lines_that_colab_reads(name):
    """A form's field is an assignment of a plain value, followed by its kind as Colab reads it."""
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
        os.write(2, f"{event} {args}".encode())  # seen even where the error is caught
        raise ConnectionError("no network on import")
sys.addaudithook(report)
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    for loaded in [module for module in sys.modules if module.partition(".")[0] == "onechip"]:
        del sys.modules[loaded]
    importlib.import_module(name)
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was used"
"""


@pytest.mark.parametrize("name", [*NAMES, "onechip"])
def test_import_is_silent(name, tmp_path):
    """An import prints nothing, writes nothing, starts nothing and asks neither network nor device.

    Each room is imported as the first one: no room needs another to have been imported before it.
    """
    for folder in ("tree", "home", "tmp"):
        (tmp_path / folder).mkdir()
    copy_repository(tmp_path / "tree")
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG")}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    names = [name] if name in NAMES else ["onechip", *(f"onechip.{room}" for room in ROOMS if room != "__init__")]
    command = [sys.executable, "-c", PROBE, str(tmp_path / "tree"), *names]
    before = snapshot(tmp_path)
    done = subprocess.run(command, cwd=tmp_path / "tree", env=kept | places, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert snapshot(tmp_path) == before


def test_any_room_quiets_jax_before_it_is_imported():
    """`import onechip`, or any of its rooms, before jax is all the order there is: the variables are set by then."""
    probe = "import sys, os, {}; assert 'jax' not in sys.modules; print(os.environ.get('TPU_SKIP_MDS_QUERY'))"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "JAX_"))}
    for name in ("onechip", "onechip.errors"):
        command = [sys.executable, "-c", probe.format(name)]
        done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == ("None" if has_tpu() else "1")


def test_nothing_is_defined_twice():
    """Notebooks and rooms share no definition, by name or by body: a fix is made in one place."""
    places, bodies = defaultdict(list), defaultdict(list)
    for name in [*NAMES, *(f"onechip/{room}" for room in ROOMS)]:
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


def imports_of(tree):
    """{module: line} of all imports in a syntax tree, those inside functions included."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "onechip" else []
            found |= dict.fromkeys([node.module, *whole], node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if isinstance(node.args[0], ast.Constant):  # a name that is known before it runs
                found[node.args[0].value] = node.lineno
    return found


@each_notebook
def test_imports_go_to_the_hubs(name):
    """A notebook imports hubs before it as `tok = importlib.import_module("01_tokenizer")`, and rooms; no leaf."""
    tree = parse(name)
    stars = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert stars == []
    named = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    at_top = {node.value for node in named}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            assert node in at_top, f"line {node.lineno}: assign the imported notebook to a name at top level"
            assert node.args[0].value in [hub for hub in HUBS if hub < name], f"line {node.lineno}"
    for module, line in imports_of(tree).items():
        assert module not in ("tools", "tests", "bench", "common", "chip", "kernels"), f"line {line}"
        assert not module.startswith("onechip.") or module.split(".")[1] in ROOMS, f"line {line}"


def test_rooms_are_small_and_name_no_notebook():
    """No file of onechip/ has more than 300 lines or names a notebook, be it in an import, a message or a docstring.

    01_tokenizer is a name, and 01 alone; what is part of a date, a version or a format, such as 3.01 or %02d, is none.
    """
    for room in ROOMS:
        text = (ROOT / "onechip" / f"{room}.py").read_text()
        assert text.count("\n") <= 300, room
        assert re.findall(r"(?<!\w)\d\d_[a-z]\w*|(?<![\w:+%])(?<!\d[.-])0[1-8](?!\w|[.:-]\d|%)", text) == [], room


def test_rooms_import_in_one_direction():
    """The imports among the rooms form no circle, not even through imports inside functions."""
    arrows = {}
    for room in ROOMS:
        modules = imports_of(parse(f"onechip/{room}"))
        arrows[room] = {module.split(".")[1] for module in modules if module.startswith("onechip.")} & set(ROOMS)
    while leaves := [room for room, needed in arrows.items() if not needed & set(arrows)]:
        for room in leaves:
            del arrows[room]
    assert arrows == {}


def test_functions_fit_a_screen():
    """No function has more than sixty lines, in tests and tools too."""
    long, folders = [], ("onechip", "tools", "bench", "tests")
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))]:
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
    """No test can download anything: neither this process nor its children reach beyond loopback."""
    with pytest.raises(ConnectionError, match="without network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    ask = "import socket; socket.getaddrinfo('example.com', 80)"
    child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert "tests run without network" in child.stderr


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path):
    """Run all passes with the smallest settings, where the siblings are one folder up as in a clone.

    tests/test_standalone.py runs each of them alone, as Colab does.
    """
    copy_repository(tmp_path)
    (tmp_path / "notebooks").mkdir()
    notebook = read_ipynb("02_train")
    set_overrides(notebook, TINY["02_train"])
    printed = run_notebook(notebook, tmp_path / "notebooks")
    assert printed.strip()
    assert "NO TPU" not in printed, "the opening cell speaks on Colab only"
    check_outputs(notebook)


@pytest.mark.slow
def test_a_picture_is_live(tmp_path):
    """Each picture takes the place of the last one of its cell, above the text, and another cell has its own."""
    save = "from matplotlib.figure import Figure\nfor n in '123': Figure(figsize=(int(n), 1)).savefig(n + '.png')"
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from onechip.plots import show_picture\n{save}"
    first = "show_picture(None); print('text'); show_picture('1.png'); show_picture('2.png')"
    cells = [start, first, "show_picture('3.png')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    run_notebook(notebook, tmp_path)
    [picture, text], [other] = (cell.outputs for cell in notebook.cells[1:])
    for output, name in ((picture, "2.png"), (other, "3.png")):
        assert base64.b64decode(output.data["image/png"]) == (tmp_path / name).read_bytes()
    assert text.text == "text\n"
