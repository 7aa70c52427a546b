"""onechip/runlog.py: rows, charts and the bar show the same run, and the device never waits for them."""

import errno
import io
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from onechip import disk, runlog
from onechip.errors import NonFiniteLoss, UserError, say_above_bars
from onechip.runlog import CHARTS, RunLog, progress_bar


def make_rows(first, last, every=4):
    """Rows as a run writes them: one per step, one more per evaluation."""
    rows = []
    for step in range(first, last + 1):
        rows.append({"step": step, "loss": 9 / step, "grad_norm": 0.5, "lr": 1e-3 * step, "time": 1000.0 + step})
        if step % every == 0:
            rows.append({"step": step, "val_loss": 8 / step, "val_bpb": 2 / step})
    return rows


def read_rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def open_log(tmp_path):
    """Opens RunLogs in a folder and closes them after the test."""
    logs = []

    def open_one(steps=60, first_step=0, tokens_per_step=1000, **options):
        logs.append(RunLog(tmp_path / "metrics.jsonl", steps, first_step, tokens_per_step, **options))
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


def metrics(**changes):
    return {"loss": 2.0, "lr": 0.125, "grad_norm": 1.0, **changes}


# ----------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


class Watched:
    """A scalar on the device that notes when the host asks for its value, with the steps dispatched by then."""

    def __init__(self, step, dispatched, reads):
        self.step, self.dispatched, self.reads = step, dispatched, reads

    def __array__(self, *args, **kwargs):
        self.reads.append((self.step, len(self.dispatched)))
        return np.asarray(1.0)


def test_values_are_fetched_in_groups_and_one_step_late(open_log, tmp_path):
    """45 steps: ten at a time, each only once the step after it is dispatched; the rest at the end."""
    log, dispatched, reads = open_log(), [], []
    for step in range(1, 46):
        dispatched.append(step)
        log.add(step, {name: Watched(step, dispatched, reads) for name in ("loss", "grad_norm", "lr")})
    assert all(step < count for step, count in reads), "waited for the step just dispatched"
    assert {count for _, count in reads} == {11, 21, 31, 41}
    log.flush()
    assert {step for step, _ in reads} == set(range(1, 46)) == {row["step"] for row in read_rows(tmp_path)}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_ends_the_log(open_log, tmp_path, name, value):
    """One line with step, value and remedy, which promises no checkpoint; the rows before it are there, it is not."""
    log = open_log()
    for step in range(1, 9):
        log.add(step, metrics(**({name: value} if step == 8 else {})))
    with pytest.raises(NonFiniteLoss) as raised:
        log.flush()
    assert str(raised.value) == f"the {name} of step 8 is {value}: lower learning_rate or set grad_clip"
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(1, 8))


def test_a_task_logs_what_it_has(open_log, tmp_path):
    """No gradient norm, no learning rate, a held-out loss without bits per byte: each row is as it was given."""
    log = open_log(peak_rate=None)
    for step in (1, 2):
        log.add(step, {"loss": 3.0, "reward": 0.5})
    log.flush()
    log.write({"step": 2, "val_loss": 2.5})
    first, second, score = read_rows(tmp_path)
    assert (first["loss"], first["reward"]) == (3.0, 0.5) and "mfu" not in second and score["val_loss"] == 2.5


def test_a_listener_that_raises_loses_no_row(open_log, tmp_path):
    """on_log gets each row; the rows after the one that it was interrupted at come with the next fetch."""
    heard = []

    def listen(row):
        heard.append(row["step"])
        if row["step"] == 3:
            raise KeyboardInterrupt

    log = open_log(on_log=listen)
    for step in range(1, 7):
        log.add(step, metrics())
    with pytest.raises(KeyboardInterrupt):
        log.flush()
    log.flush()
    assert heard == [1, 2, 3, 4, 5, 6] == [row["step"] for row in read_rows(tmp_path)]


def test_text_is_the_file(open_log, tmp_path):
    """What goes into a checkpoint are the rows resumed from and those since; later ones of an older file are gone."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = open_log(rows=[{"step": 1}, {"step": 2}], first_step=2)
    log.write({"step": 3, "loss": 1.5})
    assert (
        log.text() == (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.5}\n'
    )


def test_a_disk_that_fails_costs_no_row(open_log, tmp_path, monkeypatch, capsys):
    """A full disk, then one that is away: a line each; when it is back, file and charts have every row, once."""
    now = [0.0]
    monkeypatch.setattr(disk, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log, away = open_log(), tmp_path.with_name("away")
    rows = make_rows(1, 40)
    for i, row in enumerate(rows):
        if i == 10:
            log._file.close()
            log._files[0] = log._file = open("/dev/full", "w")
        if i == 30:
            tmp_path.rename(away)
            log._file.close()
        if i == 45:
            away.rename(tmp_path)
        now[0] += 7  # seconds: a retry after nine rows
        log.write(row)
        assert log.rows == rows[: i + 1]
        if i in (20, 29):
            assert read_rows(tmp_path) == log.rows
    log.close()
    assert read_rows(tmp_path) == rows and read_charts(tmp_path) == charts_of(rows)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0].removeprefix("disk: ") for line in said] == [
        f"metrics.jsonl cannot be written to {tmp_path}", f"{tmp_path} works again",
    ] * 2  # fmt: skip
    assert "full" in said[0] and not away.exists()


def test_a_full_disk_is_refused_before_training_starts(tmp_path, monkeypatch):
    """One line, when the log is opened: nothing has been trained that could be lost."""

    def refuse(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: refuse(*args))
    with pytest.raises(UserError, match="disk is full"):
        RunLog(tmp_path / "metrics.jsonl", 9, 0, 8)


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard


def read_charts(folder):
    """tag -> [(step, value), ...] in the order of the file, as TensorBoard itself reads the folder's event files."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    charts = {}
    for path in sorted(Path(folder).glob("*tfevents*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                charts.setdefault(value.tag, []).append((event.step, value.simple_value))
    return charts


def charts_of(rows):
    """The same from rows of metrics.jsonl."""
    charts = {}
    for row in rows:
        for name, tag in CHARTS.items():
            if name in row:
                charts.setdefault(tag, []).append((row["step"], pytest.approx(row[name])))
    return charts


def write_log(folder, old, new):
    """One process of a run: begins with the rows `old`, adds `new`."""
    log = RunLog(folder / "metrics.jsonl", 100, 0, tokens_per_step=8, rows=old)
    for row in new:
        log.write(row)
    log.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    """Killed after step 11, resumed from a checkpoint of step 8: no zigzag, one file, the values of metrics.jsonl."""
    write_log(tmp_path, [], make_rows(1, 11))
    assert read_charts(tmp_path) == charts_of(make_rows(1, 11))
    write_log(tmp_path, make_rows(1, 8), make_rows(9, 13))
    assert read_charts(tmp_path) == charts_of(make_rows(1, 13)) == charts_of(read_rows(tmp_path))
    assert len(list(tmp_path.glob("*tfevents*"))) == 1


def test_a_run_needs_no_tensorboard(tmp_path):
    """Where it is not installed, training works with metrics.jsonl alone, without a word."""
    code = "import pathlib, sys; from onechip.runlog import RunLog; "
    code += "log = RunLog(pathlib.Path(sys.argv[1]) / 'metrics.jsonl', 9, 0, 8); "
    code += "log.write({'step': 1, 'loss': 2.0}); log._bar.disable = True; log.close()"
    hidden = os.environ | {"HIDDEN_MODULES": "tensorboard"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ----------------------------------------------------------------------------------------------------------------------
# The bar


def test_the_bar_shows_speed_without_the_pauses(open_log, tmp_path, monkeypatch):
    """tok/s and MFU are of the steps fetched since the last look; the time of a pause does not count."""
    now = [100.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now[0])
    log = open_log(peak_rate=5000.0)
    shown = []

    def advance(first, count, seconds):
        for step in range(first, first + count):
            now[0] += seconds
            log.add(step, metrics())
        shown.append(dict(part.split("=") for part in (log._bar.postfix or "").split(", ")))

    advance(1, 11, 7.0)  # compilation is in these: not shown
    assert "tok/s" not in shown[-1] and shown[-1] == {"loss": "2.000", "lr": "1.2e-01"}
    advance(12, 10, 0.5)
    assert shown[-1]["tok/s"] == "2,000" and shown[-1]["MFU"] == "40.0%"
    now[0] += 0.5
    with log.pause():
        now[0] += 1000.0
        log.show(val="3 bpb")
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 22))
    assert (rows[15]["tokens_per_second"], rows[15]["mfu"]) == (2000, 0.4) and "mfu" not in rows[5]
    advance(22, 11, 0.25)
    assert shown[-1]["tok/s"] == f"{10 * 1000 / (11 * 0.25):,.0f}" and shown[-1]["val"] == "3 bpb"
    assert log._bar.n == 31 and log._bar.total == 60
    log.set_pace(300, 6000.0)  # a stage of smaller batches, the pending step of the last one included before it
    assert log._bar.n == 32
    advance(33, 11, 0.1)
    assert shown[-1]["tok/s"] == f"{10 * 300 / (11 * 0.1):,.0f}" and shown[-1]["MFU"] == "45.5%"


@pytest.mark.parametrize("encoding, line", [("utf-8", "upload: naïve\n"), ("ascii", "upload: na\\xefve\n")])
def test_a_line_from_another_thread_leaves_the_bar_whole(monkeypatch, encoding, line):
    """The bar is taken away, the line printed in its place, on any terminal, and the bar drawn again below it."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(total=3, unit="step", initial=1) as bar:
        bar.refresh()
        thread = threading.Thread(target=say_above_bars, args=("upload: naïve",))
        thread.start()
        thread.join()
        terminal.flush()
        before, found, after = terminal.buffer.getvalue().decode(encoding).partition(line)
    assert found and "1/3" in before and "1/3" in after
    assert before.split("\r")[-2].strip() == "" == before.split("\r")[-1]
