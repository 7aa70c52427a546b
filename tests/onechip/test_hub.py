"""onechip/hub.py and hubclient.py: uploads that fail stop nothing, one retry policy, no secret in any line."""

import dataclasses
import logging
import os
import random
import shutil
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import hub as loopback
import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from hub import Fault, connected_hub
from parted import split_checkpoint

from onechip import mirror as room
from onechip import uploads
from onechip.checkpoints import newest_checkpoint, write_checkpoint
from onechip.errors import UserError
from onechip.hub import HubPlace, is_repo_name, repo_name, upload_folder
from onechip.hubclient import LONGEST_PAUSE, check_token, describe_error, redact, try_again
from onechip.mirror import Mirror, open_mirror
from onechip.parts import holds_weights
from onechip.settings import Run
from onechip.writer import CheckpointWriter

REPO = "someone/onechip-x"
TOKEN = "hf_loopback"
CANARY = "hf_canary_Never_ToBeSeen"


@pytest.fixture
def hub(monkeypatch):
    with connected_hub(monkeypatch, users={TOKEN: "someone", CANARY: "someone"}) as hub:
        yield hub


def some_files(value):
    return {
        "params.safetensors": {"w": np.full(4, value, np.float32)},
        "opt.safetensors": {"mu.w": np.full(4, -value, np.float32)},
        "metrics.jsonl": b'{"step": 1}\n',
        "config.json": b"{}",
        "state.json": b'{"step": %d}' % value,
    }


def value_of(path):
    return int(safetensors.numpy.load_file(path / "params.safetensors")["w"][0])


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_one_line(said):
    return "\n" not in str(said) and 0 < len(str(said)) < 500


def mirror_of(hub, token=TOKEN, **minutes):
    return Mirror(HubPlace(token, REPO), **minutes)


def settle(mirror):
    """Waits until nothing is being uploaded."""
    mirror._pool.submit(lambda: None).result(60)


def offer(mirror, folder, step):
    """Writes a checkpoint, offers it and waits."""
    path = folder / f"step_{step:08d}"
    write_checkpoint(path, some_files(step))
    mirror.offer(path)
    settle(mirror)
    return path


def clock_of(monkeypatch):
    """[seconds]: the clock that uploads go by."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr(room, "time", clock)
    monkeypatch.setattr(uploads, "time", clock)
    return now


def commits(hub):
    """Each commit's files, without the one that the repository begins with."""
    return list(hub.repos["model", REPO].commits.values())[1:]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints go up


def test_weights_go_up_often_and_the_whole_state_now_and_then(hub, tmp_path, monkeypatch):
    """One commit each; the state by its own clock, the last in any case, and older states leave in the same commit."""
    now = clock_of(monkeypatch)
    mirror = mirror_of(hub, weights_minutes=10, state_minutes=30)
    went_up = []
    for step in range(1, 10):
        offer(mirror, tmp_path, step)
        now[0] += 300
        found = commits(hub)
        steps = {path.split("/")[1] for path in found[-1] if path.startswith("checkpoints/")}
        assert len(steps) == 1, "one whole state at any time"
        went_up.append((len(found), int(steps.pop()[-1])))
    assert went_up == [(1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1), (4, 7), (4, 7), (5, 7)]
    for files, step in zip(commits(hub), (1, 3, 5, 7, 9), strict=True):
        assert safetensors.numpy.load(files["params.safetensors"])["w"][0] == step
        assert files["metrics.jsonl"] == b'{"step": 1}\n' and files["config.json"] == b"{}"
    mirror.finish()
    assert len(commits(hub)) == 6 and hub.repos["model", REPO].private
    last = {path.removeprefix("checkpoints/step_00000009/"): raw for path, raw in hub.files(REPO).items()}
    assert content(tmp_path / "step_00000009").items() <= last.items()


def test_another_number_of_processes_leaves_no_weights_of_the_last_one(hub, tmp_path, monkeypatch):
    """One process, two, three, one: at the top of the repository are always the files of the newest weights alone."""
    now = clock_of(monkeypatch)
    mirror = mirror_of(hub, weights_minutes=1, state_minutes=1e6)
    for step, count in enumerate((1, 2, 3, 3, 1), 1):
        path = tmp_path / f"step_{step:08d}"
        write_checkpoint(path, some_files(step))
        if count > 1:
            split_checkpoint(path, count)
        mirror.offer(path)
        settle(mirror)
        now[0] += 100
        top = {name for name in commits(hub)[-1] if "/" not in name and "safetensors" in name}
        assert top == {name for name in os.listdir(path) if holds_weights(name)} and len(top) == count


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/commit/", status=500, times=3),
        Fault("POST", "/preupload/", status=429, headers={"Retry-After": "1"}, times=2),
        Fault("POST", "/repos/create", status=503, times=2),
        Fault("POST", "/objects/batch", stall=True, times=2),
        Fault("PUT", "/lfs/", cut=True),
    ],
    ids=lambda fault: f"{fault.path} {fault.status or 'broken'}",
)
def test_an_upload_is_tried_again(hub, tmp_path, capfd, fault):
    """Errors, a rate limit, a stall and a cut: with growing pauses, until it is up; no line, no bar."""
    hub.faults = [dataclasses.replace(fault)]
    mirror = mirror_of(hub)
    path = offer(mirror, tmp_path, 1)
    mirror.finish()
    up = hub.files(REPO)
    assert {f"checkpoints/step_00000001/{name}": raw for name, raw in content(path).items()}.items() <= up.items()
    assert hub.faults[0].times == 0 and capfd.readouterr() == ("", "")
    if fault.status == 500:
        assert [s for s in hub.slept if s >= 1] == [1, 2, 4]
    if fault.status == 429:
        assert max(hub.slept) >= 1


def test_a_failed_upload_is_reported_at_once_and_again_at_the_end(hub, tmp_path, capsys):
    """A line when it happens, none for the next of its kind, and a last one with what worked last, and when."""
    mirror = mirror_of(hub)
    offer(mirror, tmp_path, 1)
    assert capsys.readouterr().out == ""
    hub.faults = [Fault("POST", "/commit/", status=403, times=10**6)]
    mirror._pace.note_failure()  # both are due
    offer(mirror, tmp_path, 2)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"upload: step_00000002: cannot be uploaded to {REPO} (") and "403" in line
    offer(mirror, tmp_path, 3)
    assert capsys.readouterr().out == "", "the same once more"
    hub.faults = [Fault("POST", "/commit/", status=500, times=10**6)]
    mirror.finish()
    at_once, last = capsys.readouterr().out.splitlines()
    assert at_once.startswith("upload: step_00000003: cannot be uploaded") and "500" in at_once, "of another kind"
    assert last.startswith(f"upload: 3 to {REPO} failed, the last of them step_00000003 (") and "500" in last
    today = time.strftime("%Y-%m-%d ")
    assert f"the last one that worked: step_00000001 at {today}" in last
    assert all(map(is_one_line, (line, at_once, last))) and len(commits(hub)) == 1


def test_a_hub_that_comes_back_gets_what_it_missed(hub, tmp_path, capsys):
    """A failed upload is due again at the next checkpoint, not an hour later, and a repository is created then."""
    hub.faults = [Fault("POST", "/repos/create", status=500, times=5)]
    mirror = mirror_of(hub)
    offer(mirror, tmp_path, 1)
    offer(mirror, tmp_path, 2)
    assert "checkpoints/step_00000002/manifest.json" in hub.files(REPO)
    mirror.finish()
    failed, works, last = capsys.readouterr().out.splitlines()
    assert "step_00000001: cannot be uploaded" in failed and "after 5 attempts" in failed
    assert works == f"upload: works again, step_00000002 is on {REPO}"
    assert "upload: 1 to" in last and "worked: step_00000002 at" in last


def test_a_checkpoint_stays_while_it_is_uploaded_and_is_not_copied(hub, tmp_path, monkeypatch):
    """It goes up from its own folder, on a disk without links as well: clearing old ones leaves it until it is up."""
    refuse = lambda *args, **kwargs: pytest.fail("a link or a copy")
    for owner, name in ((os, "link"), (shutil, "copytree"), (shutil, "copyfile")):
        monkeypatch.setattr(owner, name, refuse)
    began, proceed, real = threading.Event(), threading.Event(), HubPlace._commit
    monkeypatch.setattr(HubPlace, "_commit", lambda *a: (began.set(), proceed.wait(30), real(*a)))
    mirror = mirror_of(hub)
    writer = CheckpointWriter(tmp_path, keep=1, after=mirror.offer, held=mirror.held)
    steps = lambda: [path.name[-1] for path in sorted(tmp_path.iterdir())]
    for step in range(1, 5):
        writer.save(step, some_files(step))
        writer.wait()
        assert began.wait(30)
    assert steps() == ["1", "3", "4"], "the one that goes up, and the one that was offered when 4 came"
    proceed.set()
    settle(mirror)
    writer.save(5, some_files(5))
    writer.wait()
    assert steps() == ["4", "5"]
    mirror.finish()
    [first, last] = ({path for path in files if path.startswith("checkpoints/")} for files in commits(hub))
    assert {path.split("/")[1] for path in first} == {"step_00000001"} and len(first) == 6
    assert {path.split("/")[1] for path in last} == {"step_00000005"} and mirror.held() == {tmp_path / "step_00000005"}


def test_weights_are_sent_once(hub, tmp_path):
    """They lie twice in the repository, for whoever opens it and in the checkpoint: the bytes go up a single time."""
    mirror = mirror_of(hub)
    offer(mirror, tmp_path, 1)
    mirror.finish()
    up = hub.files(REPO)
    assert up["params.safetensors"] == up["checkpoints/step_00000001/params.safetensors"]
    assert hub.count("PUT", "/lfs/") == 2, "parameters and the optimizer's state"


# ----------------------------------------------------------------------------------------------------------------------
# How much work is at stake


def most_at_stake(monkeypatch, save, upload, jitter=0.0):
    """(minutes of work at most that the Hub lacks in a day, what is said); save, upload: minutes of each."""
    now = clock_of(monkeypatch)
    pace, draw, said = uploads.Pace(60 * Run().weights_minutes, 60 * Run().state_minutes), random.Random(0), []
    worst, there, free, newest, next_save = 0.0, 0.0, 0.0, None, 60 * save
    while now[0] < 86400:
        now[0] = min(next_save, max(free, now[0])) if newest else next_save
        if now[0] == next_save:
            newest = (now[0], pace.note_offer())
            next_save += 60 * (save + draw.uniform(-jitter, jitter))
        if now[0] < free:
            continue
        (made, offered), newest = newest, None  # the pool is idle: the newest one's turn
        weights, state = pace.due()
        if weights or state:
            began, free = now[0], now[0] + 60 * upload * (1 if state else 0.4)
            if state:
                worst, there = max(worst, free - there), made
            now[0] = free  # what comes meanwhile is offered late by this: at its own time below
            said.append(pace.note_upload(offered, began, state))
            now[0] = began
    return worst / 60, [line for line in said if line]


@pytest.mark.parametrize("upload", [0.5, 4, 8])
@pytest.mark.parametrize("save", [10, 12, 15, 18, 20, 22, 25, 28, 30, 31, 33, 35])
def test_no_more_than_75_minutes_are_ever_at_stake(monkeypatch, save, upload):
    """A day of checkpoints, steady ones and such as come when they come, by the settings' own defaults."""
    for jitter in (0.0, 2.0):
        worst, said = most_at_stake(monkeypatch, save, upload, jitter)
        assert worst <= uploads.PROMISE and said == []


def test_what_is_at_stake_beyond_75_minutes_is_said_once(monkeypatch, capsys):
    """Uploads of 50 minutes cannot hold it: the line has the minutes, and is printed once."""
    worst, said = most_at_stake(monkeypatch, 30, 50)
    assert worst > uploads.PROMISE and max(said) == pytest.approx(worst)
    report = uploads.UploadReport(REPO, TOKEN)
    for minutes in said[:2]:
        report.warn(minutes)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"upload: {said[0]:.0f} minutes of work were not on {REPO}") and is_one_line(line)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints come back


def put_up(hub, *steps):
    """A repository with these checkpoints, as another machine left them; returns their files."""
    files = {}
    for step in steps:
        path = Path(os.environ["ONECHIP_HOME"]) / f"elsewhere_{time.monotonic_ns()}" / f"step_{step:08d}"
        path.parent.mkdir(parents=True)
        write_checkpoint(path, some_files(step))
        files |= {f"checkpoints/{path.name}/{name}": raw for name, raw in content(path).items()}
    hub.add_repo(REPO, files)
    return files


def restored(hub, folder):
    """The value of the checkpoint that a run in `folder` would resume from, or None."""
    mirror = mirror_of(hub)
    mirror.restore(folder)
    mirror.finish()
    path = newest_checkpoint(folder)
    return path and value_of(path)


def test_the_newest_of_both_homes_is_taken(hub, tmp_path, capsys):
    """No repository: a fresh start. The Hub newer: its own. As new or older: the local one, which then goes up."""
    assert restored(hub, tmp_path / "fresh") is None and capsys.readouterr().out == ""
    put_up(hub, 3, 5)
    assert restored(hub, tmp_path / "empty") == 5
    write_checkpoint(tmp_path / "older" / "step_00000004", some_files(4))
    assert restored(hub, tmp_path / "older") == 5
    asked = hub.count("GET", "resolve")
    write_checkpoint(tmp_path / "same" / "step_00000005", some_files(50))
    assert restored(hub, tmp_path / "same") == 50 and hub.count("GET", "resolve") == asked
    write_checkpoint(tmp_path / "newer" / "step_00000006", some_files(6))
    assert restored(hub, tmp_path / "newer") == 6 and hub.count("GET", "resolve") == asked
    assert "checkpoints/step_00000006/manifest.json" in hub.files(REPO), "a run that was killed before its upload"


def test_a_damaged_checkpoint_on_the_hub_is_named_and_passed_over(hub, tmp_path, capsys):
    """An older one, or a fresh start; it is not deleted when others go up. One spoiled on the way only is fetched."""
    files = put_up(hub, 3, 5)
    hub.faults = [Fault("GET", "/cdn/.*step_00000005/params", flip=True)]
    assert restored(hub, tmp_path / "flipped once") == 5 and "damaged" not in capsys.readouterr().out
    spoiled = dict(files)
    for step in (5, 3):
        path = f"checkpoints/step_{step:08d}/params.safetensors"
        spoiled[path] = files[path][:-1] + b"\x55"
        hub.add_repo(REPO, spoiled)
        assert restored(hub, tmp_path / str(step)) == (3 if step == 5 else None)
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"checkpoint: step_00000005 on {REPO} is damaged: params.safetensors has another")
        assert is_one_line(said[0]) and not list((tmp_path / str(step)).glob(".*"))
    mirror = mirror_of(hub)
    offer(mirror, tmp_path / "new", 4)
    mirror.finish()
    kept = {path.split("/")[1] for path in hub.files(REPO) if path.startswith("checkpoints/")}
    assert kept == {"step_00000004", "step_00000005"}


def test_a_hub_that_cannot_be_reached_does_not_cost_a_run(hub, tmp_path, capsys):
    """With a checkpoint here training resumes from that; with none it is refused: a fresh start might be the loss."""
    hub.faults = [Fault("GET", "/api/models/", status=500, times=10**6)]
    with pytest.raises(UserError, match=f"{REPO}: cannot be listed") as raised:
        mirror_of(hub).restore(tmp_path / "empty")
    assert is_one_line(raised.value)
    write_checkpoint(tmp_path / "here" / "step_00000002", some_files(2))
    assert restored(hub, tmp_path / "here") == 2 and "without a look at" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# One retry policy


@pytest.fixture
def logged():
    """What the client's own log lets through."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.getLogger("huggingface_hub").addHandler(handler)
    yield records
    logging.getLogger("huggingface_hub").removeHandler(handler)


@pytest.mark.parametrize("path", ["/api/models/.*/tree/", "/api/models/.*/preupload/", "/objects/batch", "/commit/"])
def test_a_refusal_costs_five_attempts_and_one_line(hub, tmp_path, capsys, logged, path):
    """The client repeats some requests by itself: with our attempts that made 30 requests, 117 s and 25 lines."""
    hub.add_repo(REPO, {})
    method = "GET" if "tree" in path else "POST"
    hub.faults = [Fault(method, path, status=500, times=10**6)]
    mirror = mirror_of(hub)
    offer(mirror, tmp_path, 1)
    [line] = capsys.readouterr().out.splitlines()
    assert "after 5 attempts" in line and is_one_line(line) and logged == []
    assert hub.count(method, path) == 5 and [s for s in hub.slept if s >= 1] == [1, 2, 4, 8]
    hub.faults.clear()
    mirror.finish()


def test_a_dead_network_costs_five_attempts(hub, monkeypatch, logged):
    """The same where nothing answers, which the client repeats by itself as well."""
    with loopback.Hub() as gone:
        url = gone.url
    api = huggingface_hub.HfApi(endpoint=url, token=TOKEN)
    with pytest.raises(UserError, match="nothing: after 5 attempts|nothing after 5 attempts"):
        try_again(lambda: api.list_repo_files(REPO), "nothing")
    assert [s for s in hub.slept if s >= 1] == [1, 2, 4, 8] and logged == []


def test_the_hub_is_given_the_time_that_it_asks_for(hub, tmp_path):
    """A rate limit on a request that only we repeat: as long as its answer says, but not for ever."""
    hub.faults = [Fault("POST", "/commit/", status=429, headers={"Retry-After": wait}) for wait in ("7", "9999")]
    mirror = mirror_of(hub)
    offer(mirror, tmp_path, 1)
    mirror.finish()
    assert [s for s in hub.slept if s >= 1] == [7, LONGEST_PAUSE] and len(commits(hub)) == 1


@pytest.mark.parametrize("status, remedy", [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "name and revision")])
def test_what_another_attempt_cannot_mend_is_asked_once(hub, status, remedy):
    """A refusal, or a repository that does not exist, is final: one request, and the remedy that fits."""
    headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    hub.faults = [Fault("GET", "/api/models/", status=status, headers=headers, times=9)]
    api = huggingface_hub.HfApi(token=TOKEN)
    with pytest.raises(UserError, match=remedy) as raised:
        try_again(lambda: api.list_repo_files(REPO), "x")
    assert len(hub.requests) == 1 and "attempts" not in str(raised.value)


# ----------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "name", ["my run", "exp/1", "../../x", "a--b", "a..b", "-a", "x.git", "数据", "a" * 97, " ", "caf\udce9", "x\ny"]
)
def test_every_run_has_a_repository(name):
    """A name that the Hub does not take becomes one that the client's own check takes, and no other run's."""
    repo = repo_name(f"onechip-{name}")
    huggingface_hub.utils.validate_repo_id(f"someone/{repo}")
    assert is_repo_name(repo) and repo.startswith("onechip-") and repo == repo_name(f"onechip-{name}")
    assert repo not in (repo_name(f"onechip-{name}_"), repo_name("onechip-my-run"), repo_name("onechip-exp-1"))


@pytest.mark.parametrize("name", ["x", "laptop-stdlib-1a2b3c", "v1.5_b", "0"])
def test_a_name_that_the_hub_takes_stays_as_it_is(name):
    assert repo_name(name) == name


def test_a_run_of_any_name_has_a_mirror(hub, tmp_path):
    """Training with a token is not refused where it would not be refused without one."""
    mirror = open_mirror(Run(name="my run"), TOKEN)
    offer(mirror, tmp_path, 1)
    mirror.finish()
    [(kind, repo)] = hub.repos
    assert repo == mirror.repo == f"someone/{repo_name('onechip-my run')}" and "model" == kind


@pytest.mark.parametrize("hub_repo", ["../../x", "my repo", "a/b/c", "someone/", "/x", "someone/a--b"])
def test_a_repository_that_cannot_be_is_refused_in_a_line(hub, tmp_path, capsys, hub_repo):
    """Uploading is, training is not: no mirror, no upload, a line that names the field, and nothing is sent."""
    assert open_mirror(Run(name="x", hub_repo=hub_repo), TOKEN) is None
    assert upload_folder(tmp_path, [], TOKEN, hub_repo) is None
    mirror, upload = capsys.readouterr().out.splitlines()
    assert mirror.startswith("upload: checkpoints stay here: hub_repo=") and upload.startswith(
        "upload: none, as hub_repo="
    )
    assert {path for _, path in hub.requests} <= {"/api/whoami-v2"}


def test_a_repository_without_owner_is_yours(hub):
    assert open_mirror(Run(name="x", hub_repo="mine"), TOKEN).repo == "someone/mine"
    assert open_mirror(Run(name="x", hub_repo="team/ours"), TOKEN).repo == "team/ours"


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def test_a_mirror_needs_a_token_that_the_hub_takes(hub, capsys):
    """None without one; a refused one is a line, at once; a Hub that is only slow to answer is asked again."""
    run = Run(name="x")
    assert open_mirror(run, None) is None
    assert open_mirror(run, "hf_wrong_canary") is None
    assert open_mirror(Run(name="x", hub_repo="someone/x"), "hf_wrong_canary") is None
    for line in capsys.readouterr().out.splitlines():
        assert line.startswith("upload: checkpoints stay here: ") and "hf_wrong" not in line and is_one_line(line)
    assert max(hub.slept, default=0) < 1, "a refusal is not tried again"
    hub.faults = [Fault("GET", "/api/whoami-v2", status=500, times=2)]
    assert open_mirror(run, TOKEN).repo == REPO


SPOILED = [
    "hf_canary\nNeverToBeSeen",
    "hf_canary NeverToBeSeen",
    "hf_canaryNäverToBeSeen",
    "hf_canary\x07NeverToBeSeen",
]


@pytest.mark.parametrize("token", [*SPOILED, '"hf_canaryNeverToBeSeen"'])
def test_a_token_of_the_wrong_form_reaches_no_client(hub, tmp_path, capsys, token):
    """A client prints a header that it cannot send: one line without the token, and no request."""
    assert open_mirror(Run(name="x"), token) is None
    assert upload_folder(tmp_path, [], token, name="x") is None
    said = capsys.readouterr().out
    assert said.count("HF_TOKEN has a character inside") == 2 == said.count("\n")
    assert "canary" not in said and "ToBeSeen" not in said and hub.requests == []
    with pytest.raises(UserError):
        HubPlace(token, REPO)
    check_token("hf_oauth.eyJ0-_~+/==")


@pytest.mark.parametrize("secret", [CANARY, *SPOILED])
def test_no_secret_is_left_in_a_text(secret):
    """As it is, as Python or a URL would write it, and a part of it that a line break sets apart."""
    forms = [secret, repr(secret), repr(secret.encode()), f"b'Bearer {secret}'", secret.splitlines()[0]]
    for form in forms:
        clean = redact(f"before {form} after", secret)
        assert "canary" not in clean and "ToBeSeen" not in clean
        assert clean.startswith("before ") and clean.endswith(" after")
    assert redact("as it was", secret, None, "") == "as it was"
    for form in ("hf_" + "aB3" * 11, "Illegal header value b'Bearer abc\\ndef'"):
        assert "aB3" not in redact(form) and "def" not in redact(form), "a token that nobody named"


def test_what_a_client_raises_is_reported_without_the_token(hub, tmp_path, capsys, monkeypatch):
    """Before the cut to one short line, which would leave half a secret, and in no traceback either."""

    def fail(*args, **kwargs):
        raise RuntimeError(f"{'x' * 190}{CANARY} in b'Bearer {CANARY}' or\n{CANARY}")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.hf_api.HfApi, "whoami", fail)
        assert open_mirror(Run(name="x"), CANARY) is None
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "create_commit", fail)
    mirror = mirror_of(hub, CANARY)
    offer(mirror, tmp_path, 1)
    mirror.finish()
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "upload_folder", fail)
    assert upload_folder(tmp_path, ["a.txt"], CANARY, REPO) is None
    said = capsys.readouterr().out
    assert said.count("upload: ") == 4 == said.count("\n") and "hf_" not in said and "canary" not in said
    with pytest.raises(UserError) as raised:
        try_again(fail, "it", token=CANARY)
    assert "canary" not in "".join(traceback.format_exception(raised.value, chain=True))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert "canary" not in describe_error(RuntimeError(CANARY)), "a token that the client reads by itself"


def test_the_token_is_in_no_file_line_or_payload(hub, tmp_path, capfd, monkeypatch):
    """Uploads that work and uploads that fail with what the Hub says; it travels in one header and nowhere else."""
    received, real = [], loopback._Handler.read_body

    def read_body(handler):
        body = real(handler)
        headers = [f"{name}: {value}" for name, value in handler.headers.items() if name.lower() != "authorization"]
        received.append("\n".join([handler.path, *headers]).encode() + body)
        return body

    monkeypatch.setattr(loopback._Handler, "read_body", read_body)
    for i, faults in enumerate(([], [Fault("POST", "/commit/", status=403, times=99)])):
        hub.faults = faults
        mirror = open_mirror(Run(name=f"y{i}", out=str(tmp_path)), CANARY)
        offer(mirror, tmp_path / f"y{i}", 5)
        mirror.finish()
        upload_folder(tmp_path / f"y{i}" / "step_00000005", ["config.json"], CANARY, name=f"z{i}")
    assert set(hub.tokens) == {CANARY, None}, "a file goes to an address that is signed"
    assert "checkpoints/step_00000005/state.json" in hub.files("someone/onechip-y0")
    said = capfd.readouterr()
    assert "upload: step_00000005: cannot be uploaded" in said.out and "upload: config.json to" in said.out
    half = CANARY[len(CANARY) // 2 :]
    assert half not in said.out + said.err and not [raw for raw in received if half.encode() in raw]
    assert [path for path, raw in content(tmp_path).items() if half.encode() in raw] == []


# ----------------------------------------------------------------------------------------------------------------------
# Uploading a folder


def test_a_folder_goes_up_in_one_commit_to_a_private_repository(hub, tmp_path, capsys):
    """Only the files that are named; a second time it is another commit; a passing error is tried again."""
    for name in ("a.txt", "b.safetensors", "c.txt"):
        (tmp_path / name).write_text(name)
    hub.faults = [Fault("POST", "/commit/", status=500, times=2)]
    address = upload_folder(tmp_path, ["a.txt", "b.safetensors"], TOKEN, name="onechip-x")
    assert hub.files(REPO) == {"a.txt": b"a.txt", "b.safetensors": b"b.safetensors"}
    assert hub.repos["model", REPO].private and len(commits(hub)) == 1
    assert capsys.readouterr().out == f"upload: a.txt, b.safetensors to {address}\n"
    upload_folder(tmp_path, ["c.txt"], TOKEN, "onechip-x")
    assert len(commits(hub)) == 2 and set(hub.files(REPO)) == {"a.txt", "b.safetensors", "c.txt"}


def test_no_upload_is_a_line_and_ends_nothing(hub, tmp_path, capsys):
    """Without a token, with one that the Hub refuses, and to somebody else's repository."""
    (tmp_path / "a.txt").write_text("a")
    assert upload_folder(tmp_path, ["a.txt"], None) is None
    assert "no HF_TOKEN" in capsys.readouterr().out
    for token, repo in (("hf_wrong", ""), ("hf_wrong", "someone/x"), (TOKEN, "another/x")):
        assert upload_folder(tmp_path, ["a.txt"], token, repo, "x") is None
        line = capsys.readouterr().out.strip()
        assert line.startswith("upload: none, as the Hub ") and str(tmp_path) in line and is_one_line(line)
        assert "hf_wrong" not in line
    assert max(hub.slept, default=0) < 1
