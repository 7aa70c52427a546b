"""onechip/objects.py: a bucket as a run's second home, by the real client against a stand-in of Google's storage."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus import assert_same_end, is_one_line, newest, train_tiny
from hub import Fault, connected_hub
from store import PAGE, Store, connected_store

from onechip import objects, resume
from onechip.checkpoints import newest_checkpoint, write_checkpoint
from onechip.errors import UserError
from onechip.mirror import Mirror, check_mirror, open_mirror
from onechip.objects import ObjectPlace
from onechip.settings import Run

ROOT = Path(__file__).resolve().parents[2]
URL = "gs://bucket/some/runs"
CANARY = "ya29.canary_NeverToBeSeen"
OPT_SIZE = 1_500_000  # float32 numbers: 6 MB, more than the client sends in one request


@pytest.fixture
def store(monkeypatch):
    with connected_store(monkeypatch) as store:
        yield store


def some_files(value, size=7):
    return {
        "params.safetensors": {"w": np.full(5, value, np.float32)},
        "opt.safetensors": {"mu.w": np.full(size, -value, np.float32)},
        "metrics.jsonl": b'{"step": 1}\n',
        "config.json": b"{}",
        "state.json": b'{"step": %d}' % value,
    }


def write(folder, step, size=7):
    path = folder / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, some_files(step, size))
    return path


def mirror_of(url=URL):
    return Mirror(ObjectPlace(url), weights_minutes=1e9, state_minutes=0)


def offer(mirror, path):
    """Offers a checkpoint and waits until it is up, or is not."""
    mirror.offer(path)
    mirror._pool.submit(lambda: None).result(60)


def content(path):
    return {f"{path.name}/{file.name}": file.read_bytes() for file in path.iterdir()}


def stored(store, bucket="bucket", folder="some/runs"):
    start = f"{folder}/checkpoints/"
    return {name.removeprefix(start): raw for name, raw in store.objects[bucket].items() if name.startswith(start)}


def restored(folder, url=URL):
    """The step of the checkpoint that a run in `folder` would resume from, or None."""
    mirror = mirror_of(url)
    mirror.restore(folder)
    mirror.finish()
    path = newest_checkpoint(folder)
    return path and int(path.name[5:])


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints go up


def test_a_checkpoint_goes_up_with_its_manifest_last_and_replaces_older_ones(store, tmp_path, capfd):
    """Byte for byte, one at any time after an upload; of what is replaced the manifest goes first; nothing is said."""
    mirror = mirror_of()
    paths = [write(tmp_path, step) for step in (3, 4)]
    for path in paths:
        store.requests.clear()
        offer(mirror, path)
        assert stored(store) == content(path)
    sent = [path for method, path in store.requests if method == "POST"]
    deleted = [path for method, path in store.requests if method == "DELETE"]
    assert len(sent) == 6 == len(deleted) and "step_00000003%2Fmanifest.json" in deleted[0]
    last = list(store.objects["bucket"])[-1]
    assert last == "some/runs/checkpoints/step_00000004/manifest.json", "the order in which they came"
    mirror.finish()
    assert capfd.readouterr() == ("", "") and len(stored(store)) == 6 > PAGE


def test_a_large_file_goes_up_in_pieces(store, tmp_path, monkeypatch):
    """A resumable upload of two whose first fails once and whose second loses its answer: the file comes back whole."""
    monkeypatch.setattr(objects, "UPLOAD_PIECE", 1 << 22)
    path = write(tmp_path / "a", 5, OPT_SIZE)
    store.faults = [Fault("POST", "/session/", status=503), Fault("POST", "/session/", cut=True, times=2)]
    mirror = mirror_of()
    offer(mirror, path)
    mirror.finish()
    assert stored(store) == content(path) and store.count("POST", "/session/") == 4
    assert restored(tmp_path / "b") == 5


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/upload/", status=503, times=3),
        Fault("POST", "/upload/", status=429, times=2),
        Fault("POST", "/upload/", cut=True, times=2),
        Fault("GET", "/o$", status=500, times=2),
        Fault("DELETE", "/o/", status=503, times=2),
    ],
    ids=lambda fault: f"{fault.method} {fault.status or 'cut'}",
)
def test_what_passes_is_tried_again_in_silence(store, tmp_path, capfd, fault):
    """Errors of the server, a rate limit and a cut connection: the client's own attempts, and not a line."""
    store.faults = [dataclasses.replace(fault)]
    mirror = mirror_of()
    offer(mirror, write(tmp_path, 1))
    offer(mirror, path := write(tmp_path, 2))
    mirror.finish()
    assert stored(store) == content(path) and store.faults[0].times == 0 and capfd.readouterr() == ("", "")


def test_a_place_that_fails_is_reported_once_and_gets_what_it_missed(store, tmp_path, capfd, caplog):
    """A line at the first failure with the reason, one when it works again, and one at the end."""
    mirror = mirror_of()
    store.faults = [Fault("POST", "/upload/", status=503, times=10**6)]
    for step in (1, 2):
        offer(mirror, write(tmp_path, step))
    store.faults.clear()
    offer(mirror, path := write(tmp_path, 3))
    mirror.finish()
    out, err = capfd.readouterr()
    failed, works, last = out.splitlines()
    assert failed.startswith(f"upload: step_00000001: cannot be uploaded to {URL} (") and "training continues" in failed
    assert works == f"upload: works again, step_00000003 is on {URL}" and err == ""
    assert last.startswith(f"upload: 2 to {URL} failed, the last of them step_00000002") and is_one_line(last, 500)
    assert stored(store) == content(path) and caplog.records == [], "the client's own log"


def test_bytes_that_are_damaged_on_the_way_up_are_found(store, tmp_path, capsys):
    """The client compares MD5: the checkpoint is not whole then, no manifest names it, and the next one goes up."""
    mirror = mirror_of()
    store.faults = [Fault("POST", "/upload/", flip=True)]
    offer(mirror, write(tmp_path, 1))
    assert "manifest.json" not in {name.split("/")[1] for name in stored(store)}
    assert "step_00000001: cannot be uploaded" in capsys.readouterr().out
    offer(mirror, path := write(tmp_path, 2))
    mirror.finish()
    assert stored(store) == content(path)


def test_a_checkpoint_that_goes_up_again_is_not_whole_meanwhile(store, tmp_path):
    """The manifest of an earlier one of the same step goes first: a machine that dies here leaves no mixture."""
    first, other = write(tmp_path / "a", 8), tmp_path / "b" / "step_00000008"
    offer(mirror := mirror_of(), first)
    mirror.finish()
    other.parent.mkdir()
    write_checkpoint(other, some_files(80))
    store.faults = [Fault("POST", "/upload/", times=0), Fault("POST", "/upload/", status=403, times=10**6)]
    offer(mirror := mirror_of(), other)
    assert mirror.place.list() == set() and len(stored(store)) == 5
    store.faults.clear()
    mirror.finish()
    assert stored(store) == content(other)


def test_what_cannot_be_deleted_stays_with_a_line(store, tmp_path, capsys):
    """An account that may write and not delete: every checkpoint is up all the same, and it is said once."""
    mirror = mirror_of()
    store.refused = {"DELETE"}
    for step in (1, 2, 3):
        offer(mirror, write(tmp_path, step))
    mirror.finish()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"upload: older checkpoints stay in {URL} (Forbidden") and is_one_line(line)
    assert mirror.place.list() == {f"step_{step:08d}" for step in (1, 2, 3)}


def test_only_checkpoints_are_deleted(store, tmp_path):
    """What else a person keeps in the folder stays: other names, and a newer one that was found damaged."""
    others = ("step_notes.txt", "step_00000001_best/params.safetensors", "mine/x", "step_00000009/opt.safetensors")
    for name in others:
        store.objects["bucket"][f"some/runs/checkpoints/{name}"] = b"mine"
    store.objects["bucket"]["some/runs/checkpoints2/step_00000001/x"] = b"mine"
    offer(mirror := mirror_of(), path := write(tmp_path, 5))
    mirror.finish()
    assert stored(store) == content(path) | dict.fromkeys(others, b"mine")
    assert store.names("bucket/some/runs/checkpoints2") == ["/step_00000001/x"]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints come back


def test_the_newest_of_both_homes_is_taken(store, tmp_path, capsys):
    """An empty place: a fresh start. The place newer: its own. Older: the local one, which then goes up."""
    assert restored(tmp_path / "fresh") is None
    offer(mirror := mirror_of(), write(tmp_path / "up", 5))
    mirror.finish()
    assert restored(tmp_path / "empty") == 5 and f"step_00000005 came from {URL}" in capsys.readouterr().out
    assert content(tmp_path / "empty" / "step_00000005") == content(tmp_path / "up" / "step_00000005")
    write(tmp_path / "older", 4)
    assert restored(tmp_path / "older") == 5
    write(tmp_path / "newer", 6)
    assert restored(tmp_path / "newer") == 6 and stored(store) == content(tmp_path / "newer" / "step_00000006")


def test_a_half_uploaded_checkpoint_is_passed_over(store, tmp_path, capsys):
    """Without its manifest it is not there, though all else is; the older one is taken, and both go with the next."""
    for step in (5, 6):
        path = write(tmp_path / "up", step)
        for name, raw in content(path).items():
            store.objects["bucket"][f"some/runs/checkpoints/{name}"] = raw
    del store.objects["bucket"]["some/runs/checkpoints/step_00000006/manifest.json"]
    assert restored(tmp_path / "here") == 5 and "damaged" not in capsys.readouterr().out
    offer(mirror := mirror_of(), path := write(tmp_path / "next", 7))
    mirror.finish()
    assert stored(store) == content(path)


def test_a_damaged_checkpoint_is_named_and_passed_over(store, tmp_path, capsys):
    """One that is spoiled on the way is fetched again; one that is spoiled there gives way to an older one."""
    for step in (5, 6):
        for name, raw in content(write(tmp_path / "up", step)).items():
            store.objects["bucket"][f"some/runs/checkpoints/{name}"] = raw
    store.faults = [Fault("GET", "/download/.*step_00000006/params", flip=True)]
    assert restored(tmp_path / "flipped") == 6 and "damaged" not in capsys.readouterr().out
    store.objects["bucket"]["some/runs/checkpoints/step_00000006/params.safetensors"] = b"\x55" * 88
    assert restored(tmp_path / "spoiled") == 5
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"checkpoint: step_00000006 on {URL} is damaged: params.safetensors") and len(said) == 2
    assert not list((tmp_path / "spoiled").glob(".*"))


def test_names_of_a_bucket_do_not_leave_the_folder(store, tmp_path):
    """Somebody's object `..` or `a/../../x` is no file of a checkpoint, and nothing is written beside it."""
    for name, raw in content(write(tmp_path / "up", 5)).items():
        store.objects["bucket"][f"some/runs/checkpoints/{name}"] = raw
    for name in ("..", "../escaped", ".hidden", "a/../../escaped", "x\ny"):
        store.objects["bucket"][f"some/runs/checkpoints/step_00000005/{name}"] = b"no"
    assert restored(tmp_path / "here") == 5
    assert content(tmp_path / "here" / "step_00000005") == content(tmp_path / "up" / "step_00000005")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "up"]


@pytest.mark.parametrize("fault", [Fault("GET", "/download/", cut=True), Fault("GET", "/o$", status=503, times=3)])
def test_a_download_is_tried_again(store, tmp_path, fault):
    """A connection that is cut in the middle of a file, and a list that fails at first."""
    offer(mirror := mirror_of(), write(tmp_path / "up", 5, 20_000))
    mirror.finish()
    store.faults = [dataclasses.replace(fault)]
    assert restored(tmp_path / "here") == 5 and store.faults[0].times == 0


def test_a_place_that_cannot_be_reached_does_not_cost_a_run(store, tmp_path, capsys):
    """With a checkpoint here training resumes from that; with none it is refused: a fresh start might be the loss."""
    mirror = mirror_of()
    store.faults = [Fault("GET", "/o$", status=503, times=10**6)]
    with pytest.raises(UserError, match=f"{URL}: cannot be listed") as raised:
        mirror.restore(tmp_path / "empty")
    assert is_one_line(raised.value) and "check the network" in str(raised.value)
    write(tmp_path / "here", 2)
    mirror.restore(tmp_path / "here")
    assert f"without a look at {URL}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# A run


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once", "interruptible")
def test_a_run_whose_folder_is_gone_resumes_from_the_bucket(store, corpus, tokenizer, straight, tmp_path, monkeypatch):
    """Ended in the middle, folder and all deleted: the same start resumes at that step and ends the same to the bit."""
    monkeypatch.setattr(resume, "git_commit", lambda: "a commit")
    stop = lambda row: row["step"] == 13 and signal.raise_signal(signal.SIGINT)
    cut = train_tiny(corpus, tokenizer, tmp_path / "run", on_log=stop, mirror=mirror_of())
    kept = content(newest(tmp_path / "run"))
    assert 13 <= cut.step < 26 and stored(store) == kept
    shutil.rmtree(tmp_path / "run")
    steps = []
    again = train_tiny(
        corpus, tokenizer, tmp_path / "run", on_log=lambda row: steps.append(row["step"]), mirror=mirror_of()
    )
    assert steps[0] == cut.step + 1 and again.step == 26
    assert_same_end(tmp_path / "run", straight[0].run_dir)
    assert stored(store) == content(newest(tmp_path / "run"))


@pytest.mark.usefixtures("compiled_once")
def test_a_place_that_always_fails_ends_no_training(store, corpus, tokenizer, straight, tmp_path, monkeypatch, capsys):
    """It reaches its end, to the same bits, with every checkpoint here."""
    monkeypatch.setattr(resume, "git_commit", lambda: "a commit")
    mirror = mirror_of()
    store.faults = [Fault("POST", "/", status=503, times=10**6)]
    train_tiny(corpus, tokenizer, tmp_path / "run", mirror=mirror)
    assert_same_end(tmp_path / "run", straight[0].run_dir)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("upload: ")]
    assert len(said) == 2 and all(is_one_line(line, 500) for line in said) and stored(store) == {}


WORDS = "--preset laptop --n_head 2 --head_dim 8 --aspect_ratio 16 --vocab_size 300 --seq_len 64 --device_batch_size 2"
WORDS += " --total_batch_size 4 --eval_tokens 256 --eval_every 0 --sample_every 0 --save_every 5 --name x"
WORDS += " --num_iterations 100000"


@pytest.mark.slow
def test_a_machine_that_is_lost_costs_what_came_after_the_last_upload(corpus, tmp_path):
    """kill -9, its disk gone, the same command elsewhere: it resumes from the bucket. After SIGTERM all is there."""
    words = [*WORDS.split(), "--data", str(corpus.train[0].parent), "--mirror", URL, "--weights_minutes", "0"]
    with Store() as store:
        environment = os.environ | store.environment()
        manifests = lambda: [name for name in store.names("bucket/some/runs/x/") if name.endswith("/manifest.json")]
        whole = lambda: max((name[-22:-14] for name in manifests()), default="")
        outs = []
        for machine, number in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
            (folder := tmp_path / str(machine)).mkdir()
            before, command = whole(), [sys.executable, str(ROOT / "02_train.py"), *words]
            options = {"cwd": folder, "env": environment | {"HOME": str(folder)}, "text": True}
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
                wait_until(lambda before=before: whole() > before or process.poll() is not None, 120)
                process.send_signal(number)
                outs.append(process.communicate(timeout=120)[0])
            if machine == 1:
                kept = whole()
        assert f"checkpoint: step_{kept} came from {URL}/x" in outs[1], outs
        assert f"continues after step {int(kept):,} of" in outs[1] and process.returncode == 0
        assert whole() == newest(tmp_path / "2" / "runs" / "x").name[5:] > kept and not store.unknown


# ----------------------------------------------------------------------------------------------------------------------
# Which place


def test_a_runs_own_folder_is_below_the_address(store, tmp_path, capsys):
    """Runs that share an address share nothing else; what the lines say is where it is."""
    run = Run(name="exp/1", out="runs", mirror=f"{URL}/")
    mirror = open_mirror(run, None)
    assert capsys.readouterr().out == (
        f"checkpoints: in runs/exp/1/checkpoints and, in the background, in {URL}/exp/1\n"
    )
    offer(mirror, path := write(tmp_path, 5))
    mirror.finish()
    assert stored(store, folder="some/runs/exp/1") == content(path) and mirror.repo == ""
    assert not [name for name in store.names() if ".probe" in name]


def test_a_whole_checkpoint_goes_up_as_often_as_weights_would(store):
    """A bucket takes whole ones only: the shorter of the two settings counts."""
    for minutes, seconds in (((7.0, 50.0), 420), ((90.0, 50.0), 3000)):
        mirror = open_mirror(Run(name="x", mirror=URL, weights_minutes=minutes[0], state_minutes=minutes[1]), None)
        assert mirror._pace._limits == (float("inf"), seconds)


def test_with_a_token_as_well_the_hub_gets_the_export_alone(store, monkeypatch, tmp_path, capsys):
    """--mirror wins, a line says so, and the export's repository is known; a refused token changes nothing of it."""
    with connected_hub(monkeypatch) as hub:
        mirror = open_mirror(Run(name="x", mirror=URL), "hf_loopback")
        offer(mirror, write(tmp_path, 5))
        mirror.finish()
        assert mirror.repo == "someone/onechip-x" and hub.repos == {}
        assert "; the Hub gets only the exported model" in capsys.readouterr().out
        assert open_mirror(Run(name="x", mirror=URL), "hf_wrong").repo == ""
    assert store.names("bucket/some/runs/x/checkpoints/step_00000005/")


BAD = {
    "bucket/folder": "must be a folder of a bucket",
    "gs:/bucket/x": "must be a folder of a bucket",
    "gs://": "must be a folder of a bucket",
    "gs:///x": "must be a folder of a bucket",
    "gs://bucket/../x": "must be a folder of a bucket",
    "gs://bucket//x": "must be a folder of a bucket",
    "gs://bucket/a b": "must be a folder of a bucket",
    "gs://bucket/x*": "must be a folder of a bucket",
    "simplecache::gs://bucket/x": "must be a folder of a bucket",
    "gz://bucket/x": "gz:// is no storage that fsspec knows; use gs://bucket/folder",
    "s3://bucket/x": "the client for s3:// is not installed: pip install s3fs",
    "gs://canary:canary@bucket/x": "must not hold a user, a password or a key",
    "gs://bucket/x?key=canary": "must not hold a user, a password or a key",
}


@pytest.mark.parametrize("url", BAD)
def test_an_address_that_cannot_be_is_refused_in_a_line(url):
    """Before anything is sent or trained, with what would be right, and without what may be a secret."""
    with pytest.raises(UserError) as raised:
        check_mirror(Run(name="x", mirror=url))
    assert BAD[url] in str(raised.value) and is_one_line(raised.value) and "canary" not in str(raised.value)
    check_mirror(Run(name="x", mirror=url, preflight="here"))


def test_a_client_that_is_not_installed_is_named(monkeypatch):
    """The package to install, and no traceback of an import."""
    import fsspec

    def absent(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(UserError, match=r"the client for gs:// is not installed: pip install gcsfs$"):
        ObjectPlace(URL)


def test_a_bucket_that_is_not_there_is_refused_in_a_line(store):
    with pytest.raises(UserError, match="there is no such bucket") as raised:
        check_mirror(Run(name="x", mirror="gs://another/folder"))
    assert is_one_line(raised.value) and "gs://another/folder/x: cannot be listed" in str(raised.value)
    assert max(store.slept, default=0) == 0, "it is not tried again"


def test_an_account_that_may_not_write_is_refused_in_a_line(store):
    """A TPU VM whose scopes let it read only: known before training, with the role that it needs."""
    store.refused = {"POST"}
    with pytest.raises(UserError, match=f"{URL}/x: cannot be written to .*Storage Object Admin") as raised:
        check_mirror(Run(name="x", mirror=URL))
    assert is_one_line(raised.value, 500) and "someone@example.com may not do that" in str(raised.value)


def test_no_credentials_are_a_line(monkeypatch):
    """The storage refuses the anonymous: how to log in."""
    with connected_store(monkeypatch, token="ya29.right") as store:
        with pytest.raises(UserError, match="there are no credentials that it takes: run `gcloud auth") as raised:
            check_mirror(Run(name="x", mirror=URL))
        assert is_one_line(raised.value, 500) and len(store.requests) == 1


def test_a_start_outlives_a_place_that_is_down(store, capsys):
    """What may pass is no reason to refuse: whoever needs the place says what is lost without it."""
    store.faults = [Fault("GET", "/o$", status=503, times=10**6)]
    check_mirror(Run(name="x", mirror=URL))
    assert open_mirror(Run(name="x", mirror=URL), None) is not None and "checkpoints: in " in capsys.readouterr().out


@pytest.mark.slow
def test_no_credential_is_ever_printed(monkeypatch, tmp_path, capfd):
    """Even where the storage's answer repeats it: in a refusal, in its causes, and in the lines of a failing upload."""
    import traceback

    from google.oauth2.credentials import Credentials

    real = objects.client_options
    monkeypatch.setattr(objects, "client_options", lambda name: {**real(name), "token": Credentials(CANARY)})
    with connected_store(monkeypatch, token=CANARY) as store:
        mirror = mirror_of()
        offer(mirror, write(tmp_path, 1))
        store.refused = {"POST", "DELETE"}
        offer(mirror, write(tmp_path, 2))
        mirror.finish()
        with pytest.raises(UserError) as raised:
            check_mirror(Run(name="x", mirror=URL))
        assert set(store.tokens) == {CANARY}, "the storage was sent it, and repeats it"
    out, err = capfd.readouterr()
    shown = out + err + "".join(traceback.format_exception(raised.value))
    assert "step_00000002: cannot be uploaded" in out and "may not do that: *** Bearer ***" in shown
    assert "canary" not in shown and "NeverToBeSeen" not in shown


def test_a_mounted_folder_is_a_place_as_well(tmp_path):
    """file:///mnt/bucket, as gcsfuse mounts one: whole, replaced, and back."""
    url = f"file://{tmp_path}/mounted/runs"
    check_mirror(Run(name="x", mirror=url))
    for step in (1, 2):
        offer(mirror := mirror_of(url), path := write(tmp_path / "up", step))
        mirror.finish()
    assert [folder.name for folder in (tmp_path / "mounted/runs/checkpoints").glob("step_*/manifest.json")]
    assert content(tmp_path / "mounted/runs/checkpoints/step_00000002") == content(path)
    assert restored(tmp_path / "here", url) == 2
