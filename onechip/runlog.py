"""What a run logs: metrics.jsonl, TensorBoard's charts, the progress bar."""

import contextlib
import json
import math
import sys
import threading
import time
import warnings
from pathlib import Path

from onechip.disk import Disk
from onechip.errors import NonFiniteLoss, in_notebook, say_above_bars
from onechip.files import reporting_full_disk, write_text
from onechip.hosts import is_first
from onechip.plots import show_picture
from onechip.runfolder import METRICS

# Names in metrics.jsonl -> in TensorBoard, which groups charts by the word before the slash and opens two groups.
CHARTS = {
    "loss": "loss/training, nats per token",
    "val_loss": "loss/held out, nats per token",
    "val_bpb": "loss/held out, bits per byte",
    "lr": "step/learning rate",
    "grad_norm": "step/gradient norm",
    "tokens_per_second": "step/tokens per second",
    "mfu": "step/MFU",
}
IN_THE_BAR = {"loss": "{:.3f}", "lr": "{:.1e}", "rollouts/reward": "{:.3f}"}


class EventFile:
    """The rows of metrics.jsonl as TensorBoard's charts; does nothing where tensorboard cannot be imported.

    Each start writes the whole history to a new file and removes the old one, so that no step of a resumed run is
    charted twice: 0.6 s for 20,000 rows. Needs protocol buffers only; TensorFlow is not imported.
    """

    def __init__(self, folder, rows):
        old = list(Path(folder).glob("events.out.tfevents.*"))
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except Exception:  # not installed, or not together with this protobuf: training works without charts
            self._writer = None
            return
        self._event, self._summary, self._time = Event, Summary, time.time()
        # A TensorBoard that is running keeps the old file open: only a new name makes it read from the start again.
        self._writer = RecordWriter(open(Path(folder) / f"events.out.tfevents.{time.time_ns()}", "wb"))
        for row in rows:
            self.write(row)
        for path in old:
            path.unlink()

    def write(self, row):
        """Adds the values that CHARTS has a name for, and those whose name has a slash, as a chart's has."""
        if self._writer:
            self._time = row.get("time", self._time)
            tags = {CHARTS.get(name, name): value for name, value in row.items() if name in CHARTS or "/" in name}
            values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()]
            event = self._event(wall_time=self._time, step=row["step"], summary=self._summary(value=values))
            self._writer.write(event.SerializeToString())

    def flush(self):
        if self._writer:
            self._writer.flush()

    def close(self):
        if self._writer:
            self._writer.close()


class RunLog:
    """Metrics of a run: metrics.jsonl, TensorBoard's charts, the progress bar, and `on_log(row)` for other listeners.

    `add` takes a step's metrics while they are still on the device. They are fetched every `every` steps, and one step
    late: while the host waits for a value, the device already has the next step queued. A disk that fails costs no row:
    all are in `rows`, and the files are written again from these when it works again. Of several hosts, host 0 writes,
    shows and reports; the others fetch as it does, so that all learn of a loss that is not finite.
    """

    def __init__(
        self, path, steps, first_step, tokens_per_step, peak_rate=None, on_log=None, every=10, rows=(), disk=None
    ):
        """steps: of the whole run, `first_step` of them complete; rows: those up to the checkpoint that is resumed.

        Later rows in the file at `path` are dropped, as their steps run again. peak_rate: tokens/s at the devices' peak
        FLOP/s, for MFU; None where it is not known. UserError if the disk is full already.
        """
        self.rows, self._path, self._files, self._whole = list(rows), Path(path), [], True
        self._disk, self._mine = disk or Disk(self._path.parent), is_first()
        self._write_anew()
        self._pending, self._every, self.on_log = [], every, on_log if self._mine else None
        self._tokens, self._peak = tokens_per_step, peak_rate
        if self._mine:
            show_picture(None)  # its place is above the bar
        self._bar = progress_bar(total=steps, initial=first_step, unit="step", disable=not self._mine)
        self._shown, self._since = {}, None

    def set_pace(self, tokens_per_step, peak_rate):
        """What a step is from the next one on, as __init__ takes it; waits for those before."""
        self.flush()
        self._tokens, self._peak = tokens_per_step, peak_rate

    def add(self, step, metrics):
        """Takes the metrics of the step that was just dispatched: scalars on the device, by name.

        step: the number of steps complete with it.
        """
        self._pending.append((step, metrics))
        if len(self._pending) > self._every:
            self.flush(keep=1)

    def flush(self, keep=0):
        """Fetches and writes pending metrics, except the newest `keep`; NonFiniteLoss if a loss or gradient is one."""
        import jax

        count = len(self._pending) - keep
        fetched = jax.device_get([metrics for _, metrics in self._pending[:count]])
        times = self._time(count)
        for metrics in fetched:
            step, _ = self._pending.pop(0)  # one by one: a listener that raises must not cost the rows after it
            row = {"step": step, **{name: float(value) for name, value in metrics.items()}, **times}
            check_finite(row)
            self._shown |= {name: form.format(row[name]) for name, form in IN_THE_BAR.items() if name in row}
            self.write(row)
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(count)

    def _time(self, steps):
        """The time and, from the second call on, the speed of `steps` steps since the last call, as part of a row."""
        now, times = time.perf_counter(), {"time": round(time.time(), 3)}
        if self._since is not None and steps and now > self._since:
            rate = steps * self._tokens / (now - self._since)
            times["tokens_per_second"], self._shown["tok/s"] = round(rate), f"{rate:,.0f}"
            if self._peak:
                times["mfu"], self._shown["MFU"] = round(rate / self._peak, 4), f"{rate / self._peak:.1%}"
        self._since = now
        return times

    def write(self, row):
        """Adds one row of metrics."""
        self.rows.append(row)
        if not self._mine:
            return
        if self._whole:
            self._whole = self._disk.attempt(METRICS, self._append, row)
        elif not self._disk.waits(METRICS):
            self.complete()
        if self.on_log:
            self.on_log(row)

    def complete(self):
        """Writes the files anew if a disk that failed has left rows out."""
        if not self._whole:
            self._whole = self._disk.attempt(METRICS, self._write_anew)

    def _append(self, row):
        with reporting_full_disk(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._events.write(row)
            self._events.flush()

    def _write_anew(self):
        self._close_files()
        if not self._mine:
            return
        write_text(self._path, self.text())
        with reporting_full_disk(self._path):
            self._file = open(self._path, "a")
            self._files.append(self._file)
            self._events = EventFile(self._path.parent, self.rows)
            self._files.append(self._events)
            self._events.flush()

    def text(self, count=None):
        """The first `count` rows, or all, as metrics.jsonl has them."""
        return "".join(json.dumps(row) + "\n" for row in self.rows[:count])

    @contextlib.contextmanager
    def pause(self):
        """Fetches what is pending, and leaves the time of what runs inside out of the next tok/s."""
        self.flush()
        yield
        self._since = time.perf_counter()

    def show(self, **values):
        """Puts values into the progress bar."""
        self._shown |= values

    def say(self, text):
        """Prints a line above the progress bar."""
        say_above_bars(text)

    def close(self):
        """Ends the bar, writes what is missing and closes the files."""
        self._bar.close()
        self.complete()
        self._close_files()

    def _close_files(self):
        while self._files:
            with contextlib.suppress(OSError):  # what a disk did not take has been reported, and is written anew
                self._files.pop().close()


def check_finite(row):
    """NonFiniteLoss if the loss or the gradient norm of a row, where it has one, is infinite or not a number.

    The gradient is often the first to go: the step's loss is then finite, and the parameters after it are not.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row.get(name, 0.0)):
            what = f"the {name} of step {row['step']} is {row[name]}"
            raise NonFiniteLoss(f"{what}: lower learning_rate or set grad_clip")


def progress_bar(**options):
    """A tqdm bar that stays one line: in a terminal, in a notebook with or without ipywidgets, in a log file."""
    with warnings.catch_warnings(action="ignore"):  # about missing ipywidgets: the plain bar will do
        from tqdm.auto import tqdm

    live = in_notebook() or sys.stderr.isatty()
    pace = {"mininterval": 1.0 if live else 60.0, "maxinterval": 60.0}  # a log file keeps every bar: one a minute
    # A plain bar in a notebook is one line only if other text goes to the same stream. A sweep's trials run in a
    # thread: there a bar is removed at its end, so that the next trial starts on an empty line.
    stream = sys.stdout if in_notebook() else sys.stderr
    leave = not in_notebook() or threading.current_thread() is threading.main_thread()
    return tqdm(file=stream, leave=leave, dynamic_ncols=True, **pace, **options)
