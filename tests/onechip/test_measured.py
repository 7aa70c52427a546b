"""onechip/measured.py: what others have measured, and what preflight makes of it. All files here are made up."""

import json

import pytest
from test_fit import Toy, toy_work

from onechip import fit, measured
from onechip.check_report import Row, as_json
from onechip.measured import describe_measured, ratio_for, read_measured


def made_up(ms, estimated, attn_impl="einsum", model="gpt", device="TPU v6 lite"):
    """A file's content as chip_check would write it. Nobody has measured this: the figures are made up."""
    more = {"model": model, "attn_impl": attn_impl, "device_batch_size": 2}
    rows = [
        Row("machine", "product", "ok", 700.0, "TFLOP/s", expected=800.0),
        Row("step", "a", "ok", ms, "ms", expected=estimated, more=more),
        Row("step", "without an estimate", "ok", ms, "ms", more=more),
        Row("step", "b", "failed", note="out of memory", more=more),
    ]
    return as_json({"device": device, "jax": "0.0-made-up"}, rows, {}, "2026-01-01")


@pytest.fixture
def folder(tmp_path):
    for name, content in {
        "made-up-1": made_up(112.0, 100.0), "made-up-2": made_up(560.0, 500.0), "made-up-3": made_up(99.0, 50.0),
        "made-up-4": made_up(80.0, 100.0, "splash"), "made-up-5": made_up(70.0, 100.0, device="TPU v5 lite"),
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_the_ratio_is_the_median_on_that_device_with_that_attention(folder):
    """Rows without an estimate and rows that failed do not count; nothing is said of what nobody has measured."""
    assert ratio_for("TPU v6 lite", "einsum", folder) == (pytest.approx(1.12), 3)
    assert ratio_for("TPU v6 lite", "splash", folder) == (pytest.approx(0.8), 1)
    assert ratio_for("TPU v6 lite", "pallas", folder) is None and ratio_for("TPU v7", "einsum", folder) is None


def test_preflight_applies_the_ratio_and_says_so(folder, monkeypatch, capsys):
    """One more line below the compiler's own estimate, which stays; none where nothing was measured."""
    work, _ = toy_work(lambda config: 1, seconds_of=lambda config: 0.4455)
    fit.show([work], Toy())
    before = capsys.readouterr().out
    assert "measured" not in before and "445.5 ms a step" in before
    monkeypatch.setattr(fit, "ratio_for", lambda *args: ratio_for(*args, folder))
    fit.show([work], Toy())
    after = capsys.readouterr().out
    assert "  measured on TPU v6 lite by chip_check, 3 steps: x 1.12 -> 499 ms a step\n" in after
    assert "compiler's estimate: 445.5 ms a step" in after


def test_the_table_has_measured_against_estimated(folder, capsys):
    """One line for each step; the command prints it."""
    lines = describe_measured(read_measured(folder)).splitlines()
    assert len(lines) == 1 + 5
    assert lines[-1].split() == "TPU v6 lite gpt splash 2 80.0 100.0 0.80 0.0-made-up made-up-4".split()
    assert "nobody has contributed" in describe_measured([])


def test_the_repository_has_no_made_up_measurement():
    """What is in docs/chips is read by every preflight."""
    assert [step for step in read_measured() if "made-up" in step.jax or "made-up" in step.file] == []


BAD = {
    "empty": b"",
    "binary": b"\x80\x04\x95cposix\nsystem",
    "not an object": b"[]",
    "foreign": b'{"name": "package", "version": "1"}',
    "large": b'{"x": "' + b"x" * (1 << 20) + b'"}',
    "deep": b'{"a":' * 100_000,
}


def changed(**fields):
    """A sound file but for the step's fields, or those of its `more`."""
    content = made_up(1.0, 1.0)
    step = content["rows"][1]
    for name, value in fields.items():
        (step if name in step else step["more"])[name] = value
    return json.dumps(content).encode()


BAD |= {
    "negative": changed(measured=-1.0), "zero": changed(expected=0), "text": changed(measured="1"),
    "infinite": changed(measured=float("inf")), "nan": changed(measured=float("nan")), "bool": changed(expected=True),
    "escape": changed(model="\x1b[2Jgpt"), "long": changed(attn_impl="x" * 61), "list": changed(more=[]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_foreign_file_is_a_line(name, folder, capsys):
    """It is skipped, nothing of it reaches the terminal but printable text, and the others are read."""
    (folder / "bad.json").write_bytes(BAD[name])
    assert len(read_measured(folder)) == 5
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("measured: skipped ") and "bad.json" in line and line.isprintable() and len(line) < 330


def test_only_so_many_files_are_read(folder, monkeypatch, capsys):
    """And only files that end in .json: a folder of that name, or a pickle, is not looked into."""
    (folder / "x.pkl").write_bytes(b"cposix\nsystem\n")
    (folder / "dir.json").mkdir()
    monkeypatch.setattr(measured, "MOST_FILES", 2)
    assert len(read_measured(folder)) == 2 and "has 5 files; the first 2 are read" in capsys.readouterr().out
