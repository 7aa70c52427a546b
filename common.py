"""Plumbing that every notebook needs and no notebook teaches: settings, secrets, one-line errors, whole files."""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import glob
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

# PCI ids of TPU v2 to v7, as JAX's own hardware check lists them.
TPU_PCI_IDS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


class UserError(ValueError):
    """Bad input. The message is one line: the field or file, its value, and what would be right."""


def require(condition, field, value, remedy):
    """Raises UserError naming the field, its value and what would be right, unless the condition holds."""
    if not condition:
        raise UserError(f"{field}={value!r}: {remedy}")


def say(text):
    """Prints one line at once: Colab holds unflushed lines back."""
    print(text, flush=True)


def home():
    """The folder for what all runs share (shards, tokenizers, compiled programs): ONECHIP_HOME or ~/.cache/onechip."""
    return Path(os.environ.get("ONECHIP_HOME") or Path.home() / ".cache" / "onechip")


def in_notebook():
    """True in a Jupyter or Colab kernel, false in a script and in a terminal's IPython."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


# ----------------------------------------------------------------------------------------------------------------------
# Devices


def has_tpu():
    """Whether a TPU chip is on this machine's PCI bus."""
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        device = Path(vendor).with_name("device")
        with contextlib.suppress(OSError):
            if Path(vendor).read_text().strip() == "0x1ae0" and device.read_text().strip() in TPU_PCI_IDS:
                return True
    return False


def quiet_jax():
    """Keeps libtpu, installed here for its compiler, from looking for a TPU that is not there, at length, on stderr."""
    if not has_tpu():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_LOG_DIR", "disabled")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # What it would ask the cloud for. A program is compiled for the topology that is named, whatever stands here,
        # but libtpu 0.0.23 (jax 0.7.2) aborts in cost_analysis() if this is a v6e or a v4.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        if not any(map(os.path.exists, GPU_FILES)):
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            if "jax" in sys.modules:  # it has read the variable already
                sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


quiet_jax()


def keep_compiled():
    """Keeps compiled programs on disk: the next start of the same config reaches its first step sooner."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(home() / "compiled"))
        # the default keeps what took a second: a start has a dozen programs that take less, and two seconds together
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def keep_freed_memory():
    """Has the C library keep what XLA frees after each step on a CPU, instead of giving it back to the system.

    Fresh pages for XLA's temporaries cost a fifth of a small model's step (LOG 2026-11-20). These are glibc's settings
    M_ARENA_MAX 1, M_MMAP_MAX 0 and M_TRIM_THRESHOLD never, for threads that are yet to come: call it before JAX is
    used. A C library without mallopt is left as it is.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for name, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
            library.mallopt(name, value)


# ----------------------------------------------------------------------------------------------------------------------
# Settings: dataclasses are the only list of what can be set


def setting(default, help, fixed=False):
    """A dataclass field with a default and the line that `--help` shows for it; fixed: a run never changes it."""
    return dataclasses.field(default=default, metadata={"help": help, "fixed": fixed})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}. --help lists every setting")


def boolean(text):
    """true or false, yes or no, 1 or 0."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")


def _make_parser(classes):
    parser = _Parser(prog=Path(sys.argv[0]).name, allow_abbrev=False, usage="%(prog)s [--name value ...]")
    for cls in classes:
        group = parser.add_argument_group(cls.__name__, (cls.__doc__ or "").strip().splitlines()[0])
        for field in dataclasses.fields(cls):
            group.add_argument(
                f"--{field.name}",
                type=boolean if field.type is bool else field.type,
                default=argparse.SUPPRESS,
                metavar=field.type.__name__.upper(),
                help=f"{field.metadata.get('help', '')} (default: {field.default!r})".replace("%", "%%"),
            )
    return parser


def parse_settings(*classes, overrides=""):
    """What a user set, as one dict of field values per dataclass in `classes`.

    In a notebook that is the text `overrides` ("--n_head 4 --data offline"), in a script the command line after it.
    Raises UserError on a wrong name, with the nearest right one, and on a value of the wrong type.
    """
    if not in_notebook():
        sys.excepthook = print_one_line_errors
    words = shlex.split(overrides) + ([] if in_notebook() else sys.argv[1:])
    given, unknown = _make_parser(classes).parse_known_args(words)
    if unknown:
        names = [field.name for cls in classes for field in dataclasses.fields(cls)]
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, n=1)
        hint = f"; did you mean --{near[0]}?" if near else "."
        raise UserError(f"unknown setting {unknown[0]!r}{hint} --help lists every setting")
    return [{f.name: getattr(given, f.name) for f in dataclasses.fields(cls) if f.name in given} for cls in classes]


def print_one_line_errors(kind, error, traceback):
    """An excepthook for scripts: bad input is told in one line, anything else with its traceback."""
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# ----------------------------------------------------------------------------------------------------------------------
# Secrets


def read_secret(name):
    """The value of a secret such as HF_TOKEN, or None: the environment first, then Colab's secrets. Never printed.

    Colab's `userdata.get` asks the browser and raises if the secret is missing, not granted or late (10 s), so read
    each secret once, early; a public download needs none.
    """
    if os.environ.get(name, "").strip():
        return os.environ[name].strip()  # pasted with a line's end, it would stand in the client's error message
    if not in_notebook():
        return None
    try:
        from google.colab import userdata
    except ImportError:
        return None
    try:
        return (userdata.get(name) or "").strip() or None
    except Exception as error:  # three classes of Colab's own, by their names
        reason = {
            "SecretNotFoundError": "it is not among this account's secrets (key icon, left)",
            "NotebookAccessError": "this notebook has no access to it (key icon, left)",
            "TimeoutException": "the browser did not answer in time",
        }.get(type(error).__name__, type(error).__name__)
        say(f"secret {name}: {reason}; going on without it")
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Files: whole or not at all


def fsync_path(path):
    """Forces a file's or folder's content to disk, so that a rename after it cannot outlive it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_full(error):
    """Whether an error says that the disk, or one's share of it, is full; safetensors says it in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


@contextlib.contextmanager
def telling_full_disk(path):
    """Raises UserError, naming `path`, for whatever error says that the disk is full."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"{path}: the disk is full; free some space and run again, nothing half-written is left"
        ) from None


@contextlib.contextmanager
def atomic_write(path):
    """Yields a path beside `path` to write a file or folder to; renames it to `path` on success, removes it on failure.

    A reader sees the old file or the new one, never a part, whatever moment the machine dies at. A full disk raises
    UserError and leaves nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)) / path.name
    try:
        with telling_full_disk(path):
            yield beside
            for written in [*beside.rglob("*"), beside]:  # a folder's entries need their own sync
                fsync_path(written)
            os.replace(beside, path)
            fsync_path(path.parent)
    finally:
        shutil.rmtree(beside.parent, ignore_errors=True)


class _Interrupt:
    requested = False
    insisted = False  # a second one: KeyboardInterrupt was raised, in the middle of anything


@contextlib.contextmanager
def deferred_interrupt():
    """Notes the first SIGINT or SIGTERM in `.requested` instead of ending the program; a second one is raised.

    Only a program's main thread gets signals: elsewhere this does nothing.
    """
    noted = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum, frame):
        if noted.requested:
            noted.insisted = True
            raise KeyboardInterrupt
        noted.requested = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def git_commit():
    """The commit of the files that run, with "+" behind it if they were changed since; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


class NonFiniteLoss(UserError):
    """A loss or gradient that is no longer a number."""


# Names in metrics.jsonl -> in TensorBoard, grouped by what stands before the slash: it opens two groups by itself.
CHARTS = {
    "loss": "loss/training, nats per token",
    "val_loss": "loss/held out, nats per token",
    "val_bpb": "loss/held out, bits per byte",
    "lr": "step/learning rate",
    "grad_norm": "step/gradient norm",
    "tokens_per_second": "step/tokens per second",
    "mfu": "step/MFU",
}


class EventFile:
    """The rows of metrics.jsonl as TensorBoard's charts; does nothing where tensorboard cannot be imported.

    Each start writes the whole history to a new file and removes the old one, so that a resumed run's curves have no
    step twice: 0.6 s for 20,000 rows. Protocol buffers only; no TensorFlow is imported.
    """

    def __init__(self, folder, rows):
        old = list(Path(folder).glob("events.out.tfevents.*"))
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except Exception:  # not installed, or not beside this protobuf: no charts are no reason not to train
            self._writer = None
            return
        self._event, self._summary, self._time = Event, Summary, time.time()
        # A reader that is at work keeps the old file open: only a new name tells it to start again.
        self._writer = RecordWriter(open(Path(folder) / f"events.out.tfevents.{time.time_ns()}", "wb"))
        for row in rows:
            self.write(row)
        for path in old:
            path.unlink()

    def write(self, row):
        """Adds what CHARTS has a name for."""
        if self._writer:
            self._time = row.get("time", self._time)
            values = [self._summary.Value(tag=CHARTS[k], simple_value=v) for k, v in row.items() if k in CHARTS]
            event = self._event(wall_time=self._time, step=row["step"], summary=self._summary(value=values))
            self._writer.write(event.SerializeToString())

    def flush(self):
        if self._writer:
            self._writer.flush()

    def close(self):
        if self._writer:
            self._writer.close()


class RunLog:
    """Metrics of a run: metrics.jsonl, TensorBoard's charts, the progress bar, and `on_log(row)` for anyone else.

    `add` takes a step's metrics while they are still on the device. They are fetched every `every` steps and one step
    late, so that the device always has a step queued while the host looks at the last.
    """

    def __init__(self, path, steps, first_step, tokens_per_step, peak_rate=None, on_log=None, every=10, rows=()):
        """peak_rate: tokens/s at the device's peak FLOPS, for MFU; None where that is not known."""
        self.rows = list(rows)  # those of the steps that a checkpoint holds; what the file has beyond is made again
        with atomic_write(path) as part:
            part.write_text(self.text())
        self._file = open(path, "a")
        with telling_full_disk(path):
            self._events = EventFile(Path(path).parent, self.rows)
            self._events.flush()
        self._pending, self._every, self._on_log = [], every, on_log
        self._tokens, self._peak = tokens_per_step, peak_rate
        show_picture(None)  # its place is above the bar
        self._bar = progress_bar(total=steps, initial=first_step, unit="step")
        self._shown, self._since = {}, None

    def add(self, step, metrics):
        """Notes the metrics, device scalars by name, of the step that made `step` steps complete."""
        self._pending.append((step, metrics))
        if len(self._pending) > self._every:
            self.flush(keep=1)

    def flush(self, keep=0):
        """Fetches and writes what is pending, but for the newest `keep` steps; UserError if a loss is not finite."""
        import jax

        count = len(self._pending) - keep
        fetched = jax.device_get([metrics for _, metrics in self._pending[:count]])
        times = self._time(count)
        for metrics in fetched:
            step, _ = self._pending.pop(0)  # one by one: a listener that raises must not cost the rows behind
            row = {"step": step, **{name: float(value) for name, value in metrics.items()}, **times}
            for name in ("loss", "grad_norm"):  # the gradient's goes first, and spoils the parameters
                if not math.isfinite(row[name]):
                    raise NonFiniteLoss(
                        f"the {name} of step {step} is {row[name]}: lower learning_rate or set grad_clip; "
                        "the last good checkpoint is in place"
                    )
            self._shown |= {"loss": f"{row['loss']:.3f}", "lr": f"{row['lr']:.1e}"}
            self.write(row)
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(count)

    def _time(self, steps):
        now, times = time.perf_counter(), {"time": round(time.time(), 3)}
        if self._since is not None and steps:
            rate = steps * self._tokens / (now - self._since)
            times |= {"tokens_per_second": round(rate)} | ({"mfu": round(rate / self._peak, 4)} if self._peak else {})
            self._shown |= {"tok/s": f"{rate:,.0f}"} | ({"MFU": f"{rate / self._peak:.1%}"} if self._peak else {})
        self._since = now
        return times

    def write(self, row):
        """Adds one row of metrics."""
        self.rows.append(row)
        with telling_full_disk(self._file.name):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._events.write(row)
            self._events.flush()
        if self._on_log:
            self._on_log(row)

    def text(self):
        """All rows as they stand in metrics.jsonl."""
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    @contextlib.contextmanager
    def pause(self):
        """Fetches everything first, and leaves the time of what is done inside out of the next tok/s."""
        self.flush()
        yield
        self._since = time.perf_counter()

    def show(self, **values):
        """Puts values into the progress bar."""
        self._shown |= values

    def say(self, text):
        """Prints a line above the progress bar."""
        self._bar.write(text)

    def close(self):
        self._bar.close()
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):  # a row that a full disk did not take has been told already
                file.close()


@contextlib.contextmanager
def without_tensorflow():
    """Gives jaxlib 0.7's profiler an empty module in place of TensorFlow's, whose absence it complains of on stderr."""
    names = {"tensorflow", "tensorflow.python.profiler.trace"} - set(sys.modules)
    sys.modules |= {name: types.ModuleType(name) for name in names}
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class ProfileWindow:
    """Traces `count` steps from `first` into `folder`, for XProf; a run too short for that traces its last ones.

    Five steps: a long trace loses its device rows (jax#23446) or comes out empty.
    """

    def __init__(self, folder, num_steps, first=15, count=5):
        self._folder = Path(folder)
        self._first = max(0, min(first, num_steps - count))
        self._last = min(num_steps, self._first + count) - 1
        self._on = False

    def before(self, step):
        """Starts the trace if `step`, counted from 0 in this process, opens the window; annotates the step."""
        import jax

        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's frames would be most of the file
            with without_tensorflow():
                jax.profiler.start_trace(self._folder, profiler_options=options)
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step, result):
        """Stops the trace, once `result` is computed, if `step` closes the window."""
        import jax

        if self._on and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self):
        import jax

        if self._on:
            with without_tensorflow():
                jax.profiler.stop_trace()
            self._on = False


def progress_bar(**options):
    """A tqdm bar that stays one line: in a terminal, in a notebook with or without ipywidgets, in a log file."""
    with warnings.catch_warnings(action="ignore"):  # of ipywidgets that are not there: the plain bar will do
        from tqdm.auto import tqdm

    live = in_notebook() or sys.stderr.isatty()
    pace = {"mininterval": 1.0 if live else 60.0, "maxinterval": 60.0}  # a log file keeps every bar, one a minute
    # A plain bar in a notebook is one line only where other text goes to the same stream, and where the next trial of
    # a sweep, which runs in a thread, finds none of the last.
    stream = sys.stdout if in_notebook() else sys.stderr
    leave = not in_notebook() or threading.current_thread() is threading.main_thread()
    return tqdm(file=stream, leave=leave, dynamic_ncols=True, **pace, **options)


def show_picture(path):
    """Shows a PNG below the running cell of a notebook, in place of the last one; None keeps the place for one."""
    if in_notebook():
        from IPython import get_ipython
        from IPython.display import HTML, Image, display

        cell = f"onechip-{get_ipython().execution_count}"
        display(Image(path, width=800) if path else HTML(), display_id=cell, update=cell in show_picture.cells)
        show_picture.cells.add(cell)


show_picture.cells = set()


def plot_losses(rows, gzip_bpb, path):
    """Writes loss.png from rows of metrics.jsonl: training and held-out loss, and the learning rate below."""
    from matplotlib.figure import Figure

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
    bits = f"{evals[-1]['val_bpb']:.3f} bits per byte held out; gzip -9 needs {gzip_bpb:.3f}" if evals else "training"
    above.set(title=bits, ylabel="loss, nats per token", yscale="log")
    for axis_format in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
        axis_format("{x:.4g}")
    above.legend()
    above.grid(alpha=0.3, which="both")
    below.plot(x, [row["lr"] for row in steps], color="tab:green")
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    below.grid(alpha=0.3)
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)


def path_name(path):
    """A pytree path as one word: layers.0.c_q."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def flatten(tree):
    """{"layers.0.c_q": NumPy array, ...} of a pytree of dicts, lists and tuples."""
    import jax
    import numpy as np

    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(template, arrays):
    """The inverse of flatten, in the shape of `template`; UserError names an array that is missing or ill-shaped."""
    import jax

    def find(path, leaf):
        name = path_name(path)
        require(name in arrays, "checkpoint", name, "this array is missing: the checkpoint is of another model")
        shape = arrays[name].shape
        require(shape == leaf.shape, "checkpoint", f"{name} {shape}", f"the model has {leaf.shape}: another config?")
        return arrays[name]

    return jax.tree_util.tree_map_with_path(find, template)


# ----------------------------------------------------------------------------------------------------------------------
# What to run, and what came out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What to run, on which data, and where to leave it."""

    preset: str = setting("", "chip, gpu or laptop; empty: by the device")
    data: str = setting("", "offline, fineweb, or a folder of parquet shards; empty: offline for laptop, else fineweb")
    num_shards: int = setting(0, "FineWeb-Edu shards to train on, 50M tokens each; 0: as many as the run needs")
    name: str = setting("", "name of the run; one that exists is resumed; empty: after its settings")
    out: str = setting("runs", "folder for the runs")
    preflight: str = setting("", 'only say what a step needs, "here" or on a TPU that is not: "v6e:1x1", "v5e:2x2"')
    hub_repo: str = setting("", "Hub repository to upload to, where there is a token; empty: <you>/onechip-<name>")
    weights_minutes: float = setting(15.0, "minutes between uploads of the weights")
    state_minutes: float = setting(60.0, "minutes between uploads of whole checkpoints, three times as large")


def name_run(run, config):
    """A name that is the same for the same settings, so that a second start resumes the first."""
    settings = json.dumps([run.data, run.num_shards, dataclasses.asdict(config)], sort_keys=True)
    return f"{run.preset}-{Path(run.data).name}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"


def choose(config_class, presets, overrides="", run_class=Run):
    """(Run, config) with nothing left open: a preset by the device, then what the user set. Says what and why."""
    run, fields = parse_settings(run_class, config_class, overrides=overrides)
    run, config = settle(run_class(**run), config_class, presets, fields)
    run = dataclasses.replace(run, name=run.name or name_run(run, config))
    batch, tokens = f"{config.total_batch_size} x {config.seq_len}", count_tokens(config) / 1e6
    say(f"run: {run.out}/{run.name}: {config.num_iterations:,} steps of {batch} tokens, {tokens:,.1f}M in all")
    return run, config


def count_tokens(config):
    """Tokens that a config trains on."""
    return config.num_iterations * config.total_batch_size * config.seq_len


def settle(run, config_class, presets, fields):
    """(run, config): preset, data and number of shards of a Run as set or by the device, and what follows from them."""
    import jax

    device = jax.local_devices()[0]
    topology = run.preflight not in ("", "here")
    preset = run.preset or ("chip" if topology else {"tpu": "chip", "cpu": "laptop"}.get(device.platform, "gpu"))
    require(preset in presets, "preset", preset, f"use one of {', '.join(presets)}")
    config = config_class(**{**presets[preset], **fields})
    data = run.data or ("offline" if preset == "laptop" else "fineweb")
    shards = run.num_shards or min(1000, math.ceil(count_tokens(config) / 50e6))
    because = "as set" if run.preset else f"as the device is a {device.platform}"
    whose = "as set" if run.data else f"as the preset is {preset}"
    say(
        f"device: {jax.local_device_count()} x {device.device_kind} (jax {jax.__version__}, {os.cpu_count()} CPU cores)"
    )
    say(f"preset: {preset}, {because}; data: {data}, {whose}; --help lists all that can be set")
    return dataclasses.replace(run, preset=preset, data=data, num_shards=shards), config


def describe_result(result, config):
    """What came out of a run, in a few lines."""
    lines = [f"trained: {result.step:,} of {config.num_iterations:,} steps"]
    if result.val_bpb is not None:
        gain = 1 - result.val_bpb / result.gzip_bpb
        verdict = f"{gain:.0%} below" if gain > 0 else f"{-gain:.0%} above"
        lines[0] += f", held-out loss {result.val_loss:.3f} nats per token"
        lines.append(f"held-out text: {result.val_bpb:.3f} bits per byte, {verdict} gzip -9 with {result.gzip_bpb:.3f}")
    lines += [f"sample: {prompt!r} -> {text!r}" for prompt, text in result.samples]
    names = {
        "events.*" if p.name.startswith("events.") else p.name + "/" * p.is_dir() for p in result.run_dir.iterdir()
    }
    lines.append(f"left in {result.run_dir}: {', '.join(sorted(names))}")
    return "\n".join(lines)


PLAIN_WEIGHTS = """\
The tokenizer alone: `transformers.AutoTokenizer.from_pretrained`, or `tokenizers.Tokenizer.from_file("tokenizer.json")`
with `encode_special_tokens = True` for text that you did not write. Every document of the training text began with
`<|bos|>`, which neither adds. The weights are plain arrays by name in `params.safetensors`."""


def model_card(result, about, parameters, loading, dataset="", notes=PLAIN_WEIGHTS, library="jax"):
    """README.md of a model's repository: what it is, how good, from what, and how to load it.

    about: the run's config.json as a dict; loading: lines of Python that sample from the model, which must run as they
    stand in a clone of the repository; dataset: the Hub's name of what it was trained on, if it has one; notes: what
    else who loads it must know; library: the Hub's name of the one that `loading` uses.
    """
    config, data, commit = about["config"], about["data"], about["commit"] or "unknown"
    batch, source = config["total_batch_size"] * config["seq_len"], f"{data['name']} at revision `{data['revision']}`"
    score = "not taken yet"
    if result.val_bpb is not None:
        score = f"{result.val_bpb:.3f} bits per byte, where gzip -9 needs {result.gzip_bpb:.3f}"
        score += f"; {result.val_loss:.3f} nats per token"
    rows = {
        "held-out text": score,
        "size": f"{parameters:,} parameters, float32",
        "trained": f"{result.step:,} of {config['num_iterations']:,} steps of {batch:,} tokens, "
        f"{result.step * batch:,} in all",
        "data": f"{source}, {data['shards']} training shards",
        "tokenizer": f"byte-level BPE, {config['vocab_size']:,} tokens",
        "made with": f"commit {commit[:12]}{commit[40:]}, jax {about['jax']}, {about['device']}",
    }
    samples = "\n".join(f"{prompt!r} -> {text!r}" for prompt, text in result.samples)
    return MODEL_CARD.format(
        name=result.run_dir.name,
        datasets=f"datasets:\n- {dataset}\n" if dataset else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        loading=loading.strip(),
        notes=notes,
        library=library,
        samples=samples or "none were taken",
        config=json.dumps(config, indent=2),
    )


MODEL_CARD = """\
---
license: mit
library_name: {library}
pipeline_tag: text-generation
tags:
- jax
- gpt
- nanochat
- onechip
{datasets}---
# {name}

A GPT in the manner of nanochat, pretrained from scratch by onechip. It goes on with a text; it has not been taught to
answer questions or to follow instructions, and what it writes may be wrong or offensive.

| | |
|---|---|
{table}

![Training and held-out loss](loss.png)

## Load it and sample

```python
{loading}
```

{notes}

What it wrote at the end of its training:

```
{samples}
```

## Config

```json
{config}
```

Code: MIT. The licence above is meant for the weights; the training text has its own.
"""


def open_tensorboard(run_dir):
    """Shows TensorBoard below the cell on Colab; elsewhere says how to start it."""
    if "google.colab" not in sys.modules:
        say(f"curves and profile: uv run tensorboard --logdir {run_dir}")
        return
    try:
        from tensorboard import notebook
    except ImportError:  # pip could not install it, which the opening cell has said
        say(f"curves and profile: there is no TensorBoard here; it can be shown {run_dir} on another machine")
        return
    notebook.start(f"--logdir {shlex.quote(str(run_dir))}")


def give_back_machine(uploaded):
    """Ends Colab's session, and its cost with it; not while what was made is nowhere else (`uploaded` is empty)."""
    if "google.colab" not in sys.modules:
        return
    if not uploaded:
        say("machine: kept, as its disk is the only place where the model is")
        return
    from google.colab import runtime

    runtime.unassign()


# ----------------------------------------------------------------------------------------------------------------------
# The Hub

ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds, doubled with each attempt
STALL = 60.0  # seconds without a byte


def first_line(error: BaseException) -> str:
    """An error's message, short and on one line, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def load_hub():
    """Imports huggingface_hub with time-outs; it reads them, and HF_ENDPOINT, from the environment at its import."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "20")
    # Plain HTTP keeps to these time-outs; a xet download can hang for ever (huggingface_hub#4085).
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    from huggingface_hub.utils import _http

    if _http.default_client_factory is not _make_client.made_by:  # once: setting it closes the open connections
        _make_client.made_by = _http.default_client_factory
        huggingface_hub.set_client_factory(_make_client)
    return huggingface_hub


def _make_client():
    client = _make_client.made_by()
    client.timeout = STALL  # its own is none: an upload that stalls would never end
    return client


_make_client.made_by = None


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help: what was asked for is not there or not ours, or the disk is full."""
    errors = load_hub().errors
    absent = (errors.RemoteEntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
    return refused or isinstance(error, absent) or is_full(error)


def try_again(action, what: str):
    """action(), again after 1, 2, 4, 8 s when it fails; UserError when it keeps failing, "<what> (<reason>)"."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # httpx's, huggingface_hub's and the system's errors have no common class
            final = is_final(error)
            if final or attempt == ATTEMPTS - 1:
                tried = "" if final else f" after {ATTEMPTS} attempts"
                remedy = "check the name and revision" if final else "check the network and run again"
                raise UserError(f"{what}{tried} ({first_line(error)}); {remedy}, what came is kept") from error
        time.sleep(FIRST_PAUSE * 2**attempt)


def upload_folder(folder: Path, files: list[str], token: str | None, hub_repo: str = "", name: str = "") -> str | None:
    """One commit with `files` of `folder` to `hub_repo` (default: <you>/<name>), made private if it is new.

    Returns the commit's address, or None with a line that says why nothing was uploaded: no token, or a refusal.
    """
    if not token:
        say(f"upload: none, as there is no HF_TOKEN in the environment or in Colab's secrets; all is in {folder}")
        return None
    api = load_hub().HfApi(token=token)
    try:
        hub_repo = hub_repo or f"{api.whoami()['name']}/{name}"
        api.create_repo(hub_repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=hub_repo, folder_path=folder, allow_patterns=files, commit_message=f"Upload {', '.join(files)}"
        )
    except Exception as error:  # what was trained is on disk: a refusal must not end the run
        say(f"upload: none, as the Hub refused {hub_repo or name} ({first_line(error)}); all is in {folder}")
        return None
    say(f"upload: {', '.join(files)} to {commit.commit_url}")
    return commit.commit_url


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: whole, verified, written behind training's back


MANIFEST = "manifest.json"


def hash_file(path):
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def removing_on_error(folder):
    """Removes a folder that could not be completed: on a full disk, its space is what the next attempt needs."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_checkpoint(path, files):
    """Writes a folder of `files` {name: bytes, or dict of arrays for safetensors}, whole or not at all.

    Beside its place, each file synced; then manifest.json with sizes and SHA-256, the folder, the rename, the parent:
    whatever the moment of a crash, a folder under its final name was complete, and the manifest tells if it still is.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    manifest = {}
    with telling_full_disk(path), removing_on_error(part):
        for name, content in files.items():
            if isinstance(content, bytes):
                (part / name).write_bytes(content)
            else:
                save_file(content, part / name)
            fsync_path(part / name)
            manifest[name] = {"bytes": (part / name).stat().st_size, "sha256": hash_file(part / name)}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2))
        fsync_path(part / MANIFEST)
        fsync_path(part)
        os.replace(part, path)
        fsync_path(path.parent)


def find_damage(path):
    """What is wrong with a checkpoint folder, in words, or None: every file must be as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    damages = (find_file_damage(path / name, *entry) for name, entry in expected.items())
    return next(filter(None, damages), None) if expected else f"{MANIFEST} names no file"


def find_file_damage(file, size, sha256):
    """What is wrong with one file of a checkpoint, in words, or None."""
    try:
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size:,} bytes, not {size}"
        return None if hash_file(file) == sha256 else f"{file.name} has another SHA-256 than when it was written"
    except OSError as error:  # a disk that goes bad
        return f"{file.name} cannot be read ({first_line(error)})"


def newest_checkpoint(folder):
    """The newest whole checkpoint under `folder`, or None. Damaged ones are named, and set aside, never deleted."""
    for path in sorted(Path(folder).glob("step_*"), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        aside = next(p for i in itertools.count() if not (p := path.with_name(f"damaged_{path.name}_{i}")).exists())
        path.rename(aside)
        say(f"checkpoint: {path} is damaged: {damage}; set aside as {aside.name}")
    return None


def clear_leftovers(folder):
    """Removes what a process that was killed left half-written, half-uploaded or half-downloaded under `folder`."""
    for pattern in (".*.part", ".*.upload", ".*.download"):
        for left in Path(folder).glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def fixed_fields(config_class):
    """Names of the fields that a run keeps from its first step to its last."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata["fixed"]]


def compare_with_checkpoint(path, config, made_from):
    """Says what is not as it was when the checkpoint was written; UserError for a field that may not change."""
    made_before = json.loads((Path(path) / "state.json").read_text())["made_from"]
    before, now = json.loads((Path(path) / "config.json").read_text()), dataclasses.asdict(config)
    fixed = fixed_fields(config)
    for name in (name for name in now if now[name] != before.get(name)):
        remedy = f"{path} was made with {before.get(name)!r}; set that, or another name for a new run"
        require(name not in fixed, name, now[name], remedy)
        say(f"changed: {name} is {now[name]!r}, was {before.get(name)!r} up to here")
    for name, value in made_from.items():
        if value != made_before.get(name):
            say(f"changed: {name} is {value}, was {made_before.get(name)} up to here")


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread, and keeps the last `keep` and the best.

    `save` waits for the write before it and hands over; an error in the thread is raised by the next `save`, `check`
    or `close`. `after(path)` is called in the thread when a checkpoint is in place.
    """

    def __init__(self, folder, keep=2, after=None):
        self._folder, self._keep, self._after = Path(folder), keep, after
        self._thread, self._error = None, None

    def save(self, step, files, best=None):
        """Starts writing step_NNNNNNNN; `best` is the step whose checkpoint must not be cleared away."""
        self.wait()
        path = self._folder / f"step_{step:08d}"
        if path.exists():
            return
        self._thread = threading.Thread(target=self._work, args=(path, files, best), name="checkpoint")
        self._thread.start()

    def _work(self, path, files, best):
        try:
            write_checkpoint(path, files)
            self._clear(best)
            if self._after:
                self._after(path)
        except BaseException as error:
            self._error = error

    def _clear(self, best):
        whole = sorted(self._folder.glob("step_*"))
        for old in whole[: -self._keep]:
            if old.name != f"step_{best or -1:08d}":
                shutil.rmtree(old)

    def check(self):
        """Raises what went wrong in the thread, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self):
        """Waits for the write in progress, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def link_or_copy(source, target):
    """A hard link, or a copy where the file system has none, Google Drive's for one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class HubMirror:
    """A Hub repository as a run's second home: checkpoints go up in a thread, one commit each, and come back from it.

    Weights go up every `weights_minutes`, whole checkpoints every `state_minutes`, the last one in any case. Training
    never waits and never stops for it: what failed after retries is told by `finish`.
    """

    def __init__(self, token, repo, weights_minutes=15.0, state_minutes=60.0):
        self._api, self.repo, self._minutes = load_hub().HfApi(token=token), repo, (weights_minutes, state_minutes)
        self._uploaded = [-math.inf, -math.inf]  # when weights and whole checkpoints last went up
        self._newest, self._whole, self._failures, self._exists = None, None, [], False
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "hub")

    def offer(self, path):
        """Takes a checkpoint that is in place; uploads it if it is due and still the newest when its turn comes."""
        held = path.with_name(f".{path.name}.upload")  # links: clearing old checkpoints away does not touch them
        try:
            shutil.rmtree(held, ignore_errors=True)
            shutil.copytree(path, held, copy_function=link_or_copy)
        except OSError as error:
            self._failures.append(f"{path.name}: cannot be kept for its upload ({first_line(error)})")
            return
        before, self._newest = self._newest, held
        self._pool.submit(self._upload_if_due, held)
        if before:
            self._pool.submit(shutil.rmtree, before, ignore_errors=True)

    def _upload_if_due(self, held):
        weights_due, state_due = (
            time.monotonic() - at >= 60 * minutes for at, minutes in zip(self._uploaded, self._minutes, strict=True)
        )
        if held == self._newest and (weights_due or state_due):
            self._upload(held, whole=state_due)

    def _upload(self, held, whole):
        name = held.name.removeprefix(".").removesuffix(".upload")
        self._uploaded[0] = time.monotonic()
        if whole:
            self._uploaded[1] = time.monotonic()
        if not self._try(name, self._commit, held, name, whole):
            self._uploaded = [-math.inf, -math.inf]  # the next one is due at once
        elif whole:
            self._whole = held

    def _commit(self, held, name, whole):
        add, delete = (load_hub().CommitOperationAdd, load_hub().CommitOperationDelete)
        weights = ("params.safetensors", "config.json", "metrics.jsonl")
        if not self._exists:
            self._api.create_repo(self.repo, private=True, exist_ok=True)
            self._exists = True
        operations = [add(file, str(held / file)) for file in weights]
        if whole:
            operations += [add(f"checkpoints/{name}/{file.name}", str(file)) for file in sorted(held.iterdir())]
            old = {
                path.split("/")[1] for path in self._api.list_repo_files(self.repo) if path.startswith("checkpoints/")
            }
            # older ones: one that is newer was found damaged, and is not ours to delete
            operations += [delete(f"checkpoints/{step}/", is_folder=True) for step in sorted(old) if step < name]
        what = "whole" if whole else "weights"
        self._api.create_commit(self.repo, operations, commit_message=f"{name}, {what}")

    def _try(self, what, action, *args, **kwargs):
        try:
            try_again(lambda: action(*args, **kwargs), f"{what}: cannot be uploaded to {self.repo}")
            return True
        except Exception as error:  # an upload that fails must not stop training
            self._failures.append(first_line(error))
            return False

    def finish(self):
        """Uploads the newest checkpoint whole, unless that is done, waits, says what failed and ends the thread."""
        if self._newest and self._newest != self._whole:
            self._pool.submit(self._upload, self._newest, whole=True)
        if self._newest:
            self._pool.submit(shutil.rmtree, self._newest, ignore_errors=True)
        self._pool.shutdown(wait=True)
        for failure in dict.fromkeys(self._failures):
            say(f"upload: {failure}")

    def restore(self, folder):
        """Brings the Hub's newest whole checkpoint to `folder`, or offers the one there if the Hub has none as new."""
        here = newest_checkpoint(folder)
        try:
            names = self._list_checkpoints()
        except UserError as error:
            if here is None:  # starting afresh would be the loss of a run
                raise
            say(f"checkpoint: going on from {here}, without a look at the Hub: {error}")
            return
        for name in sorted(names, reverse=True):
            if here and name <= here.name:
                break
            if self._download(name, Path(folder)):
                say(f"checkpoint: {name} came from {self.repo}")
                return
        if here and here.name not in names:
            self.offer(here)

    def _list_checkpoints(self):
        errors = load_hub().errors
        try:
            paths = try_again(lambda: self._api.list_repo_files(self.repo), f"{self.repo}: cannot be listed")
        except UserError as error:
            if isinstance(error.__cause__, errors.RepositoryNotFoundError):
                return set()  # the first run of this name
            raise
        return {path.split("/")[1] for path in paths if path.startswith("checkpoints/") and path.endswith(MANIFEST)}

    def _download(self, name, folder):
        part = folder / f".{name}.download"
        arrived = part / "checkpoints" / name
        fetch = lambda: self._api.snapshot_download(self.repo, allow_patterns=f"checkpoints/{name}/*", local_dir=part)
        for _ in range(2):  # a byte may flip on the way: twice, before a checkpoint is given up
            try_again(fetch, f"{name}: cannot be downloaded from {self.repo}")
            damage = find_damage(arrived)
            if damage is None:
                os.replace(arrived, folder / name)
            shutil.rmtree(part, ignore_errors=True)
            if damage is None:
                return True
        say(f"checkpoint: {name} on {self.repo} is damaged: {damage}; looking for an older one")
        return False


def open_mirror(run, token):
    """The HubMirror of a Run, or None without a token or a Hub that takes it, which is said at once."""
    if not token:
        return None
    try:
        whoami = load_hub().HfApi(token=token).whoami
        repo = run.hub_repo or f"{try_again(whoami, 'the Hub does not say who we are')['name']}/onechip-{run.name}"
    except Exception as error:  # training does not need the Hub
        say(f"upload: checkpoints stay here: {first_line(error)}")
        return None
    say(f"checkpoints: in {run.out}/{run.name}/checkpoints and, in the background, on {repo}")
    return HubMirror(token, repo, run.weights_minutes, run.state_minutes)
