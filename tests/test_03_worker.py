"""03_worker without an account: the sweep's dictionary, trials that fail, workers that share a folder, results."""

import concurrent.futures
import csv
import ctypes
import dataclasses
import errno
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT
from execute import TINY

from onechip.checkpoints import newest_checkpoint
from onechip.doors import config_with
from onechip.errors import UserError, first_line
from onechip.files import create_whole, read_json_or_none
from onechip.fit import DoesNotFit
from onechip.lock import RunLock
from onechip.machine import git_commit
from onechip.settings import Run

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
worker = importlib.import_module("03_worker")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

MODEL = {
    **{"n_head": 2, "n_kv_head": 1, "head_dim": 8, "aspect_ratio": 8, "vocab_size": 300, "seq_len": 24},
    **{"attn_impl": "einsum", "dtype": "float32", "device_batch_size": 3, "total_batch_size": 6, "loss_slice": 48},
    **{"num_iterations": 30, "learning_rate": 1e-2, "eval_tokens": 24 * 7},
}
SPACE = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-1},
    "n_head": {"values": [2, 3, 5]},
    "device_batch_size": {"values": [1, 2, 6]},
}


@pytest.fixture(scope="session")
def corpus():
    return tok.get_corpus("offline", 1)


def make_sweep(corpus, space=SPACE, settings=(), **fields):
    settings = worker.Settings(**dict(settings))
    run = Run(preset="laptop", data="offline", num_shards=1)
    return worker.make_sweep(settings, run, train.Config(**{**MODEL, **fields}), space, corpus)


def parameters(corpus, **values):
    sweep = make_sweep(corpus)
    return {**worker.constants(sweep), "learning_rate": 1e-2, "n_head": 2, "device_batch_size": 2, **values}


def job_of(corpus, folder, **values):
    return worker.Job(folder.name, parameters(corpus, **values), folder, worker.Request())


# ---------------------------------------------------------------------------------------------------------------
# The sweep


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"learnig_rate": {"values": [1e-3]}}, ["learnig_rate", "did you mean learning_rate?"]),
        ({"num_iterations": {"values": [10, 20]}}, ["num_iterations", "follows from the budget"]),
        ({"learning_rate": {"min": 0.0, "max": 1e-3}}, ["learning_rate=0.0", "greater than 0"]),
        ({"learning_rate": {"min": 1e-2, "max": 1e-3}}, ["learning_rate", "min < max"]),
        ({"learning_rate": {"min": 1e-2}}, ["learning_rate", "min and max"]),
        ({"n_head": {"min": 1.5, "max": 4.0}}, ["n_head=1.5", "int"]),
        ({"n_head": {"values": [2, 4]}, "n_kv_head": {"values": [1, 4]}}, ["n_kv_head=4", "divide n_head=2"]),
        ({"device_batch_size": {"values": [2, 4]}}, ["total_batch_size=6", "multiple of device_batch_size=4"]),
        ({"warmup_ratio": {"min": 0.0, "max": 0.3}, "warmdown_ratio": {"values": [0.5, 0.8]}}, ["must not exceed 1"]),
        ({}, ["at least one"]),
        ({"learning_rate": 0.001}, ["learning_rate=0.001", '{"values": [...]}']),
        ({"learning_rate": []}, ["learning_rate=[]", '{"values": [...]}']),
        ({"n_head": {"values": []}}, ["n_head", "at least one"]),
        ({"n_head": {"values": 3}}, ["n_head", "must be a list"]),
        ({"learning_rate": {"distribution": "log_uniform_value", "min": 1e-3, "max": 1e-1}},
         ["learning_rate: distribution='log_uniform_value'", "did you mean log_uniform_values?"]),
        ({"learning_rate": {"distribution": 7, "min": 1e-3, "max": 1e-1}}, ["distribution=7", "use one of"]),
        ({"learning_rate": {"min": 1e-3, "max": 1e-1, "step": 1}}, ["uniform takes min, max and not step"]),
        ({"learning_rate": {"distribution": "q_uniform", "min": 1e-3, "max": 1e-1, "q": 0}}, ["'q': 0", "q, the"]),
        ({"learning_rate": {"min": 1e-3, "max": float("inf")}}, ["learning_rate", "min < max"]),
        ({"n_head": {"values": [2, 3], "probabilities": [0.5]}}, ["one for each value"]),
        ({"n_head": {"values": [2, 3], "probabilities": [0.5, 0.6]}}, ["the sum 1"]),
        ({"n_head": {"values": [2, 3], "probabilities": [1.5, -0.5]}}, ["none negative"]),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_run_is_refused_when_it_is_created(corpus, space, words):
    """A name, bound or combination that no trial could run is refused in one line that names the field."""
    with pytest.raises(UserError) as error:
        worker.check_sweep(make_sweep(corpus, space))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_sweep_that_the_search_refuses_is_not_written(corpus, tmp_path):
    """A grid over a range, which `sweeps` cannot walk: one line, and no folder with half a sweep in it."""
    sweep = make_sweep(corpus, settings={"method": "grid"})
    worker.check_sweep(sweep)
    with pytest.raises(UserError, match="method='grid': the search refuses this sweep .*; change SPACE or --method"):
        worker.LocalSweep(tmp_path / "sweep", sweep)
    assert list(tmp_path.iterdir()) == []


def test_every_listed_distribution_can_be_searched(corpus, tmp_path):
    """What check_keys lets through, `sweeps` takes."""
    bounds = {"min": 1e-3, "max": 1e-1}
    specs = {
        "categorical": {"values": [1e-3, 1e-2]},
        "categorical_w_probabilities": {"values": [1e-3, 1e-2], "probabilities": [0.25, 0.75]},
        **{kind: bounds for kind in ("uniform", "log_uniform_values", "inv_log_uniform_values")},
        **{kind: {**bounds, "q": 1e-3} for kind in ("q_uniform", "q_log_uniform_values")},
    }
    for kind, spec in specs.items():
        method = "random" if "probabilities" in spec else "bayes"  # sweeps 0.2 cannot do both
        sweep = make_sweep(corpus, {"learning_rate": {"distribution": kind, **spec}}, {"method": method})
        assert len(worker.check_sweep(sweep)) == 2
        worker.LocalSweep(tmp_path / kind, sweep)
    sweep = make_sweep(corpus, {"n_head": {"distribution": "int_uniform", "min": 2, "max": 3}})
    worker.LocalSweep(tmp_path / "int_uniform", sweep)
    assert {*specs, "int_uniform"} == set(worker.DISTRIBUTIONS)


@pytest.mark.parametrize("preset", sorted(worker.SHORT))
@pytest.mark.parametrize(
    ("model", "optimizer", "swept"),
    [
        ("gpt", "adamw", set(worker.SPACE)),
        ("gpt", "muon", {*worker.MUON_RATES, "n_head", "device_batch_size"}),
        ("swiglu", "adamw", set(worker.SPACE) - {"n_head"}),
        ("nanochat", "muon", {*worker.MUON_RATES, "depth", "device_batch_size"}),
        ("nanochat", "adamw", {*worker.SPACE, "depth"} - {"n_head"}),
    ],
)
def test_the_default_sweeps_can_be_created(corpus, preset, model, optimizer, swept):
    """Every combination of extremes of each default space is a Config; the constants name model, commit and data."""
    run = Run(preset=preset, data="offline", num_shards=1, optimizer=optimizer)
    parts = train.model_named(model), train.optimizer_named(optimizer)
    config = config_with(parts[0].config, parts[1].settings)(**worker.trial_presets(*parts)[preset])
    space = worker.space_of(model, optimizer, preset)
    sweep = worker.make_sweep(worker.Settings(model=model), run, config, space, corpus)
    configs = worker.check_sweep(sweep)
    assert len(configs) >= 32
    assert set(worker.swept_fields(sweep)) == swept
    assert sweep["parameters"]["data_revision"] == {"value": corpus.revision}
    assert sweep["parameters"]["commit"] == {"value": git_commit() or ""}
    assert (sweep["parameters"]["model"], sweep["parameters"]["optimizer"]) == ({"value": model}, {"value": optimizer})
    if model == "nanochat":  # width, and with it the heads, follow the depth that is swept
        assert {config.depth for config in configs} >= {min(worker.DEPTHS[preset]), max(worker.DEPTHS[preset])}
        assert all(config.n_embd == 64 * config.depth and config.n_kv_head == config.n_head for config in configs)


@pytest.mark.parametrize("budget", ["tokens", "flops"])
def test_trials_are_comparable(corpus, budget):
    """Trials have equal tokens, or equal FLOPs, to within a step per evaluation, and evenly spaced evaluations."""
    sweep = make_sweep(corpus, settings={"budget": budget, "evaluations": 3}, num_iterations=600)
    spent, evaluations = [], set()
    configs = worker.check_sweep(sweep)
    assert len({config.n_embd for config in configs}) == 3
    for config in configs:
        tokens = config.num_iterations * config.total_batch_size * config.seq_len
        per_token = train.flops_per_token(config) if budget == "flops" else 1
        spent.append(tokens * per_token / sweep["parameters"]["budget_size"]["value"])
        steps = range(config.eval_every, config.num_iterations + 1, config.eval_every)
        evaluations.add(tuple(step / config.num_iterations for step in steps))
    assert max(spent) < 1.02 and min(spent) > 0.98
    assert evaluations == {(1 / 3, 2 / 3, 1.0)}
    assert len({config.num_iterations for config in configs}) == (3 if budget == "flops" else 1)


def test_a_trials_config_survives_json_and_numpy(corpus):
    """A proposal with NumPy scalars and a server's answer with 1 for 1.0 give the same Config."""
    given = parameters(corpus, learning_rate=np.float64(0.02), n_head=np.int64(3), softcap=15)
    assert worker.trial_config(given) == worker.trial_config(parameters(corpus, learning_rate=0.02, n_head=3))


def test_another_commit_or_text_stops_a_worker(corpus, capsys):
    """A worker with another commit or text is refused, as its trials cannot be compared; a setting allows it."""
    sweep = make_sweep(corpus)
    worker.check_version(sweep, corpus, any_version=False)
    other = dataclasses.replace(corpus, revision="another")
    with pytest.raises(UserError, match="data_revision='another'.*--any_version true"):
        worker.check_version(sweep, other, any_version=False)
    sweep["parameters"]["commit"] = {"value": "f" * 40}
    with pytest.raises(UserError, match="commit=.*ffff"):
        worker.check_version(sweep, corpus, any_version=False)
    worker.check_version(sweep, other, any_version=True)
    assert "continuing, as set" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------
# A trial


def count_leftovers():
    """(number of live arrays, names of threads); nothing is collected first.

    Without the thread that tqdm keeps, and those in which a test's loopback server answers its last request.
    """
    names = sorted(thread.name for thread in threading.enumerate())
    others = ("tqdm_monitor", "process_request_thread")
    return len(jax.live_arrays()), [name for name in names if not any(other in name for other in others)]


def exhaust_memory(step):
    """A training step that asks for a petabyte once it holds arrays of its own, in a frame that has them all."""

    def failing(state, batch):
        mine = [jnp.ones(1000) * float(i) for i in range(5)]
        state, metrics = step(state, batch)
        jax.block_until_ready([state, mine])
        return state, metrics | {"loss": jnp.zeros(1 << 48).block_until_ready() + mine[0].sum()}

    return failing


def resident():
    """Bytes of this process in memory, without those that are free, which the tests before have left in pieces."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FAILURES = 50


@pytest.mark.slow
def test_fifty_failures_leave_no_array_no_thread_and_no_memory(corpus, tmp_path, monkeypatch):
    """A failed trial leaves nothing on the device, even if its traceback is kept, and the trial after them all runs.

    The process grows by what the first ones need; one that kept a trial's arrays or programs would grow with each.
    """
    kept = []
    monkeypatch.setattr(worker, "first_line", lambda error: kept.append(error) or first_line(error))
    faults = [{}, {"learning_rate": 1e30}, *({"eval_tokens": 1 << 40}, {"n_kv_head": 7}) * 4]  # two of ten train first
    words = ["RESOURCE_EXHAUSTED", "is nan|is inf|not finite", *("eval_tokens", "n_kv_head") * 4]
    assert worker.run_trial(job_of(corpus, tmp_path / "warm-up"), corpus).state == "finished"
    gc.collect()
    before, make, sizes = count_leftovers(), train.make_train_step, []
    for i in range(FAILURES):
        fault = faults[i % 10]
        with monkeypatch.context() as patch:
            if not fault:
                patch.setattr(train, "preflight", lambda config, **parts: None)  # or it would have refused this trial
                patch.setattr(train, "make_train_step", lambda *args: exhaust_memory(make(*args)))
            outcome = worker.run_trial(job_of(corpus, tmp_path / f"{i}", **fault), corpus)
        assert outcome.state == "failed"
        assert re.search(words[i % 10], outcome.reason), outcome.reason
        assert "\n" not in outcome.reason
        assert count_leftovers() == before
        sizes.append(resident())
    assert len(kept) == FAILURES and sizes[-1] - sizes[9] < 100e6, sizes
    assert worker.run_trial(job_of(corpus, tmp_path / "last"), corpus).state == "finished"
    assert count_leftovers() == before


def test_a_refused_trial_is_not_started(corpus, tmp_path, monkeypatch):
    """The preflight's line is the reason; nothing is trained, no folder is made, no start is reported."""

    def refuse(config, **parts):
        raise DoesNotFit("device_batch_size=2: 40 GiB of 31.25")

    monkeypatch.setattr(train, "preflight", refuse)
    job = job_of(corpus, tmp_path / "refused")._replace(on_start=lambda config: pytest.fail("started"))
    assert worker.run_trial(job, corpus) == ("failed", "device_batch_size=2: 40 GiB of 31.25")
    assert not job.run_dir.exists()


def test_an_exception_in_the_waiting_thread_ends_the_trial(corpus, tmp_path):
    """An exception thrown into the waiting thread, as wandb's agent does, stops the trial early and cleanly."""
    seen, me = [], threading.get_ident()

    def throw(rows):
        seen.append(len(rows))
        if len(rows) == 2:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_long(me), ctypes.py_object(Exception))
            time.sleep(0.5)

    gc.collect()
    before = count_leftovers()
    job = job_of(corpus, tmp_path / "stopped")._replace(on_evaluation=throw)
    assert worker.run_trial(job, corpus) == ("stopped", "by the sweep")
    assert seen == [1, 2]
    assert len(worker.read_evaluations(job.run_dir)) == 2
    assert not (job.run_dir / "checkpoints").exists()
    assert count_leftovers() == before


@pytest.mark.slow
def test_an_interrupted_trial_resumes_to_the_same_scores(corpus, tmp_path):
    """An interrupted trial is saved, resumes there, and ends with the scores of one that was not interrupted."""

    class Interrupt:
        requested = False

    def interrupt(rows):
        Interrupt.requested = len(rows) == 2
        time.sleep(0.5)

    job = job_of(corpus, tmp_path / "trial")
    outcome = worker.run_trial(job._replace(on_evaluation=interrupt), corpus, Interrupt)
    assert outcome == ("interrupted", "the worker was stopped")
    assert newest_checkpoint(job.run_dir / "checkpoints")
    again = job_of(corpus, tmp_path / "trial")
    assert worker.run_trial(again, corpus) == ("finished", "")
    alone = job_of(corpus, tmp_path / "alone")
    worker.run_trial(alone, corpus)
    rows, expected = worker.read_evaluations(again.run_dir), worker.read_evaluations(alone.run_dir)
    assert rows == expected and len(rows) == 5


def test_a_trial_that_never_began_here_keeps_what_is_there(corpus, tmp_path, monkeypatch):
    """Another worker's checkpoints outlive a trial that fails before it trains, or that is lost to that worker."""
    theirs = tmp_path / "trial" / "checkpoints" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    with monkeypatch.context() as patch:
        patch.setattr(train, "preflight", lambda config, **parts: 1 / 0)
        assert worker.run_trial(job_of(corpus, tmp_path / "trial"), corpus).state == "failed"
    assert theirs.exists()
    job = job_of(corpus, tmp_path / "trial", num_iterations=1)._replace(is_lost=lambda: True)
    assert worker.run_trial(job, corpus) == ("lost", "another worker has taken it over")
    assert theirs.exists()


def test_a_trial_is_taken_from_a_worker_that_is_stopped(corpus, tmp_path):
    """The lease has decided: the lock of a process that still lives, but was stopped, does not make the trial fail."""
    job = job_of(corpus, tmp_path / "trial")
    stopped = RunLock(job.run_dir / ".owner.json").__enter__()
    assert worker.run_trial(job, corpus) == ("finished", "")
    stopped.__exit__()


# ---------------------------------------------------------------------------------------------------------------
# A folder that workers share


def local_sweep(corpus, folder, lease=60.0, **more):
    sweep = {**make_sweep(corpus), "run_cap": 6, **more}
    return worker.LocalSweep(folder, sweep, lease)


def test_no_trial_is_taken_twice(corpus, tmp_path):
    """Of eight workers that claim at once until nothing is left, each trial goes to one, run_cap in all."""
    sweep = {"lease": 1e4, "run_cap": 20, "method": "random"}  # nobody renews a lease here
    backends = [local_sweep(corpus, tmp_path / "sweep", **sweep) for _ in range(8)]

    def claim_all(backend):
        return [trial["name"] for trial, lease in iter(backend.claim, None)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = [name for claimed in pool.map(claim_all, backends) for name in claimed]
    assert sorted(names) == [f"{i:04d}" for i in range(1, 21)]
    assert not list((tmp_path / "sweep").glob(".*")), "nothing temporary is left"


def watch(backend, lease, seconds):
    """As if the backend had watched a lease that long without a change; returns what it claims then."""
    stamp, _ = backend._seen[lease]
    backend._seen[lease] = stamp, time.monotonic() - seconds
    return backend.claim()


def test_a_trial_without_a_sign_of_life_is_handed_out_again(corpus, tmp_path):
    """Neither too early nor twice; its first worker learns of it and does not write over the second one's results."""
    backend = local_sweep(corpus, tmp_path / "sweep", lease=30.0, run_cap=1)
    trial, lease = backend.claim()
    assert backend.claim() is None
    os.utime(lease, (time.time() - 25, time.time() - 25))
    assert backend.claim() is None
    os.utime(lease, (time.time() - 35, time.time() - 35))
    assert backend.claim() is None, "another machine's clock may be behind"
    assert watch(backend, lease, 9.0) is None
    again, second = watch(backend, lease, 11.0)
    assert again["name"] == trial["name"] and again["parameters"] == trial["parameters"]
    assert backend.claim() is None
    request = worker.Request()
    backend._note_evaluation(trial["name"], worker.Lease(lease, request, 30.0), request, [{"val_bpb": 1.0}])
    assert request.outcome.state == "lost"
    assert backend.trials()[0]["rows"] == []


def test_a_lease_dated_ahead_ends_too(corpus, tmp_path):
    """By another machine's clock, a day ahead: the trial of a dead worker comes back once its stamp is seen to stay."""
    backend = local_sweep(corpus, tmp_path / "sweep", lease=0.3, run_cap=1)
    trial, lease = backend.claim()
    ahead = time.time() + 86400
    for i in range(3):  # renewed, by its own clock
        os.utime(lease, (ahead + i, ahead + i))
        assert backend.claim() is None
        time.sleep(0.2)
    time.sleep(0.3)
    assert backend.claim()[0]["name"] == trial["name"]


def test_a_lease_dated_behind_is_kept_while_it_is_renewed(corpus, tmp_path):
    """By another machine's clock, a day behind: a trial whose worker lives is not taken, and is once it is silent."""
    backend = local_sweep(corpus, tmp_path / "sweep", lease=1.5, run_cap=1)
    trial, lease = backend.claim()
    behind = time.time() - 86400
    for i in range(6):
        os.utime(lease, (behind + i / 4, behind + i / 4))
        assert backend.claim() is None
        time.sleep(0.25)
    time.sleep(0.5)
    assert backend.claim()[0]["name"] == trial["name"]


def test_files_of_another_name_are_nobodys_lease(corpus, tmp_path):
    """A shared folder makes conflict copies: they are neither leases nor trials, and end no worker."""
    backend = local_sweep(corpus, tmp_path / "sweep", run_cap=2)
    backend.claim()
    for name in ("0001.lease-1 (1)", "0001.lease-x", "0001.lease-", "0001.lease-01", "0001 (1).json", "0001.json~"):
        (backend.folder / name).write_text("")
    assert [(trial["name"], trial["lease"]) for trial in backend.trials()] == [("0001", 1)]
    assert backend.claim()[0]["name"] == "0002" and backend.claim() is None


def test_a_trial_that_is_gone_is_not_waited_for(corpus, tmp_path):
    """Somebody has deleted 0001.json: the sweep gets another trial under a new number, and ends."""
    backend = local_sweep(corpus, tmp_path / "sweep", run_cap=2, method="random")
    assert [backend.claim()[0]["name"] for _ in range(2)] == ["0001", "0002"]
    (backend.folder / "0001.json").unlink()
    assert backend.claim()[0]["name"] == "0003" and backend.claim() is None


@pytest.mark.parametrize("content", ["", '{"a": 1}'])
def test_a_trial_that_is_cut_is_a_row_with_a_reason(mixed, content):
    """Or one of another sweep. It is neither run nor waited for, and the table is printed."""
    (mixed.folder / "0005.json").write_text(content)
    (mixed.folder / "0003.result.json").write_text('{"rows": 5}')
    worker.show_results(mixed)
    rows = {row["trial"]: (row["state"], row["reason"]) for row in worker.tabulate(mixed)}
    assert rows["0005"][0] == "failed" and rows["0005"][1] in ("0005.json cannot be read", NOT_OURS)
    assert rows["0001"][0] == "finished" and rows["0003"] == ("running", "")
    assert mixed.claim()[0]["name"] == "0006"  # another worker may have 0003 still
    os.utime(mixed.folder / "0003.lease-1", (1, 1))
    assert mixed.claim() is None
    assert (
        watch(mixed, mixed.folder / "0003.lease-1", 21.0)[0]["name"] == "0003"
    )  # its result is cut, so that it has to run again
    assert not any(trial["name"] == "0005" for trial in mixed.trials() if trial["state"] == "running")


NOT_OURS = "0005.json is not a trial of this sweep"


@pytest.mark.parametrize("change", [{"n_head": 10**9}, {"learning_rate": "x"}, {"budget_size": 1}, {"more": 1}])
def test_a_trial_that_the_search_cannot_have_proposed_is_none(mixed, change):
    """Values that it would choke on, or that memory would not be enough for; those that it has proposed are its own."""
    values = read_json_or_none(mixed.folder / "0001.json")
    assert worker.is_proposal(values, mixed.sweep) and worker.is_proposal(mixed.claim()[0]["parameters"], mixed.sweep)
    (mixed.folder / "0005.json").write_text(json.dumps({**values, **change}))
    assert mixed.trials()[4]["reason"] == NOT_OURS and mixed.trials()[4]["parameters"] == {}


RESULT = {"state": "finished", "reason": "", "rows": [{"step": 6, "val_bpb": 2.0}], "released": 0}
NO_RESULTS = ["", "[]", '{"state": "fin', '{"rows": 5}', *(
    json.dumps({**RESULT, **change})
    for change in (
        {"rows": [1]}, {"rows": [{"step": 6}]}, {"rows": [{"step": 6, "val_bpb": "x"}]},
        {"rows": [{"step": 6, "val_bpb": float("nan")}]}, {"state": "done"}, {"state": 7}, {"reason": None},
        {"released": "1"},
    )
)]  # fmt: skip


@pytest.mark.parametrize("content", NO_RESULTS)
def test_a_result_that_is_none_is_as_if_it_were_not_there(tmp_path, content):
    """Cut, or with rows that are no scores."""
    (tmp_path / "0001.result.json").write_text(json.dumps(RESULT))
    assert worker.read_result(tmp_path / "0001.result.json") == RESULT
    (tmp_path / "0001.result.json").write_text(content)
    assert worker.read_result(tmp_path / "0001.result.json") == worker.NO_RESULT


def test_numbers_of_trials_come_to_an_end(mixed):
    """After 9999 comes the first number that is free, and no loop without one."""
    os.rename(mixed.folder / "0004.json", mixed.folder / "9999.json")
    for path in mixed.folder.glob("0004.*"):
        path.unlink()
    assert mixed.claim()[0]["name"] == "9999" and mixed.claim()[0]["name"] == "0004"


def test_a_sweep_in_a_folder_that_takes_nothing_is_refused_first(corpus, tmp_path):
    """A file in its place; and a folder that has become read-only, in which nobody could claim a trial."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "sweep"):
        with pytest.raises(UserError, match=rf"^{folder}: cannot be written to .*; choose another --out$"):
            local_sweep(corpus, folder)
    local_sweep(corpus, tmp_path / "sweep").claim()
    mount = ["mount", "--bind", "-o", "ro", tmp_path / "sweep", tmp_path / "sweep"]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            with pytest.raises(UserError, match=r"/sweep: cannot be written to \(Read-only file system\)"):
                local_sweep(corpus, tmp_path / "sweep")
        finally:
            subprocess.run(["umount", "-l", tmp_path / "sweep"], check=True)


@pytest.mark.parametrize("content", ["", '{"name": "s', "[]", "{}", '{"name": "s"}', '{"parameters": {"a": 1}}'])
def test_a_sweep_that_is_cut_is_refused_in_one_line(corpus, tmp_path, content):
    """The file's name and the way out."""
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep='.*sweep.json': (cannot be read: delete it|was not created)") as error:
        local_sweep(corpus, tmp_path / "sweep")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"run_cap": "x"}, "its run_cap is 'x'"),
        ({"run_cap": 0}, "its run_cap is 0"),
        ({"run_cap": None}, "its run_cap is None"),
        ({"method": 9}, "the search refuses this sweep"),
        ({"early_terminate": 7}, "the search refuses this sweep"),
    ],
)
def test_a_sweep_that_was_changed_by_hand_is_refused_in_one_line(corpus, tmp_path, change, said):
    """Before any trial is claimed."""
    local_sweep(corpus, tmp_path / "sweep")
    path = tmp_path / "sweep" / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=said) as error:
        local_sweep(corpus, tmp_path / "sweep")
    assert "\n" not in str(error.value)


def test_a_lease_is_kept_while_its_trial_runs(corpus, tmp_path):
    """The time stamp is renewed while the trial runs, and no thread is left when it ends."""
    backend = local_sweep(corpus, tmp_path / "sweep", lease=1.0, run_cap=1)
    trial, lease = backend.claim()
    with worker.Lease(lease, worker.Request(), 1.0):
        for _ in range(4):
            time.sleep(0.6)
            assert backend.claim() is None
    assert "lease" not in [thread.name for thread in threading.enumerate()]
    claimed = []  # the last renewal may be one that no claim has seen: then the lease is watched for a moment first
    wait_for(lambda: claimed.append(backend.claim()) or claimed[-1], 10)
    assert claimed[-1][0]["name"] == trial["name"]


def put_trial(backend, name, state, scores, reason="", **values):
    (backend.folder / f"{name}.lease-1").write_text("")
    given = {**worker.constants(backend.sweep), "learning_rate": 0.01, "n_head": 2, "device_batch_size": 2, **values}
    create_whole(backend.folder / f"{name}.json", json.dumps(given))
    rows = [{"step": 6 * (i + 1), "val_bpb": score} for i, score in enumerate(scores)]
    backend.write(name, state, reason, rows)


@pytest.mark.slow
def test_hyperband_stops_a_trial_within_an_evaluation(corpus, tmp_path):
    """A trial far worse than three others at the second evaluation ends there, as stopped and not as failed."""
    backend = local_sweep(corpus, tmp_path / "sweep", run_cap=4)
    for i in range(1, 4):
        put_trial(backend, f"{i:04d}", "finished", [0.6, 0.5, 0.4, 0.3, 0.2])
    name, outcome = backend.run_next(corpus, None)
    assert (name, outcome.state) == ("0004", "stopped")
    assert outcome.reason.startswith("by Hyperband") and outcome.reason.endswith("after evaluation 2 of 5")
    assert [row["step"] for row in backend.trials()[3]["rows"]] == [6, 12]
    assert backend.claim() is None and not backend.waits()


@pytest.mark.slow
def test_many_failures_in_a_row_end_a_worker(corpus, tmp_path):
    """A fault in every trial, such as a full disk, ends the worker before it uses up the whole sweep."""
    backend = local_sweep(corpus, tmp_path / "sweep", run_cap=9)
    backend._give_up = 3
    backend.sweep["parameters"]["eval_tokens"] = {"value": 1 << 40}
    with pytest.raises(UserError, match="failed trials in a row=3"):
        backend.work(corpus)
    assert [trial["state"] for trial in backend.trials()] == ["failed"] * 3
    assert "eval_tokens" in backend.trials()[0]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("write", ["create_whole", "write_json"])
def test_a_folder_that_takes_nothing_any_more_ends_a_worker_in_a_line(corpus, tmp_path, monkeypatch, write):
    """It became read-only while a trial ran, or before one was claimed; what is there stays as it is."""
    backend = local_sweep(corpus, tmp_path / "sweep", run_cap=2)
    assert backend.run_next(corpus, None)[0] == "0001"

    def refuse(path, *args):
        raise OSError(errno.EROFS, "Read-only file system")

    before = (backend.folder / "0001.result.json").read_bytes()
    monkeypatch.setattr(worker, write, refuse)
    with pytest.raises(
        UserError, match=r"/sweep: cannot be written to \(Read-only file system\); .*continues"
    ) as error:
        backend.work(corpus)
    assert "\n" not in str(error.value) and (backend.folder / "0001.result.json").read_bytes() == before


def start_worker(folder, *words, **more):
    """A real process of the worker, with the smallest settings."""
    command = [sys.executable, str(ROOT / "03_worker.py"), *TINY["03_worker"].split(), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | more, **pipes)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_a_trial_that_was_given_back_is_taken_once(corpus, tmp_path):
    """An interrupted worker's trial is free at once, for one of eight workers, even if they read an older state."""
    backend = local_sweep(corpus, tmp_path / "sweep", run_cap=1)
    trial, _ = backend.claim()
    backend.write(trial["name"], "interrupted", "the worker was stopped", released=1)
    seen = backend.trials()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        claimed = [claim for claim in pool.map(lambda _: backend.claim(), range(8)) if claim]
    assert [lease.name for _, lease in claimed] == ["0001.lease-2"]
    backend.write(trial["name"], "interrupted", released=1)  # as one would have it who read before the claim
    assert backend.claim() is None and seen[0]["lease"] == 1


@pytest.mark.slow
def test_a_killed_workers_trial_is_resumed_by_another(corpus, tmp_path):
    """After a SIGKILL the next worker resumes the trial and ends the sweep; every row is there once."""
    words = "--name s --num_iterations 400 --evaluations 8 --run_cap 2 --lease 2 --any_version true".split()
    first = start_worker(tmp_path, *words)
    folder = tmp_path / "runs" / "s"
    wait_for(lambda: len((read_json_or_none(folder / "0001.result.json") or {}).get("rows", [])) >= 2)
    first.kill()
    first.communicate()
    done = start_worker(tmp_path, *words)
    printed = done.communicate(timeout=300)[0]
    assert done.returncode == 0, printed[-3000:]
    assert "resuming: runs/s/trial-0001" in printed
    results = [read_json_or_none(folder / f"{name}.result.json") for name in ("0001", "0002")]
    assert results[0]["state"] == "finished"
    assert [row["step"] for row in results[0]["rows"]] == [50 * i for i in range(1, 9)]
    assert sorted(path.name for path in folder.glob("0001.lease-*")) == ["0001.lease-1", "0001.lease-2"]
    with open(folder / "results.csv") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == sorted(
            ("0001", "0002"), key=lambda name: min(row["val_bpb"] for row in results[int(name) - 1]["rows"])
        )


@pytest.mark.slow
def test_a_stopped_worker_that_continues_destroys_nothing(corpus, tmp_path):
    """Its trial is another worker's by then: that one ends it from the checkpoint, and the first one notes nothing."""
    words = "--name s --num_iterations 800 --evaluations 8 --run_cap 1 --lease 2 --any_version true".split()
    first = start_worker(tmp_path, *words)
    folder = tmp_path / "runs" / "s"
    wait_for(lambda: len((read_json_or_none(folder / "0001.result.json") or {}).get("rows", [])) >= 2)
    first.send_signal(signal.SIGSTOP)
    second = start_worker(tmp_path, *words)
    try:
        wait_for(lambda: (folder / "0001.lease-2").exists())
        wait_for(lambda: json.loads((folder / "trial-0001" / ".owner.json").read_text())["pid"] == second.pid)
    finally:
        first.send_signal(signal.SIGCONT)
    printed = [worker.communicate(timeout=300)[0] for worker in (second, first)]
    assert "trial 0001: finished" in printed[0] and second.returncode == 0, printed[0][-3000:]
    assert "trial 0001: lost: another worker has taken it over" in printed[1], printed[1][-3000:]
    result = read_json_or_none(folder / "0001.result.json")
    assert result["state"] == "finished" and [row["step"] for row in result["rows"]] == [100 * i for i in range(1, 9)]
    assert not (folder / "0001.lease-3").exists()


@pytest.mark.slow
def test_a_worker_for_each_chip(tmp_path):
    """--chips one on a host of two: two workers share the trials, each sees one chip; one table, from all of them."""
    flags = "--xla_force_host_platform_device_count=2"
    words = "--name s --chips one --run_cap 4 --num_iterations 60".split()
    done = start_worker(tmp_path, *words, XLA_FLAGS=flags)
    printed = done.communicate(timeout=280)[0]
    assert done.returncode == 0, printed[-3000:]
    folder, lines = tmp_path / "runs" / "s", printed.splitlines()
    assert lines[0] == "chips: 2 x cpu, a process for each"
    assert len([line for line in lines if re.match(r"chip [01]: device: 1 x cpu", line)]) == 2
    assert lines.index("chip 0: worker: has opened runs/s") < min(map(lines.index, filter(of_chip_1, lines)))
    owners = [read_json_or_none(folder / f"000{i}.lease-1")["pid"] for i in range(1, 5)]
    assert len(set(owners)) == 2 and done.pid not in owners
    configs = [read_json_or_none(folder / f"trial-000{i}" / "config.json") for i in range(1, 5)]
    assert {config["device"] for config in configs} == {"1 x cpu"}
    assert sum(line.startswith("trial  ") for line in lines) == 1, "the table is printed once"
    with open(folder / "results.csv") as file:
        assert {row["state"] for row in csv.DictReader(file)} <= {"finished", "stopped"}


def of_chip_1(line):
    return line.startswith("chip 1: ")


@pytest.mark.slow
def test_an_interrupt_gives_back_the_trials_of_all_chips(tmp_path):
    """SIGTERM to the one process that was started: both workers save, and say so; the table follows, exit code 0."""
    words = "--name s --chips one --run_cap 4 --num_iterations 30000".split()
    process = start_worker(tmp_path, *words, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    folder = tmp_path / "runs" / "s"
    rows = lambda i: folder / f"trial-000{i}" / "metrics.jsonl"
    wait_for(lambda: all(rows(i).exists() and rows(i).stat().st_size > 0 for i in (1, 2)))
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed[-3000:]
    for i in (1, 2):
        result = read_json_or_none(folder / f"000{i}.result.json")
        assert result["state"] == "interrupted" and result["released"] == 1, printed[-3000:]
        assert newest_checkpoint(folder / f"trial-000{i}" / "checkpoints")


def test_chips_are_all_or_one(monkeypatch):
    """Any other word is refused before a process is started, and so is whatever else is wrong with the settings."""
    monkeypatch.setattr(worker, "run_on_each_chip", lambda *args: pytest.fail("started"))
    monkeypatch.setattr(sys, "argv", ["03_worker.py"])
    for words, said in (("--chips two", "chips='two': use all or one"), ("--chips one --count -1", "count=-1")):
        with pytest.raises(UserError, match=said):
            worker.work_on_each_chip(words)


# ---------------------------------------------------------------------------------------------------------------
# What came out


@pytest.fixture
def mixed(corpus, tmp_path):
    """A sweep with a trial of each kind."""
    backend = local_sweep(corpus, tmp_path / "sweep")
    put_trial(backend, "0001", "finished", [3.0, 2.5, 2.2], learning_rate=0.02, n_head=3)
    put_trial(backend, "0002", "failed", [], "n_head=5: does not fit", n_head=5)
    put_trial(backend, "0003", "stopped", [2.1], "by Hyperband", learning_rate=0.03)
    put_trial(backend, "0004", "finished", [3.1, 2.7, 2.4], learning_rate=0.05, n_head=5)
    return backend


def test_table_is_sorted_and_says_what_was_equal(mixed):
    """The best is first, the unscored are last with their reasons; each row has its tokens and FLOPs."""
    rows = worker.tabulate(mixed)
    assert [(row["trial"], row["state"], row["val_bpb"]) for row in rows] == [
        ("0003", "stopped", 2.1),
        ("0001", "finished", 2.2),
        ("0004", "finished", 2.4),
        ("0002", "failed", None),
    ]
    assert [row["tokens"] for row in rows] == [6 * 144, 18 * 144, 18 * 144, 0]
    assert rows[2]["flops"] / rows[1]["flops"] > 5 / 3
    text = worker.describe_table(rows, mixed.sweep)
    assert "equal tokens, 4,320 tokens a trial" in text.splitlines()[0]
    assert text.splitlines()[-1].endswith("n_head=5: does not fit")


@pytest.mark.slow
def test_a_sweep_can_make_a_figure_of_tasks_best(corpus, tmp_path, monkeypatch):
    """--metric tasks/...: each trial asks tasks at its evaluations, the search and Hyperband get that figure, higher is
    better, and the table, the best config and the picture go by it."""
    settings = {"metric": "tasks/made_subset", "evaluations": 2}
    sweep = make_sweep(corpus, settings=settings.items(), eval_core_examples=4)
    assert sweep["metric"] == {"name": "tasks/made_subset", "goal": "maximize"}
    config = worker.trial_config(parameters(corpus, **worker.constants(sweep)))
    assert config.eval_core_every == config.eval_every == config.num_iterations // 2
    backend = worker.LocalSweep(tmp_path / "sweep", sweep)
    asked = iter([0.1, 0.3, 0.2, 0.2])

    def suite(corpus, tokenizer, config, model, mesh):
        return lambda params: {"tasks/made_subset": next(asked), "tasks/copy": 0.5}

    monkeypatch.setattr(train, "make_asker", suite)
    for name in ("0001", "0002"):
        assert backend.run_next(corpus, None)[0] == name
    trials = backend.trials()
    assert [[row["tasks/made_subset"] for row in trial["rows"]] for trial in trials] == [[0.1, 0.3], [0.2, 0.2]]
    assert all("val_bpb" in row for trial in trials for row in trial["rows"]), "all scores of a step in one"
    rows = worker.tabulate(backend)
    assert [(row["trial"], row["tasks/made_subset"]) for row in rows] == [("0001", 0.3), ("0002", 0.2)]
    assert "tasks/made_subset" in worker.describe_table(rows, sweep).splitlines()[1]
    assert worker.best_config(backend).learning_rate == trials[0]["parameters"]["learning_rate"]
    worker.plot_sweep(trials, rows, sweep, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    with pytest.raises(UserError, match="^metric='core': use val_bpb, or a figure that begins with tasks/"):
        worker.Settings(metric="core")


@pytest.mark.parametrize("name", ["results.csv", "results.png"])
def test_a_folder_in_the_place_of_the_results_is_a_line(mixed, tmp_path, capsys, monkeypatch, name):
    """Before any trial when the sweep is opened; and where it came later, after the table was printed."""
    (mixed.folder / name).mkdir()
    with pytest.raises(UserError, match=f"^sweep='.*{name}': is a folder, and the results go there") as raised:
        worker.show_results(mixed)
    assert "\n" not in str(raised.value) and "by Hyperband" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["03_worker.py"])
    (tmp_path / "runs" / "s" / name).mkdir(parents=True)
    words = f"{TINY['03_worker']} --name s --out {tmp_path / 'runs'}"
    with pytest.raises(UserError, match=f"s/{name}': is a folder"):
        worker.open_sweep(words)


def test_results_that_cannot_be_written_are_a_line(mixed, capsys, monkeypatch):
    """A disk that is away by then: the table is printed all the same."""

    def away(*args):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(worker, "write_table", away)
    with pytest.raises(UserError, match=r"sweep: cannot be written to \(Transport .*\); the table is above") as raised:
        worker.show_results(mixed)
    assert "\n" not in str(raised.value) and "by Hyperband" in capsys.readouterr().out


def test_best_config_is_what_02_takes(mixed, corpus):
    """best_config is the Config of the best trial that ran to its end, even if one that was stopped scored better."""
    best = worker.best_config(mixed)
    assert isinstance(best, train.Config)
    assert (best.learning_rate, best.n_head, best.num_iterations, best.seq_len) == (0.02, 3, 30, 24)
    mixed.folder.joinpath("0001.result.json").unlink()
    mixed.folder.joinpath("0004.result.json").unlink()
    with pytest.raises(UserError, match="no trial has finished"):
        worker.best_config(mixed)


def test_picture_has_a_panel_for_each_parameter(mixed, capsys):
    """Table and picture are saved next to the trials, and the picture has content."""
    worker.show_results(mixed)
    picture = matplotlib.image.imread(mixed.folder / "results.png")
    assert picture.shape[1] > picture.shape[0] > 200 and picture[..., :3].std() > 0.05
    with open(mixed.folder / "results.csv") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["0003", "0001", "0004", "0002"]
    assert "results.png" in capsys.readouterr().out
