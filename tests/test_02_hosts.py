"""02 on several hosts, a process each on loopback: the run of one process, whatever becomes of a host."""

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SUPPORT
from corpus import newest, read_arrays, read_rows, write_documents
from hub import Hub

from onechip.checkpoints import find_damage
from onechip.parts import open_arrays
from onechip.runfolder import RunFolder

tok = importlib.import_module("01_tokenizer")
pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.slow, pytest.mark.colab]

# B 8 in microbatches of 1 | T 24 | D 16 | N 2 | K 1 | H 8 | L 2: on four devices each adds up two microbatches
FLAGS = (
    "--preset laptop --num_shards 1 --n_head 2 --n_kv_head 1 --head_dim 8 --aspect_ratio 8 --vocab_size 280 "
    "--seq_len 24 --attn_impl einsum --dtype float32 --device_batch_size 1 --total_batch_size 8 --learning_rate 1e-2 "
    "--num_iterations 26 --eval_every 8 --eval_tokens 168 --sample_every 12 --save_every 10 --keep 9"
).split()
SPLIT = ("--mesh", "fsdp=2")
SECONDS = 120  # for any of these


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of two shards."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(2):
        tok.write_shard(folder / f"shard_{i:05d}.parquet", write_documents(60, i, 30), 7)
    return folder


def start(text, out, *flags, devices=1, when="", env=None, cwd=None):
    """A process that trains in out/run; `when`: a signal that it sends itself, "17:KILL"."""
    places = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(SUPPORT / "one_host.py"), str(ROOT / "02_train.py"), when, *FLAGS]
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words += ["--data", str(text), "--out", str(out), "--name", "run", *flags]
    return subprocess.Popen(words, env=os.environ | places | {"PYTHONPATH": path} | (env or {}), cwd=cwd, **pipes)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def finish(*processes):
    """[(exit status, stdout, stderr)] of processes; none outlives this."""
    try:
        end = time.monotonic() + SECONDS
        said = [process.communicate(timeout=end - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [SimpleNamespace(rc=p.returncode, out=out, err=err) for p, (out, err) in zip(processes, said, strict=True)]


def start_hosts(text, out, count, *flags, port=None, own=None, slurm=False, **options):
    """The processes of `count` hosts; own: {host: keywords of its own, its flags among them}; slurm: that says who."""
    port, processes = port or free_port(), []
    for i in range(count):
        mine = dict((own or {}).get(i, {}))
        words = [*flags, "--coordinator", f"127.0.0.1:{port}", "--hosts", str(count), "--host", str(i)]
        if slurm:
            mine["env"], words = slurm_says(count, i, port), flags
        text_here = mine.pop("text", text)
        processes.append(start(text_here, out, *words, *mine.pop("flags", ()), **{**options, **mine}))
    return processes


def slurm_says(count, index, port):
    """The variables of a process that srun has started."""
    says = {"JOB_ID": 7, "STEP_NODELIST": "127.0.0.1", "NTASKS": count, "PROCID": index, "LOCALID": 0}
    return {f"SLURM_{name}": str(value) for name, value in says.items()} | {"JAX_COORDINATOR_PORT": str(port)}


def run_hosts(*args, **options):
    """What the hosts have said, as finish has it."""
    return finish(*start_hosts(*args, **options))


def without_noise(err):
    """What a host says on stderr, without C++'s own log."""
    lines = [line for line in err.splitlines() if line.strip() and not re.match(r"[IWE]\d{4} |WARNING: All log", line)]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory, compiled_once):
    """The run of one process with two devices: its folder and what it said."""
    out = tmp_path_factory.mktemp("alone")
    (said,) = finish(start(text, out, devices=2))
    assert said.rc == 0, said.err
    return SimpleNamespace(folder=out / "run", said=said)


def assert_same_run(folder, alone, rtol=2e-5):
    """Line by line the same metrics to rounding, and the same parameters in the end."""
    ours, theirs = read_rows(folder), read_rows(alone.folder)
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([a[name] for name in b], list(b.values()), rtol=rtol, err_msg=str(b))
    a, b = (open_arrays(newest(path) / "params.safetensors") for path in (folder, alone.folder))
    assert set(a) == set(b)
    for name in b:
        np.testing.assert_allclose(a[name][...], b[name][...], rtol=1e-3, atol=2e-5, err_msg=name)


def samples_in(out):
    return [line for line in out.splitlines() if line.startswith("sample: ")]


# ----------------------------------------------------------------------------------------------------------------------
# One run


@pytest.mark.parametrize("count, devices", [(2, 1), (2, 2), (4, 1)])
def test_hosts_train_as_one_process_does(text, tmp_path, alone, count, devices):
    """Losses, scores, samples and parameters of one process; on as many devices, bit for bit. Only host 0 prints.

    With two devices each, they find one another as Slurm says.
    """
    said = run_hosts(text, tmp_path, count, devices=devices, slurm=devices == 2)
    assert [one.rc for one in said] == [0] * count, said
    assert_same_run(tmp_path / "run", alone)
    if count * devices == 2:
        assert read_rows(tmp_path / "run") == read_rows(alone.folder)
        assert read_arrays(newest(tmp_path / "run")) == read_arrays(newest(alone.folder))
    assert samples_in(said[0].out) == samples_in(alone.said.out) and len(samples_in(said[0].out)) == 3
    assert f"device: {count * devices} x cpu on {count} hosts" in said[0].out
    assert [(one.out, without_noise(one.err)) for one in said[1:]] == [("", "")] * (count - 1)


def test_what_a_run_leaves_is_left_once(text, tmp_path):
    """Two hosts with tokens of two users: host 0's gets the checkpoints, and host 1's is never used. No lock stays."""
    with Hub(users={"hf_first": "first", "hf_second": "second"}) as hub:
        own = {i: {"env": {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}} for i, token in enumerate(hub.users)}
        said = run_hosts(text, tmp_path, 2, "--num_iterations", "12", own=own)
        assert [one.rc for one in said] == [0, 0], said
        assert {"params.safetensors", "onechip.json"} <= set(hub.files("first/onechip-run"))
        assert ("model", "second/onechip-run") not in hub.repos
    folder = RunFolder(tmp_path / "run")
    assert len(list(folder.path.glob("events.out.*"))) == 1 and not folder.lock.exists()


def test_an_evaluation_on_tasks_is_that_of_one_process(text, tmp_path):
    """--eval_core_every, weights split over hosts: each reads what all have found, the figures of one process."""
    flags = ("--num_iterations", "3", "--eval_core_every", "3", "--eval_core_examples", "3", "--sample_every", "0")
    said = run_hosts(text, tmp_path / "two", 2, *flags, *SPLIT)
    said += finish(start(text, tmp_path / "one", *flags, devices=2))
    assert [one.rc for one in said] == [0, 0, 0], said
    rows = [read_rows(tmp_path / name / "run") for name in ("two", "one")]
    two, one = ([row for row in some if "tasks/made_subset" in row] for some in rows)
    assert two == one and len(two) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What becomes of a host


def test_an_interrupt_of_one_host_ends_all_with_a_checkpoint(text, tmp_path, alone):
    """SIGTERM to host 1 in step 14: both end well after the same step, and one process resumes to the same end."""
    said = run_hosts(text, tmp_path, 2, own={1: {"when": "13:TERM"}})
    assert [one.rc for one in said] == [0, 0], said
    (step,) = map(int, re.findall(r"interrupted on host 1 after step (\d+);", said[0].out))
    assert 14 <= step < 26 and newest(tmp_path / "run").name == f"step_{step:08d}"
    (resumed,) = finish(start(text, tmp_path))
    assert f"continues after step {step} of 26" in resumed.out
    assert_same_run(tmp_path / "run", alone)


def test_the_clock_saves_and_ends_a_run_of_hosts(text, tmp_path, alone):
    """Saves by --save_minutes are complete, with both halves; host 1's hours end both after the same step."""
    flags = ("--save_every", "0", "--save_minutes", "0.0005", *SPLIT)
    said = run_hosts(text, tmp_path, 2, *flags, own={1: {"when": "13:LATE"}})
    assert [one.rc for one in said] == [0, 0], said
    (step,) = map(int, re.findall(r"ended for session_hours=0.001 on host 1 after step (\d+);", said[0].out))
    assert 14 <= step < 26 and newest(tmp_path / "run").name == f"step_{step:08d}"
    by_clock = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[:-1]
    assert by_clock and all(find_damage(path) is None for path in by_clock)
    said = run_hosts(text, tmp_path, 2, *flags)
    assert [one.rc for one in said] == [0, 0] and f"continues after step {step} of 26" in said[0].out
    assert_same_run(tmp_path / "run", alone)


def test_killed_hosts_end_the_run_which_resumes(text, tmp_path, alone):
    """Host 0 killed after step 11, host 1 after step 21: the other says so in a line within a minute, and exits with 1.

    The weights are split over both, so each has half of every checkpoint. The same port serves again at once. The third
    start reaches the end of the run that was left alone.
    """
    port = free_port()
    for victim, step in ((0, 11), (1, 21)):
        began = time.monotonic()
        said = run_hosts(text, tmp_path, 2, *SPLIT, port=port, own={victim: {"when": f"{step}:KILL"}})
        assert time.monotonic() - began < 60
        survivor = said[1 - victim]
        assert (said[victim].rc, survivor.rc) == (-9, 1), said
        prefix = "host 1: " if victim == 0 else ""
        line = (
            f"{prefix}error: host {victim} has ended without a word, as if killed: the run ends; the same command on "
        )
        assert line in survivor.err and "Traceback" not in survivor.err and "Check failure" not in survivor.err
    said = run_hosts(text, tmp_path, 2, *SPLIT, port=port)
    # Step 20's checkpoint may not have been complete on both when host 1 died: then it is that of step 16.
    assert [one.rc for one in said] == [0, 0] and re.search(r"continues after step (20|16) of 26", said[0].out)
    assert_same_run(tmp_path / "run", alone)


def test_an_error_on_one_host_is_reported_on_all(text, tmp_path):
    """Host 1 prints its traceback, each line with its index; host 0 says which has ended, and why."""
    said = run_hosts(text, tmp_path, 2, own={1: {"when": "5:an error"}})
    assert [one.rc for one in said] == [1, 1], said
    assert "host 1: RuntimeError: an error" in said[1].err
    assert "error: host 1 has ended: an error: the run ends" in said[0].err
    assert "Traceback" not in said[0].err, said[0].err
    assert not without_noise(re.sub("(?m)^host 1: .*$", "", said[1].err))


# ----------------------------------------------------------------------------------------------------------------------
# What does not go together


def errors_of(said):
    """The lines in which hosts say why they end."""
    assert [one.rc for one in said] == [1] * len(said), said
    return [re.findall(r"^(?:host \d: )?error: (.*)$", one.err, re.M)[-1] for one in said]


def test_different_settings_are_named(text, tmp_path):
    """The field, both values and the host, on both; nothing of a run is left."""
    said = run_hosts(text, tmp_path, 2, own={1: {"flags": ("--learning_rate", "0.5")}})
    assert errors_of(said) == ["learning_rate=0.01 on host 0, but 0.5 on host 1: start all hosts alike"] * 2
    assert not (tmp_path / "run").exists()


def test_different_data_is_named(text, tmp_path):
    """The same words, and another text in the folder that they name."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        shutil.copytree(text, place / "text")
    tok.write_shard(places[1] / "text" / "shard_00000.parquet", write_documents(60, 9, 30), 7)
    own = {i: {"cwd": place, "env": {"ONECHIP_HOME": str(place)}} for i, place in enumerate(places)}
    said = errors_of(run_hosts("text", tmp_path, 2, own=own))
    assert said[0] == said[1] and re.match(r"(data|tokenizer_sha256)=.* on host 0, but .* on host 1: ", said[0])


def test_a_host_needs_a_row(text, tmp_path):
    """Fewer sequences a step than hosts."""
    said = errors_of(run_hosts(text, tmp_path, 2, "--total_batch_size", "1"))
    assert set(said) == {
        "total_batch_size=1: 2 hosts need a sequence each at least: use fewer hosts, or a larger batch"
    }


def test_a_host_that_does_not_come_is_named(text, tmp_path):
    """By its index, on those that wait for it; host 0 too."""
    hosts = start_hosts(text, tmp_path, 3, "--host_minutes", "0.1")
    hosts.pop(1).kill()
    for said in errors_of(finish(*hosts)):
        assert said.startswith("host 1 did not come within 0.1 minutes: start the same command there with --host 1")
    hosts = start_hosts(text, tmp_path, 2, "--host_minutes", "0.1")
    hosts.pop(0).kill()
    (said,) = errors_of(finish(*hosts))
    assert said.startswith("host 0 did not come within 0.1 minutes: nobody answers at 127.0.0.1:")
