"""onechip/plots.py: the picture of a run's losses, and its place in a notebook."""

import hashlib
import sys
import types

import matplotlib
import matplotlib.figure
import matplotlib.image
import pytest

from onechip import plots
from onechip.plots import plot_losses, show_picture


def make_rows(steps, every, scores):
    """Rows as a run writes them: one per step, one more per evaluation with scores(step)."""
    rows = []
    for step in range(1, steps + 1):
        loss = 9.0 / (1 + step / 40) + (step % 7) / 10
        rows.append({"step": step, "loss": loss, "grad_norm": 0.5, "lr": 1e-3 * min(1, step / 24)})
        if step % every == 0:
            rows.append({"step": step, **scores(step)})
    return rows


def both(step):
    return {"val_loss": 9.1 / (1 + step / 40), "val_bpb": 4.0 / (1 + step / 200)}


def loss_only(step):
    return {"val_loss": 9.1 / (1 + step / 40)}


@pytest.mark.skipif(matplotlib.__version__ != "3.11.2", reason="pixels of the locked matplotlib")
@pytest.mark.parametrize(
    "steps, every, pixels",
    [
        (240, 80, "1657bf8b90411373289966160aacc918335b869a26f05fc8109d13764e64ec95"),
        (12, 99, "998f054ba491276552d73f6efd82e478f3695a60dc5859c908f09a7585e459da"),
    ],
)
def test_the_picture_of_a_text_run_stays_as_it_is(tmp_path, steps, every, pixels):
    """SHA-256 of the pixels (600, 960, RGBA), computed from the drawing at commit 77a4437: with and without scores."""
    plot_losses(make_rows(steps, every, both), tmp_path / "loss.png", 2.383)
    image = (matplotlib.image.imread(tmp_path / "loss.png") * 255).round().astype("uint8")
    assert image.shape == (600, 960, 4) and hashlib.sha256(image.tobytes()).hexdigest() == pixels


def test_a_task_without_a_learning_rate_has_a_picture(tmp_path):
    """Its rows have a loss alone."""
    rows = [{name: row[name] for name in ("step", "loss") if name in row} for row in make_rows(12, 99, both)]
    plot_losses(rows, tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape == (600, 960, 4)


@pytest.mark.parametrize(
    "every, scores, gzip_bpb, title",
    [
        (80, both, 2.383, "1.818 bits per byte held out; gzip -9 needs 2.383"),
        (80, both, None, "1.818 bits per byte held out"),
        (80, loss_only, 2.383, "1.300 nats per token held out"),
        (999, both, 2.383, "training"),
    ],
)
def test_the_title_is_the_newest_score_that_there_is(tmp_path, monkeypatch, every, scores, gzip_bpb, title):
    drawn, real = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **options):
        drawn.append(figure)
        real(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    plot_losses(make_rows(240, every, scores), tmp_path / "loss.png", gzip_bpb)
    assert drawn[0].axes[0].get_title() == title
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.fixture
def cell(monkeypatch):
    """A notebook's kernel of which only the running cell and what it displays are there."""
    shell = types.SimpleNamespace(execution_count=1, shown=[])
    monkeypatch.setattr(plots, "in_notebook", lambda: True)
    monkeypatch.setattr(plots, "_cells_with_a_picture", set())
    display = types.ModuleType("IPython.display")
    display.Image, display.HTML = (lambda path, width: path), (lambda: None)
    display.display = lambda what, display_id, update: shell.shown.append((what, display_id, update))
    ipython = types.ModuleType("IPython")
    ipython.get_ipython, ipython.display = (lambda: shell), display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shell


def test_a_picture_takes_the_place_of_the_last_one_of_its_cell(cell):
    """The first of a cell, or the place kept for it, is new; the next replaces it; another cell has its own."""
    show_picture(None)
    show_picture("1.png")
    cell.execution_count = 2
    show_picture("2.png")
    assert cell.shown == [(None, "onechip-1", False), ("1.png", "onechip-1", True), ("2.png", "onechip-2", False)]


def test_a_script_shows_no_picture(capsys):
    show_picture("nowhere.png")
    assert capsys.readouterr().out == ""
