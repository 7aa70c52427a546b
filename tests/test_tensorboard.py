"""What TensorBoard shows of a run in a real browser: the charts are metrics.jsonl, and the trace has its steps."""

import contextlib
import gzip
import json
import re
import socket
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest
from browser import keep_picture, wait_for
from corpus import train_tiny

from onechip.chips import CHIPS, Chip
from onechip.runlog import CHARTS, RunLog

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.slow]


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


@pytest.fixture(scope="module")
def tiny_run(corpus, tokenizer, tmp_path_factory):
    """The folder of a real run of 26 steps with a trace of five, on a device whose peak is taken as known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "cpu", Chip(1e12))
        return train_tiny(corpus, tokenizer, tmp_path_factory.mktemp("board") / "tiny").run_dir


@pytest.fixture(scope="module")
def board(tiny_run):
    """TensorBoard's address on loopback, with the run's folder open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", tiny_run, "--host", "127.0.0.1", "--port", port]
    with open(tiny_run.parent / "tensorboard.log", "w") as log:
        options = ["--reload_interval", "1"]
        process = subprocess.Popen([*map(str, command), *options], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: ask(address, "runs") == ["."])
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(address, path, **query):
    """What TensorBoard answers, parsed; None while it does not."""
    with contextlib.suppress(OSError, ValueError):
        with urllib.request.urlopen(f"{address}/data/{path}?{urllib.parse.urlencode(query)}") as answer:
            raw = answer.read()
        return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)


def look(browser, script, frames=0):
    """What `script` returns in the page, or in its `frames`-th nested frame; None while that is not there yet."""
    from selenium.common.exceptions import WebDriverException

    with contextlib.suppress(WebDriverException):
        browser.switch_to.default_content()
        for _ in range(frames):
            browser.switch_to.frame(browser.find_element("tag name", "iframe"))
        return browser.execute_script(script)


def test_the_charts_are_in_the_browser(browser, board, tmp_path):
    """Loss, learning rate, gradient norm, bits per byte, tokens per second and MFU, each a card with a curve."""
    browser.get(f"{board}/#timeseries")
    browser.set_window_size(1500, 2300)  # a card below the fold is not drawn
    drawn = """return Array.from(document.querySelectorAll('card-view')).filter(c => c.querySelector('svg, canvas'))
        .map(c => c.textContent.replace(/\\s+/g, ' '))"""
    wanted = [tag.split("/")[1] for tag in CHARTS.values()]
    wait_for(lambda: all(any(tag in card for card in look(browser, drawn) or []) for tag in wanted))
    keep_picture(browser, "scalars.png", tmp_path)


TRACE = """
const slices = [];
for (const process of document.querySelector('tr-ui-timeline-view').model.getAllProcesses())
    for (const thread of Object.values(process.threads))
        for (const slice of Array.from(thread.sliceGroup.slices)) slices.push(slice.title);
return slices;
"""
CHOOSE = """
const shown = Array.from(document.querySelectorAll('mat-option')).find(o => o.textContent.includes('Trace Viewer'));
if (shown) { shown.click(); return true; }
const menu = Array.from(document.querySelectorAll('mat-select')).find(s => s.textContent.includes('Overview'));
if (menu) menu.click();
return false;
"""


def test_the_trace_is_in_the_browser(browser, board, tmp_path):
    """The tab Profile finds the run's trace, and its trace viewer holds five steps by their numbers."""
    browser.get(f"{board}/#profile")
    wait_for(lambda: look(browser, CHOOSE, frames=1))
    titles = wait_for(lambda: look(browser, TRACE, frames=2))
    steps = {int(step[1]) for step in map(re.compile(r"train (\d+)$").match, titles) if step}
    assert steps == set(range(15, 20)) and "PjitFunction(train_step)" in titles
    keep_picture(browser, "trace.png", tmp_path)


def test_an_open_tensorboard_follows_a_resumed_run(board, tiny_run):
    """The server's chart of a run that is resumed while it looks: no step twice, none of the part thrown away."""
    chart = lambda tag: ask(board, "plugin/scalars/scalars", run=".", tag=tag) or []
    points = lambda tag: [(step, pytest.approx(value)) for _, step, value in chart(tag)]
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    wait_for(lambda: len(chart("loss/training, nats per token")) == 26)
    for tag, expected in charts_of(rows).items():
        wait_for(lambda tag=tag, expected=expected: points(tag) == expected)
    assert set(charts_of(rows)) == set(CHARTS.values())
    kept = [row for row in rows if row["step"] <= 16]
    again = [row | {"loss": 1.0} if "loss" in row else row for row in rows if row["step"] > 16]
    write_log(tiny_run, kept, again)
    expected = charts_of(kept + again)["loss/training, nats per token"]
    wait_for(lambda: points("loss/training, nats per token") == expected)
