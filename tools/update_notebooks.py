"""Carries header, badge and opening cell into every NN_*.py and writes notebooks/NN_*.ipynb from it."""

import hashlib
import re
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import map_outputs_to_inputs

BRANCH = "main"  # the badges' branch
HEADER = """\
# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V6E1
#     machine_shape: hm
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""
BADGE = re.compile(r"^# (<!-- badge -->|\[!\[\w+\]\(https://colab\.\S+)$", re.MULTILINE)
BADGE_URL = re.compile(r"https://colab\.research\.google\.com/github/[^/\s]+/[^/\s]+/blob/[^/\s]+/notebooks/")
OPENING = re.compile(
    r"^# %%(?! \[markdown\]).*\n# (?:OPENING CELL|@title Opening cell)(?:.|\n)*?(?=^# %%|\Z)", re.MULTILINE
)


def read_address(root):
    """The repository's address, from the one place that holds it."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"].rstrip("/")


def badge_folder(address):
    """Where Colab opens the notebooks from: the address of GitHub's folder, in Colab's own spelling."""
    owner_repo = address.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{owner_repo}/blob/{BRANCH}/notebooks/"


def normalize(name, text, address, opening):
    """The source `text` of notebook `name` with today's header, badge and opening cell in place."""
    body = re.sub(r"\A# ---\n(?:#.*\n)*?# ---\n\n*", "", text)
    first_code = re.search(r"^# %%(?! \[markdown\])", body, re.MULTILINE)
    found = OPENING.search(body)
    if not found or found.start() != first_code.start():
        sys.exit(f"{name}.py: the first code cell must start with '# OPENING CELL'")
    if not BADGE.search(body[: found.start()]):
        sys.exit(f"{name}.py: the first markdown cell must start with '<!-- badge -->'")
    logo = "https://colab.research.google.com/assets/colab-badge.svg"
    badge = f"# [![Colab]({logo})]({badge_folder(address)}{name}.ipynb)"
    cell = f'# %% cellView="form"\n{opening.replace("REPOSITORY_URL", address)}\n'
    body = body[: found.start()] + cell + body[found.end() :]
    return HEADER + BADGE.sub(lambda _: badge, body, count=1)


def assign_ids(cells, old_cells):
    """Keeps the id of each cell that was there before, edited or not; a new cell's id is the hash of its source."""
    matches = map_outputs_to_inputs(cells, old_cells)
    taken = {old_cells[match].id for match in matches if match is not None}
    for cell, match in zip(cells, matches, strict=True):
        if match is not None:
            cell.id = old_cells[match].id
            continue
        salt = 0
        while (cell_id := hashlib.sha256(f"{salt}{cell.source}".encode()).hexdigest()[:8]) in taken:
            salt += 1
        taken.add(cell_id)
        cell.id = cell_id


def convert(source, target):
    """The .ipynb text for a .py `source`: all of it from the source, only the ids from an older `target`."""
    notebook = jupytext.read(source, fmt="py:percent")
    old_cells = nbformat.read(target, as_version=4).cells if target.exists() else []
    assign_ids(notebook.cells, old_cells)
    return jupytext.writes(notebook, fmt="ipynb")


def write_if_changed(path, text):
    """Writes nothing, not even a time stamp, where nothing changes."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.name}")


def main(root):
    """Updates every notebook below `root`, and the badges in its README."""
    address, opening = read_address(root), (root / "tools" / "opening_cell.py").read_text()
    for source in sorted(root.glob("[0-9][0-9]_*.py")):
        write_if_changed(source, normalize(source.stem, source.read_text(), address, opening))
        target = root / "notebooks" / f"{source.stem}.ipynb"
        write_if_changed(target, convert(source, target))
    if (readme := root / "README.md").exists():
        write_if_changed(readme, BADGE_URL.sub(badge_folder(address), readme.read_text()))


if __name__ == "__main__":
    main(Path(__file__).resolve().parent.parent)
