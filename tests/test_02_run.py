"""02's way from a Run's settings to a trained model: the tokenizer, the text and the folder that a run keeps."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest
from corpus import list_checkpoints, newest, read_rows, tiny, write_documents
from hub import Fault, connected_hub

from onechip.errors import UserError
from onechip.machine import home
from onechip.runfolder import RunFolder
from onechip.settings import Run

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")


@pytest.fixture
def shards(tmp_path):
    """A folder of parquet shards of this test's own, and an empty home for tokenizers."""
    folder = tmp_path / "text"
    for i, count in enumerate((40, 40)):
        tok.write_shard(folder / f"shard_{i:05d}.parquet", write_documents(count, i, 30), 7)
    shutil.rmtree(home() / "tokenizers", ignore_errors=True)
    return folder


def run_of(shards, tmp_path, name, **settings):
    return Run(preset="laptop", data=str(shards), num_shards=1, name=name, out=str(tmp_path / "runs"), **settings)


def config_of(steps=12):
    return tiny(num_iterations=steps, eval_every=0, save_every=4, warmdown_ratio=0.0, vocab_size=280)


def other_tokenizer(shards):
    """Puts another tokenizer where the corpus has its own: what another Python or --max_train_chars would do."""
    (path,) = (home() / "tokenizers").glob("*/tokenizer.json")
    few = tok.train_tokenizer(["the the and and of of import return " * 9, "naive water " * 99], 280)
    tok.save_tokenizer(few, path)
    return tok.tokenizer_hash(few)


@pytest.mark.slow
def test_a_run_keeps_the_tokenizer_it_began_with(shards, tmp_path, capsys):
    """The corpus has got another one in between, whose ids mean other words. The run resumes to the last bit."""
    train.train_run(run_of(shards, tmp_path, "whole"), config_of())
    train.train_run(run_of(shards, tmp_path, "cut"), config_of(8))
    other = other_tokenizer(shards)
    result, tokenizer, _ = train.train_run(run_of(shards, tmp_path, "cut"), config_of())
    assert tok.tokenizer_hash(tokenizer) != other and "tokenizer_sha256" not in capsys.readouterr().out
    runs = tmp_path / "runs"
    assert [row["loss"] for row in read_rows(runs / "whole") if "loss" in row] == [
        row["loss"] for row in read_rows(runs / "cut") if "loss" in row
    ]
    names = ("params.safetensors", "opt.safetensors", "stream.safetensors", "tokenizer.json", "config.json")
    for name in names:  # left-over tokens too: they do not grow with a resume
        assert (newest(runs / "whole") / name).read_bytes() == (newest(runs / "cut") / name).read_bytes()
    states = [json.loads((newest(runs / name) / "state.json").read_text()) for name in ("whole", "cut")]
    assert {"step", "stream", "made_from"} <= set(states[0])
    scored = {"best_step": 0, "best_score": 0}  # the cut one was scored where it was cut
    assert {**states[0], **scored} == {**states[1], **scored}


def test_a_run_ends_with_its_sessions_hours(shards, tmp_path, capsys):
    """--session_hours reaches the loop: a process that is older trains nothing, and says why."""
    result, _, _ = train.train_run(run_of(shards, tmp_path, "late", session_hours=0.0001), config_of())
    assert result.step == 0 and "ended for session_hours=0.0001 after step 0" in capsys.readouterr().out


def test_another_tokenizer_is_refused_where_its_own_is_gone(shards, tmp_path):
    """Both hashes and the way out in one line; nothing is lost."""
    train.train_run(run_of(shards, tmp_path, "run"), config_of(8))
    folder = RunFolder(tmp_path / "runs" / "run")
    kept = tok.tokenizer_hash(tok.load_tokenizer(folder.tokenizer))
    folder.tokenizer.unlink()
    for path in folder.checkpoints.glob("*/tokenizer.json"):  # as checkpoints were before they held one
        path.unlink()
        manifest = path.with_name("manifest.json")
        manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != path.name}))
    other, before = other_tokenizer(shards), list_checkpoints(folder.path)
    with pytest.raises(UserError, match=rf"^tokenizer_sha256='{other}': .*{kept}.* another name") as caught:
        train.train_run(run_of(shards, tmp_path, "run"), config_of())
    assert "\n" not in str(caught.value) and list_checkpoints(folder.path) == before


def test_other_text_is_refused_unless_asked_for(shards, tmp_path, capsys):
    """The same names and sizes are not enough; --other_data true resumes and says what has changed."""
    train.train_run(run_of(shards, tmp_path, "run"), config_of(8))
    tok.write_shard(shards / "shard_00000.parquet", write_documents(40, 9, 30), 7)
    with pytest.raises(UserError, match="^data=.*was trained with .*--other_data true"):
        train.train_run(run_of(shards, tmp_path, "run"), config_of())
    result, _, _ = train.train_run(run_of(shards, tmp_path, "run", other_data=True), config_of())
    assert result.step == 12 and "changed: data is " in capsys.readouterr().out


HOLD = "import sys; from onechip.lock import RunLock\nwith RunLock(sys.argv[1]): print(flush=True); sys.stdin.read()"


def test_a_run_has_one_owner(shards, tmp_path):
    """A second start is one line that names the first, and touches nothing; after its end the run is free."""
    lock = RunFolder(tmp_path / "runs" / "run").lock
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], **pipes) as first:
        first.stdout.readline()
        with pytest.raises(UserError, match=f"process {first.pid} on .* has this run"):
            train.train_run(run_of(shards, tmp_path, "run"), config_of(4))
        assert [path.name for path in lock.parent.iterdir()] == [lock.name]
    result, _, _ = train.train_run(run_of(shards, tmp_path, "run"), config_of(4))
    assert result.step == 4 and not lock.exists()


@pytest.mark.slow
def test_what_the_hub_missed_goes_up_at_the_next_start(shards, tmp_path, monkeypatch):
    """A finished run whose uploads all failed is started again: its checkpoint and its tokenizer arrive whole."""
    with connected_hub(monkeypatch, users={"hf_loopback": "someone"}) as hub:
        hub.faults = [Fault("POST", "/commit/", status=500, times=10**6)]
        train.train_run(run_of(shards, tmp_path, "run"), config_of(8), "hf_loopback")
        assert not hub.files("someone/onechip-run")
        hub.faults = []
        train.train_run(run_of(shards, tmp_path, "run"), config_of(8), "hf_loopback")
        files = hub.files("someone/onechip-run")
        assert {"tokenizer.json", "onechip.json", "params.safetensors"} <= set(files)
        whole = {path.rpartition("/")[2] for path in files if path.startswith("checkpoints/step_00000008/")}
        assert whole == {path.name for path in newest(tmp_path / "runs" / "run").iterdir()}
        shutil.rmtree(tmp_path / "runs")
        result, tokenizer, _ = train.train_run(run_of(shards, tmp_path, "run"), config_of(), "hf_loopback")
        assert result.step == 12  # on a new machine, with its own tokenizer
        assert tokenizer.to_str(pretty=True).encode() == files["tokenizer.json"]


def test_a_run_can_be_taken_over(shards, tmp_path):
    """--take_over true asks nobody: for an owner that hangs, on this machine or another."""
    lock = RunFolder(tmp_path / "runs" / "run").lock
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], **pipes) as first:
        first.stdout.readline()
        result, _, _ = train.train_run(run_of(shards, tmp_path, "run", take_over=True), config_of(4))
        assert result.step == 4
