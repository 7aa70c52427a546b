"""onechip/check*.py and tools/chip_check.py: a whole check at tiny sizes, each comparison broken once, interrupts."""

import dataclasses
import getpass
import importlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from execute import TINY as TINY_RUNS
from execute import copy_repository
from reference import raw_attention_reference
from reference_muon import POLYNOMIALS, in_bfloat16

from onechip import check, check_bits, check_compare, check_exact, check_report, check_time
from onechip.check import PARTS, check_chip, choose_parts_of
from onechip.check_compare import PIECES, Case
from onechip.check_report import FAILED, OK, SKIPPED, STOPPED, WRONG, Row, as_json, recommend, scrub
from onechip.check_sizes import TINY, sizes_for
from onechip.check_time import Check
from onechip.errors import UserError
from onechip.rows import Embeddings

train = importlib.import_module("02_train")

ONE_CASE = dataclasses.replace(TINY, cases=(Case(128, 2, 1, 128, 128),), attentions=("einsum", "jax"), runs=1)


@pytest.fixture(scope="module")
def given(compiled_once):
    """What 02 hands over; no new process."""
    return train.what_to_check("laptop")._replace(child=())


def check_parts(given, tmp_path, only, sizes=ONE_CASE, **more):
    """The JSON of a check of some parts."""
    return check_chip(given, sizes, only, tmp_path / "found.json", **more)


def statuses(found):
    """{what: status} of the rows found."""
    return {row["what"]: row["status"] for row in found["rows"]}


# ----------------------------------------------------------------------------------------------------------------------
# As a whole


def run_tool(folder, *flags, **more):
    """The command, in a folder, with compiled programs kept as the tests keep them."""
    cache = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "chip_check.py"), *flags]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | cache | more, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_whole_check_passes_here(tmp_path, given, monkeypatch, capsys):
    """Of one model: every part has rows, all right, printed and in the file, which says nothing private."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    small = given._replace(subjects={"gpt": given.subjects["gpt"]})
    found = check_chip(small, ONE_CASE, out=tmp_path / "found.json")
    printed = capsys.readouterr().out
    assert {row["status"] for row in found["rows"]} == {OK}
    assert {row["part"] for row in found["rows"]} >= set(PARTS)
    assert found == json.loads((tmp_path / "found.json").read_text())
    for row in found["rows"]:
        assert row["what"] in printed
    assert found["recommended"]["device_batch_size"] == 2 and found["recommended"]["attn_impl"] in ("einsum", "jax")
    assert_nothing_private(tmp_path / "found.json", tmp_path)
    assert check.kept_marker(check.Context(given, ONE_CASE)).exists()  # the next one has less time, and needs less


def cpu_seconds():
    """Of all processes that this one has started and that have ended: other load on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_the_command_checks_all_of_it_and_passes(tmp_path, compiled_once):
    """All three models, all attentions, and a new process that resumes from a checkpoint, within its two minutes."""
    before = cpu_seconds()
    process = run_tool(tmp_path)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and cpu_seconds() - before < 120, printed + errors
    found = json.loads((tmp_path / "chip_check.json").read_text())
    assert {row["status"] for row in found["rows"]} == {OK}
    assert {row["part"] for row in found["rows"]} >= set(PARTS)
    assert found["machine"]["device"] == "cpu" and found["machine"]["jax"] == jax.__version__
    names = {row["more"]["model"] for row in found["rows"] if row["part"] == "step"}
    assert names == {"gpt", "swiglu", "nanochat"}
    assert "2 + 2 steps through a checkpoint" in printed and "in a new process" in printed
    for row in found["rows"]:
        assert row["what"] in printed
    assert set(found["recommended"]) == {"attn_impl", "device_batch_size"}
    assert_nothing_private(tmp_path / "chip_check.json", tmp_path)


@pytest.mark.slow
def test_the_cell_in_02_checks_the_same(tmp_path, compiled_once):
    """Ticked, it prints the table and leaves the file, then the notebook trains as ever."""
    copy_repository(tmp_path, "tools")
    source = (tmp_path / "02_train.py").read_text()
    assert source.count("\nCHECK = False") == 1
    (tmp_path / "02_train.py").write_text(source.replace("\nCHECK = False", "\nCHECK = True"))
    command = [sys.executable, "02_train.py", "--preset", "laptop", *TINY_RUNS["02_train"].split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "chip_check.json").read_text())
    assert {row["status"] for row in found["rows"]} == {OK} and {row["part"] for row in found["rows"]} >= set(PARTS)
    assert "2 + 2 steps through a checkpoint" in done.stdout and "trained: 5 of 5 steps" in done.stdout


def assert_nothing_private(file, folder):
    """No path, no name of this machine or its user."""
    text = file.read_text()
    assert str(folder) not in text and str(ROOT) not in text and "/tmp" not in text
    values = [value for row in json.loads(text)["rows"] for value in row.values() if isinstance(value, str)]
    for name in (socket.gethostname(), getpass.getuser()):
        assert not [value for value in values if re.search(rf"\b{re.escape(name)}\b", value)]


def test_a_wrong_part_is_refused_with_the_list(tmp_path):
    """Before a model is loaded, in one line."""
    with pytest.raises(UserError, match="only='bit': use any of machine, attention, .*bits"):
        choose_parts_of("machine,bit")
    assert choose_parts_of("bits machine") == ["machine", "bits"] and choose_parts_of("") == list(PARTS)
    process = run_tool(tmp_path, "--only", "speed")
    assert "only='speed': use any of" in process.communicate(timeout=30)[1] and process.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, given):
    """Not after five minutes."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out=.*cannot be written .*choose another --out"):
        check_chip(given, ONE_CASE, "machine", tmp_path / "file" / "found.json")


def test_ctrl_c_leaves_the_table_and_the_file(tmp_path, compiled_once):
    """A real signal to a real process, in the middle of a part: what is done is there, what was running is named."""
    process = run_tool(tmp_path, "--only", "machine,attention")
    lines = []
    while not (lines and "attention: splash" in lines[-1]):
        lines.append(os.read(process.stdout.fileno(), 1 << 16).decode())
        assert lines[-1], process.stderr.read()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    rows = json.loads((tmp_path / "chip_check.json").read_text())["rows"]
    assert [row["status"] for row in rows[:-1]] == [OK] * (len(rows) - 1) and rows[-1]["status"] == STOPPED
    assert rows[-1]["what"].startswith(("splash", "pallas")) and len(rows) >= 7
    assert "interrupted" in printed and "recommended" in printed


def test_an_interrupt_in_the_process_ends_the_parts_that_follow(tmp_path, given, monkeypatch):
    """Of a part that was interrupted there is a row, of those after it none."""

    def stop(context):
        yield Check("first", lambda: Row("machine", "first"))
        yield Check("second", lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))

    monkeypatch.setattr(check, "machine_checks", stop)
    found = check_parts(given, tmp_path, "machine,attention")
    assert statuses(found) == {"first": OK, "second": STOPPED}


def test_a_part_that_fails_is_a_row(tmp_path, given, monkeypatch):
    """With its reason in one line, and those after it run."""

    def fail(context):
        def broken():
            raise RuntimeError("out of something\nand a second line")

        yield Check("broken", broken)
        yield Check("whole", lambda: Row("machine", "whole"))

    monkeypatch.setattr(check, "machine_checks", fail)
    monkeypatch.setattr(check, "piece_checks", lambda context: 1 / 0)
    found = check_parts(given, tmp_path, "machine,pieces,attention")
    assert statuses(found)["broken"] == FAILED and statuses(found)["whole"] == OK
    assert found["rows"][0]["note"] == "out of something"
    assert [row["note"] for row in found["rows"] if row["part"] == "pieces"] == ["division by zero"]
    assert [row["status"] for row in found["rows"] if row["part"] == "attention"] == [OK, OK]


def test_what_does_not_fit_the_time_is_skipped(tmp_path, given, monkeypatch):
    """A one begins before the budget is over, or is a row; a part that was asked for by name gets the same time."""
    now = [0.0]

    def one(name, seconds):
        def run():
            now[0] += seconds
            return Row("machine", name)

        return Check(name, run)

    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(check, "machine_checks", lambda context: [one("a", 9), one("b", 9), one("c", 9)])
    sizes = dataclasses.replace(ONE_CASE, budget=(5.0, 10.0))
    found = check_parts(given, tmp_path, "machine", sizes, clock=lambda: now[0])
    assert statuses(found) == {"a": OK, "b": OK, "c": SKIPPED}
    assert found["rows"][-1]["note"] == "10 s are over: --only machine, or --all"
    (tmp_path / "home").mkdir()
    check.kept_marker(check.Context(given, sizes)).touch()
    found = check_parts(given, tmp_path, "machine", sizes, clock=lambda: now[0])
    assert statuses(found) == {"a": OK, "b": SKIPPED, "c": SKIPPED}


def test_all_takes_more_and_has_no_end():
    """Every microbatch that preflight compares, full and windowed, shared keys or not; on a chip at 2,048 tokens."""
    quick, everything = sizes_for("tpu"), sizes_for("tpu", True)
    assert quick.budget == (300, 720) and everything.budget[0] == float("inf")
    assert everything.microbatches == (1, 2, 4, 8, 16) and quick.microbatches == ()
    assert set(quick.cases) < set(everything.cases) and quick.attentions == tuple(train.ATTENTIONS)
    for cases in (quick.cases, everything.cases):
        assert {case.T for case in cases} == {2048} and {case.H for case in cases} == {128, 256}
        assert {case.window < case.T for case in cases} == {case.N > case.K for case in cases} == {True, False}
    assert sizes_for("gpu").attentions == ("einsum", "jax") and sizes_for("cpu") is TINY


# ----------------------------------------------------------------------------------------------------------------------
# Each comparison broken once


def shifted(q, k, v, rope, window, scale):
    """A mask that is off by one."""
    return train.attention_einsum(q, k, v, rope, min(window, q.shape[1]) - 1, scale)


def no_gradient(q, k, v, rope, window, scale):
    """Right, but for the gradient of k."""
    return train.attention_einsum(q, jax.lax.stop_gradient(k), v, rope, window, scale)


def not_a_number(q, k, v, rope, window, scale):
    return train.attention_einsum(q, k, v, rope, window, scale).at[0, 5, 1, 7].set(jnp.nan)


def uncompilable(q, k, v, rope, window, scale):
    raise NotImplementedError("no such instruction on this chip")


def one_row(q, k, v, rope, window, scale):
    """One query of one head is 3 % off: of all 512 rows that is 0.13 %."""
    return train.attention_einsum(q, k, v, rope, window, scale).at[0, 5, 1].multiply(1.03)


@pytest.mark.parametrize(
    "broken, status, note",
    [
        (shifted, WRONG, "is wrong"), (no_gradient, WRONG, "dk is wrong"), (not_a_number, WRONG, "out is wrong"),
        (one_row, WRONG, "out is wrong"), (uncompilable, FAILED, "no such instruction on this chip"),
    ],
)  # fmt: skip
def test_an_attention_that_is_wrong_is_named_with_one_that_works(given, tmp_path, broken, status, note):
    """A row says which array is wrong, or why it does not compile; the recommendation is another one."""
    found = check_parts(given._replace(attentions=given.attentions | {"jax": broken}), tmp_path, "attention")
    assert [row["status"] for row in found["rows"]] == [OK, status]
    assert note in found["rows"][1]["note"] and found["rows"][1]["note"].endswith("; use --attn_impl einsum")
    assert found["recommended"] == {"attn_impl": "einsum"}


def test_training_takes_an_attention_that_works(given):
    """Steps of a config whose attention was found wrong are timed with another one."""
    right = Row("attention", "einsum: x", OK, more={"attn_impl": "einsum", "case": "x", "seconds": 1.0})
    wrong = Row("attention", "pallas: x", WRONG, more={"attn_impl": "pallas", "case": "x"})
    context = check.Context(given, TINY, [right, wrong])
    assert context.attention("pallas") == "einsum" and context.attention("splash") == "splash"


def test_gated_values_are_compared_too(given, tmp_path):
    """An attention that takes `more` and forgets it."""

    def forgets(q, k, v, rope, window, scale, more=None):
        return train.attention_einsum(q, k, v, rope, window, scale)

    sizes = dataclasses.replace(ONE_CASE, cases=(Case(64, 2, 2, 16, 20, gated=True),), attentions=("einsum", "pallas"))
    found = check_parts(
        given._replace(attentions={**given.attentions, "pallas": forgets}), tmp_path, "attention", sizes
    )
    assert [row["status"] for row in found["rows"]] == [WRONG]  # einsum takes no gated rows


BROKEN = {
    "losses": lambda *args: PIECES["losses"](*args) + 0.02,
    "loss": lambda softcap, size, h, head, y, mask: PIECES["loss"](softcap, size, h, head, y.at[0, 3].set(0), mask),
    "norm": lambda x, cos, sin: PIECES["norm"](x, cos, -sin),
    "relu": lambda x: jnp.square(jax.nn.leaky_relu(x, 0.1)),
    "add": lambda self, sums, ids, grads, kernel: Embeddings.add(self, sums, ids.at[0, 3].set(0), grads, False),
}
ROW_OF = {"losses": "loss", "loss": "loss", "norm": "RoPE", "relu": "ReLU", "add": "rows added"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_piece_that_is_wrong_is_a_row(given, tmp_path, name):
    """Only its own rows are wrong; all pieces that come with the code have a case here."""
    assert set(BROKEN) == set(PIECES)
    found = statuses(check_parts(given._replace(pieces=PIECES | {name: BROKEN[name]}), tmp_path, "pieces"))
    assert {status for what, status in found.items() if what.startswith(ROW_OF[name])} == {WRONG}
    assert {status for what, status in found.items() if not what.startswith(ROW_OF[name])} == {OK}


@pytest.mark.parametrize("broken", [lambda X: X, lambda X: 1.3 * jnp.linalg.qr(X.astype(jnp.float32).mT)[0].mT])
def test_an_orthogonalize_that_is_wrong_is_a_row(given, tmp_path, broken):
    """One that leaves singular values as they are; one whose result is orthogonal, and too large, or another matrix."""
    context = check.Context(given._replace(orthogonalize=broken), ONE_CASE)
    [one] = [one for one in check_compare.piece_checks(context) if "orthogonalize" in one.what]
    assert one.run().status == WRONG


def test_training_that_is_not_the_same_twice_is_a_row(given, monkeypatch):
    """A batch that differs by one token; and a checkpoint that loses a bit of the optimizer's state."""
    context, draws = check.Context(given, ONE_CASE), []

    def restless(context, config):
        batch = usual(context, config)
        draws.append(1)
        return batch if len(draws) == 1 else {**batch, "x": batch["x"].at[0, 0].add(1)}

    usual = check_time.random_batch
    monkeypatch.setattr(check_time, "random_batch", restless)
    assert check_bits.Runs(context).again().status == WRONG
    monkeypatch.setattr(check_time, "random_batch", usual)
    runs = check_bits.Runs(context)
    assert (runs.again().status, runs.resumed().status, runs.resumed().note) == (OK, OK, "in this process")

    def forgetful(*args):
        state, *rest = unpack(*args)
        return ({**state, "opt": jax.tree.map(jnp.zeros_like, state["opt"])}, *rest)

    unpack = check_bits.unpack_state
    monkeypatch.setattr(check_bits, "unpack_state", forgetful)
    assert runs.resumed().status == WRONG
    words = given._replace(child=(sys.executable, "-c", "import sys; sys.exit('no device for two')"))
    failed = check_bits.Runs(check.Context(words, ONE_CASE)).resumed()
    assert (failed.status, failed.note) == (FAILED, "the new process: no device for two")


# ----------------------------------------------------------------------------------------------------------------------
# What is due


def test_the_pieces_in_float64_are_those_of_the_references():
    """Not rounded, attention and its gradients equal the tests' own reference, which shares no code with them."""
    a = check_exact.draw(0, q=(40, 8), k=(40, 8), v=(40, 8), g=(40, 8))
    angles = np.outer(np.arange(40), 50.0 ** (-np.arange(0, 8, 2) / 8))
    rope = [np.hstack(pair) for pair in ((np.cos(angles),) * 2, (np.sin(angles), -np.sin(angles)))]
    found = check_exact.attention_pieces(a["q"], a["k"], a["v"], a["g"], *rope, 9, 0.3, check_exact.as_is)
    whole = {name: array[None, :, None] for name, array in a.items()}
    out, grads = raw_attention_reference(whole["q"], whole["k"], whole["v"], 9, 50.0, whole["g"], 0.3)
    for name, wanted in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        np.testing.assert_allclose(found[name], wanted[0, :, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [0.0, 7.0])
def test_the_loss_in_float64_is_differentiated_rightly(softcap):
    """Central differences of the mean of its losses."""
    a = check_exact.draw(1, h=(5, 3), head=(3, 7), change=(5, 3), turn=(3, 7))
    y, step = np.array([0, 6, 2, 3, 3]), 1e-6
    pieces = lambda h, head: check_exact.loss_pieces(h, head, y, softcap, check_exact.as_is)
    mean = lambda s: pieces(a["h"] + s * a["change"], a["head"] + s * a["turn"])["losses"].mean()
    found = pieces(a["h"], a["head"])
    slope = (found["dh"] * a["change"]).sum() + (found["dhead"] * a["turn"]).sum()
    assert (mean(step) - mean(-step)) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_tolerances_are_a_few_bits_of_bfloat16():
    """Half a bit of 8 is 2 ** -9; rounding softmax and scores adds to it: a limit is 1 to 6 of these, never more."""
    dues = {**check_exact.attention_due(), **check_exact.norm_due(), **check_exact.relu_due()}
    dues |= {name: pair for name, pair in check_exact.loss_due(15.0).items()}
    for name, (rms, _) in dues.items():
        assert 2**-11 < rms < 6 * 2**-9, name
    found = check_exact.judge({"a": np.full((2, 2), np.nan)}, {"a": np.ones((2, 2))}, {"a": (1.0, 1.0)})
    assert check_report.compared("pieces", "a", found).status == WRONG


def test_the_limit_of_orthogonalize_is_what_float64_says():
    """Polar Express, rounded to bfloat16 after each product, is 0.05 to 0.15 from orthogonal at shapes like these."""
    for shape in ((48, 80), (192, 192), (192, 768)):
        X = check_exact.draw(13, x=shape)["x"]
        u, _, v = np.linalg.svd(X, full_matrices=False)
        X = in_bfloat16(X / (1.01 * np.linalg.norm(X)))
        for a, b, c in POLYNOMIALS:
            A = in_bfloat16(X @ X.T)
            X = in_bfloat16(a * X + in_bfloat16(in_bfloat16(b * A + c * in_bfloat16(A @ A)) @ X))
        assert 0.02 < check_exact.errors_between(X, u @ v)[0] < 0.8 * check_compare.ORTHOGONAL_LIMIT


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_private_things_are_scrubbed():
    """Paths of any system, addresses, tokens, this machine's name and its user's; units stay as they are."""
    secret = "hf_" + "aB3" * 11
    texts = {
        "No such file: '/data/jane/runs/x.json'": "No such file: '<path>'",
        "~/runs and ../x and C:\\Users\\jane\\x": "<path> and <path> and <path>",
        "https://example.com/a?token=1 failed": "<path> failed",
        f"Bearer {secret}": "Bearer <token>",
        "121 thousand tok/s, 16 GB/s, 3 / 4": "121 thousand tok/s, 16 GB/s, 3 / 4",
        f"cannot resolve {socket.gethostname()}": "cannot resolve <name>",
    }
    for text, wanted in texts.items():
        assert scrub(text) == wanted
    row = Row("machine", "x", FAILED, note=f"open /data/jane/{secret} as {getpass.getuser()}")
    text = json.dumps(as_json({"device": "cpu"}, [row], {}, "2026-11-28"))
    assert "jane" not in text and secret not in text
    assert len(getpass.getuser()) < 3 or f"as {getpass.getuser()}" not in text


def test_the_fastest_right_settings_are_recommended():
    """By time over the cases that all right attentions have; microbatches of the first model."""
    at = lambda name, case, seconds, status=OK: Row(
        "attention", f"{name} {case}", status, more={"attn_impl": name, "case": case, "seconds": seconds}
    )
    rows = [at("a", "x", 2.0), at("b", "x", 1.0), at("b", "only b", 9.0), at("c", "x", 0.1), at("c", "y", 0.1, WRONG)]
    for rows_at_once, ms in ((1, 30.0), (2, 20.0), (4, 25.0)):
        rows.append(Row("step", "", OK, ms, "ms", more={"model": "m", "device_batch_size": rows_at_once}))
    rows.append(Row("step", "", OK, 1.0, "ms", more={"model": "other", "device_batch_size": 16}))
    assert recommend(rows) == {"attn_impl": "b", "device_batch_size": 2}
    assert recommend([]) == {} and recommend([at("c", "y", 0.1, WRONG)]) == {}


def test_mfu_is_counted_both_ways(given, monkeypatch):
    """Of a v6e's 918 TFLOP/s: the keys that a query sees, and all of them."""
    from types import SimpleNamespace

    context = check.Context(given, TINY)
    context.device = SimpleNamespace(device_kind="TPU v6 lite")
    config = given.subjects["gpt"].config
    found = check_time.both_mfu(context, "gpt", config, 1e-6)
    rate = 4 * 64 / 1e-6 / 918e12
    assert found["mfu"] == pytest.approx(rate * train.flops_per_token(config))
    assert found["mfu_all_keys"] == pytest.approx(rate * train.flops_per_token(config, full_attention=True))
    assert found["mfu"] < found["mfu_all_keys"]
