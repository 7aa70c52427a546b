"""onechip/runfolder.py: the name of every file a run leaves."""

import json
from pathlib import Path

import pytest

from onechip.errors import UserError
from onechip.resume import bring_back
from onechip.runfolder import RunFolder, checkpoint_name, find_checkpoints


def test_every_file_has_one_name():
    """The names that readers of a run rely on, from any kind of path."""
    for path in ("runs/x", Path("runs") / "x"):
        run = RunFolder(path)
        names = [run.config, run.metrics, run.picture, run.profile, run.checkpoints, run.model]
        expected = ["config.json", "metrics.jsonl", "loss.png", "profile", "checkpoints", "model"]
        assert run.path == Path("runs/x") and names == [run.path / name for name in expected]
        assert run.checkpoint(123) == Path("runs/x/checkpoints/step_00000123")
        assert run.nonfinite(7) == Path("runs/x/checkpoints/nonfinite_00000007")


def test_only_names_of_ours_are_checkpoints(tmp_path):
    """By step, not by date or spelling; a copy, a note and a file are a person's, and so is what only looks alike."""
    steps = [9, 10, 2, 10**8, 2 * 10**9]
    for step in steps:
        (tmp_path / checkpoint_name(step)).mkdir()
    others = ["step_00000003_best_ever", "step_zzz", "step_3", "step_000000012", "step_", "damaged_step_00000001_0"]
    for name in (*others, "step_\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661", ".step_00000011.part"):
        (tmp_path / name).mkdir()
    for name in ("step_notes.txt", "step_00000004"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "step_00000005").symlink_to(tmp_path / "step_00000009")
    (tmp_path / "step_00000006").symlink_to(tmp_path / "nowhere")
    found = find_checkpoints(tmp_path)
    assert list(found) == sorted([*steps, 5])
    assert all(path == tmp_path / checkpoint_name(step) for step, path in found.items())
    assert find_checkpoints(tmp_path / "nowhere") == {}


FILES, FOLDERS = ("config.json", "metrics.jsonl", "tokenizer.json", "loss.png"), ("profile", "checkpoints", "model")


@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_what_is_in_the_way_of_a_run_is_refused_before_it_trains(tmp_path, name):
    """A folder in the place of a file, or a file or a broken link in that of a folder: its name and the way out."""
    bring_back(RunFolder(tmp_path))
    if name in FILES:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"^run='{tmp_path}/{name}': is (not )?a folder, .*: move it elsewhere$"):
        bring_back(RunFolder(tmp_path))
    (tmp_path / name).rmdir() if name in FILES else (tmp_path / name).unlink()
    (tmp_path / name).mkdir() if name in FOLDERS else (tmp_path / name).write_text("")
    bring_back(RunFolder(tmp_path))


def test_what_a_killed_process_left_in_a_run_is_swept_at_the_next_start(tmp_path):
    """Half-written files next to the curve, in model/ and among the checkpoints; what is complete stays."""
    left = [".loss.png.a1b2c3d4.part", "model/.README.md.a1b2c3d4.part", "checkpoints/.step_00000005.part"]
    for place in (*left, "model", "checkpoints/step_00000004"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for file in ("loss.png", "model/README.md", f"{left[0]}/loss.png", f"{left[1]}/README.md", f"{left[2]}/state.json"):
        (tmp_path / file).touch()
    bring_back(RunFolder(tmp_path))
    assert not [place for place in left if (tmp_path / place).exists()]
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        *("loss.png", "model", "model/README.md", "checkpoints", "checkpoints/step_00000004")
    }


def test_a_runs_settings_are_a_dict_or_one_line(tmp_path):
    """A folder without config.json, or with one that cannot be read, is named with what is wrong."""
    run = RunFolder(tmp_path)
    for raw, problem in ((None, "No such file"), (b"{", "is not JSON"), (b"[]", "not an object")):
        if raw is not None:
            run.config.write_bytes(raw)
        with pytest.raises(UserError, match=problem) as raised:
            run.read_config()
        assert str(run.config) in str(raised.value) and "\n" not in str(raised.value)
    run.config.write_text(json.dumps({"config": {"n_head": 4}}))
    assert run.read_config() == {"config": {"n_head": 4}}
