"""Pictures: the loss curve, and how a notebook shows it."""

import itertools

from onechip.errors import in_notebook
from onechip.files import atomic_write

_cells_with_a_picture = set()  # display ids of cells that show one already


def show_picture(path):
    """Shows a PNG below the running cell of a notebook, in place of the last one; None reserves the place."""
    if in_notebook():
        from IPython import get_ipython
        from IPython.display import HTML, Image, display

        cell = f"onechip-{get_ipython().execution_count}"
        picture = Image(path, width=800) if path else HTML()
        display(picture, display_id=cell, update=cell in _cells_with_a_picture)
        _cells_with_a_picture.add(cell)


def title_losses(evals, gzip_bpb=None):
    """The title of a loss curve: the newest held-out score, in bits per byte where the rows have that."""
    if not evals:
        return "training"
    if "val_bpb" not in evals[-1]:
        return f"{evals[-1]['val_loss']:.3f} nats per token held out"
    bits = f"{evals[-1]['val_bpb']:.3f} bits per byte held out"
    return bits if gzip_bpb is None else f"{bits}; gzip -9 needs {gzip_bpb:.3f}"


def plot_losses(rows, path, gzip_bpb=None):
    """Writes a PNG from rows of metrics.jsonl: training and held-out loss, and the learning rate below.

    gzip_bpb: bits per byte that gzip -9 needs for the held-out text, to compare with.
    """
    from matplotlib.figure import Figure  # here, because importing it looks for fonts

    steps, evals = ([row for row in rows if name in row] for name in ("loss", "val_loss"))
    x, loss = [row["step"] for row in steps], [row["loss"] for row in steps]
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot(x, loss, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, every step")
    span = max(20, len(loss) // 100)
    if len(loss) >= span:
        sums = list(itertools.accumulate(loss, initial=0.0))
        mean = [(b - a) / span for a, b in zip(sums, sums[span:], strict=False)]
        above.plot(x[span - 1 :], mean, color="tab:blue", label=f"training, mean of {span} steps")
    dots = {"marker": "o", "markersize": 6 if len(evals) < 20 else 2}
    above.plot([row["step"] for row in evals], [row["val_loss"] for row in evals], color="C1", label="held out", **dots)
    above.set(title=title_losses(evals, gzip_bpb), ylabel="loss, nats per token", yscale="log")
    for axis_format in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
        axis_format("{x:.4g}")
    above.legend()
    above.grid(alpha=0.3, which="both")
    rates = [row for row in steps if "lr" in row]
    below.plot([row["step"] for row in rates], [row["lr"] for row in rates], color="tab:green")
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    below.grid(alpha=0.3)
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)


def plot_rewards(rows, path, gzip_bpb=None):
    """Writes a PNG from rows of metrics.jsonl: the rewards of a step's answers, pass@1 on held-out problems, and below
    how long the answers are. gzip_bpb is not used: the argument is plot_losses'."""
    from matplotlib.figure import Figure

    steps, asked = ([row for row in rows if name in row] for name in ("rollouts/reward", "tasks/pass@1"))
    x, figure = [row["step"] for row in steps], Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    reward = [row["rollouts/reward"] for row in steps]
    above.plot(x, reward, color="tab:blue", alpha=0.35, linewidth=0.8, label="reward of a step's answers")
    for name in [name for name in (asked[-1] if asked else {}) if name.startswith("tasks/pass@")]:
        above.plot([r["step"] for r in asked], [r[name] for r in asked], marker="o", label=f"{name[6:]}, held out")
    above.set(ylabel="share", ylim=(0, 1.02), title=f"pass@1 {asked[-1]['tasks/pass@1']:.3f}" if asked else "training")
    above.legend()
    above.grid(alpha=0.3)
    below.plot(x, [row["rollouts/tokens"] for row in steps], color="tab:green")
    below.set(xlabel="step", ylabel="tokens", ylim=(0, None))
    below.grid(alpha=0.3)
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)
