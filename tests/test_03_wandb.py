"""03_worker against wandb's own client and agent, in real processes, which talk to a server on loopback."""

import base64
import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time

import hub
import pytest
import wandb_server
from conftest import ROOT
from execute import TINY, train_before
from wandb_server import Fault, WandbServer

worker = importlib.import_module("03_worker")
pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.slow]

# The notebook as a script, but that the agent asks for news more often than every five seconds.
DRIVER = """
import runpy, sys
import wandb.agents.pyagent
wandb.agents.pyagent.Agent.HEARTBEAT_SLEEP_SECONDS = 0.2
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LONG = ["--num_iterations", "3000", "--evaluations", "10"]
GOOD = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_ratio": 0.1, "warmdown_ratio": 0.3, "n_head": 2}


@pytest.fixture
def server():
    with WandbServer() as server:
        server.propose = lambda number: {**GOOD, "device_batch_size": 4}
        yield server
    assert server.unknown == []


@contextlib.contextmanager
def started(server, folder, *words, **more):
    """A worker's process with `.log()`, what it has printed; killed if it still runs at the end."""
    command = [sys.executable, "-c", DRIVER, str(ROOT / "03_worker.py"), *TINY["03_worker"].split(), *words]
    log = open(folder / f"worker-{len(list(folder.glob('worker-*')))}.txt", "w+")
    environment = os.environ | server.environment() | more
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    process.log = lambda: open(log.name).read()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def finish(process, seconds=240):
    assert process.wait(seconds) == 0, process.log()[-4000:]
    return process.log()


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.log()[-4000:]
        time.sleep(0.02)


def scores(run):
    """[(trained steps, bits per byte), ...] as the server has them."""
    return [(row["trained_steps"], row["val_bpb"]) for row in run.history if "val_bpb" in row]


def evaluations(folder, name):
    """The rows of a trial's own metrics.jsonl that hold a score."""
    return [row for run_dir in folder.glob(f"runs/*/trial-{name}") for row in worker.read_evaluations(run_dir)]


def test_a_sweep_from_its_creation_to_its_results(server, tmp_path):
    """A sweep outlives four failures in its first minute, errors and lost connections, and ends with run_cap.

    Refused, failed and finished trials are recorded as such, with their reasons and without invented scores; the
    results are uploaded as a table and a picture; the same command again continues the same sweep.
    """
    broken = [{"n_head": 3, "n_kv_head": 2}, {"learning_rate": 1e30}, {"eval_tokens": 1 << 40}, {"n_head": 0}]
    server.propose = lambda n: {**GOOD, "device_batch_size": 4, **(broken[n - 1] if n <= 4 else {})}
    server.faults += [Fault("Heartbeat", status=500, times=2), Fault("file_stream", drop=True, times=2)]
    server.faults += [Fault("UpsertBucket", status=500), Fault("UpsertBucket", drop=True), Fault("Viewer", status=500)]
    words = ["--where", "wandb", "--run_cap", "6", "--project", "tests"]
    with started(server, tmp_path, *words) as process:
        printed = finish(process)
    assert all(fault.times == 0 for fault in server.faults)
    runs = [server.runs[f"trial{i}"] for i in range(1, 7)]
    assert [run.summary["outcome"] for run in runs] == ["failed"] * 4 + ["finished"] * 2
    assert [run.exitcodes for run in runs] == [[1], [0], [0], [1], [0], [0]]
    for run, reason in zip(runs, ["n_kv_head=2", "grad_norm", "eval_tokens", "n_head=0"], strict=False):
        assert reason in run.summary["reason"] and "failed" in run.tags
        assert scores(run) == [] and "val_bpb" not in run.summary
    assert [step for step, _ in scores(runs[4])] == [2, 4]
    assert runs[4].history[0].keys() >= {"trained_steps", "val_bpb", "val_loss"}
    [sweep] = server.sweeps.values()
    assert sweep["run_cap"] == 6 and sweep["early_terminate"]["type"] == "hyperband"
    assert "someone/tests/sweep1; other workers join it with --sweep someone/tests/sweep1" in printed
    assert "01234567" not in printed, "the key"
    results = server.runs["results-sweep1"]
    assert results.history[0]["results"]["nrows"] == 6 and results.history[0]["picture"]["format"] == "png"
    assert "best: uv run 02_train.py --device_batch_size 4" in printed
    with started(server, tmp_path, *words) as again:
        finish(again)
    assert len(server.sweeps) == 1 and len(server.runs) == 7


def test_a_stop_command_ends_a_trial_within_an_evaluation(server, tmp_path):
    """A trial that the server stops after its first score ends as stopped, not as failed, and the next one runs."""
    words = ["--where", "wandb", "--count", "2", *LONG]
    with started(server, tmp_path, *words) as process:
        # In its own file: the client sends scores to the server in batches.
        wait_for(lambda: evaluations(tmp_path, "trial1"), process)
        seen = len(evaluations(tmp_path, "trial1"))
        server.runs["trial1"].stop = True
        finish(process)
    stopped, other = server.runs["trial1"], server.runs["trial2"]
    assert (stopped.summary["outcome"], stopped.summary["reason"]) == ("stopped", "by the sweep")
    assert stopped.exitcodes == [0] and "failed" not in stopped.tags
    assert len(scores(stopped)) <= seen + 2 < 10
    assert other.summary["outcome"] == "finished" and len(scores(other)) == 10


def test_a_trial_whose_agent_is_killed_is_resumed_by_the_next(server, tmp_path):
    """The sweep hands the trial out again under its id; it resumes from its checkpoint and logs no score twice."""
    server.silence = 3.0
    words = ["--where", "wandb", "--count", "1", *LONG]
    with started(server, tmp_path, *words) as process:
        # By its own file: what the client has not sent by then must reach the server all the same, later.
        wait_for(lambda: len(evaluations(tmp_path, "trial1")) >= 3, process)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    run = server.runs["trial1"]
    assert run.preempting and len(scores(run)) < 10 and run.exitcodes == []
    time.sleep(server.silence)
    with started(
        server, tmp_path, "--sweep", "someone/onechip/sweep1", "--count", "1", "--any_version", "true"
    ) as process:
        printed = finish(process)
    assert "resuming: runs/sweep-" in printed and "/trial-trial1 continues after step" in printed
    assert list(server.runs) == ["trial1", "results-sweep1"] and run.starts >= 2
    assert [step for step, _ in scores(run)] == [300 * i for i in range(1, 11)]
    assert run.summary["outcome"] == "finished" and run.exitcodes[-1] == 0


def test_a_worker_that_joins_another_commits_sweep_stops(server, tmp_path):
    """A worker with another commit stops with one line that names both, before it asks for a trial."""
    with started(server, tmp_path, "--where", "wandb", "--count", "1") as process:
        finish(process)
    server.sweeps["sweep1"]["parameters"]["commit"] = {"value": "e" * 40}
    with started(server, tmp_path, "--sweep", "sweep1") as process:
        assert process.wait(120) == 1
    assert "Traceback" not in process.log()
    last = process.log().splitlines()[-1]
    assert last.startswith("error: commit=") and "e" * 40 in last and "--any_version true" in last
    assert list(server.agents) == ["agent1"]
    with started(server, tmp_path, "--sweep", "sweep9") as process:
        assert process.wait(120) == 1
    assert process.log().splitlines()[-1].startswith("error: sweep='someone/onechip/sweep9': wandb does not find it")


def test_offline_trials_are_recorded_for_later(server, tmp_path):
    """With WANDB_MODE=offline the sweep runs in its folder, and each trial leaves a run for `wandb sync`."""
    with started(server, tmp_path, "--name", "s", WANDB_MODE="offline") as process:
        printed = finish(process)
    assert "trials: handed out by a folder on this machine" in printed
    assert len(list((tmp_path / "runs" / "s" / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert [what for what, _ in server.requests if "otel" not in what] == []


# ----------------------------------------------------------------------------------------------------------------------
# Secrets

HUB_CANARY, WANDB_CANARY = "hf_TheHubsCanaryNeverToBeSeen", "4a0c3b1e9d5f7a2b8c6d0e4f1a9b3c5d7e2f8a6b"


@pytest.fixture
def sent(monkeypatch):
    """All that the two servers are sent, without the headers that are meant for a secret."""
    received, real_hub, real_wandb = [], hub._Handler.read_body, wandb_server._Handler._take

    def note(handler, body):
        headers = [f"{name}: {value}" for name, value in handler.headers.items() if name.lower() != "authorization"]
        received.append("\n".join([handler.path, *headers]).encode() + body)
        return body

    def take(handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with_secret.add(handler.headers.get("Authorization") or "")
        handler.rfile = io.BytesIO(note(handler, body))
        real_wandb(handler)

    with_secret = set()
    monkeypatch.setattr(hub._Handler, "read_body", lambda handler: note(handler, real_hub(handler)))
    for method in ("do_GET", "do_POST", "do_PUT"):
        monkeypatch.setattr(wandb_server._Handler, method, take)
    yield received, with_secret


def forms_of(secret):
    """What a secret must not be found as: its second half, and the whole in base64, as a password in a header is."""
    encoded = [base64.b64encode(f"{user}:{secret}".encode()) for user in ("api", "")]
    return [secret[len(secret) // 2 :].encode(), *encoded]


@pytest.mark.parametrize("notebook", sorted(TINY))
def test_no_secret_is_in_a_file_a_line_or_a_request(server, sent, tmp_path, notebook):
    """Both secrets in the environment of a whole run: each travels in its header alone.

    Looked through: the run's folder with its config, wandb's own files and logs, the Hub's cache, what is printed, what
    the servers were sent, what lies in the Hub's repositories.
    """
    received, with_secret = sent
    words = {"01_tokenizer": [], "03_worker": ["--where", "wandb"], "06_eval": []}
    words = words.get(notebook, ["--name", "x", "--out", "runs"])
    train_before(notebook, tmp_path)
    with hub.Hub(users={HUB_CANARY: "someone"}) as repositories:
        environment = os.environ | server.environment() | repositories.environment()
        environment |= {"HF_TOKEN": HUB_CANARY, "WANDB_API_KEY": WANDB_CANARY, "WANDB_SILENT": "false"}
        environment |= {name: str(tmp_path / name) for name in ("HOME", "HF_HOME", "ONECHIP_HOME")}
        command = [sys.executable, "-c", DRIVER, str(ROOT / f"{notebook}.py"), *TINY[notebook].split(), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        commits = [files for repo in repositories.repos.values() for files in repo.commits.values()]
        stored = [raw for files in commits for raw in files.values()]
    if notebook == "03_worker":
        used = {header.partition(" ")[2].encode() for header in with_secret}
        assert server.runs["results-sweep1"].files and used & set(forms_of(WANDB_CANARY)), "wandb had the key"
    else:
        assert HUB_CANARY in repositories.tokens and re.search("^upload: .*README.md", done.stdout, re.M) and stored
    assert received and (notebook == "01_tokenizer" or list(tmp_path.glob("runs/**/config.json")))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()}
    for form in [*forms_of(HUB_CANARY), *forms_of(WANDB_CANARY)]:
        assert form not in (done.stdout + done.stderr).encode()
        assert [path for path, raw in files.items() if form in raw] == []
        assert not any(form in raw for raw in (*received, *stored))
