"""A run of 02 that changes its number of devices between two starts, in a process with two of them."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from corpus import list_checkpoints, newest, read_arrays, read_rows, tiny, train_tiny

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
TESTS = Path(__file__).parent


def start(setup, folder, count, stop=None):
    """Trains in a folder on `count` devices, until a step has been logged or to the end; the step that was reached.

    Three sequences a microbatch: a step of six is two of them on one device, and one on each of two.
    """
    end = lambda row: row["step"] == stop and signal.raise_signal(signal.SIGINT)
    mesh = train.make_mesh(jax.devices()[:count])
    return train_tiny(*setup, folder, config=tiny(device_batch_size=3), mesh=mesh, on_log=end).step


def report_starts(shards, tokenizer, folder):
    """Trains in folders 1, 2, 1-2 and 2-1, named after the devices of each start; prints the steps that they reach."""
    setup, reached = (tok.folder_corpus(shards), tok.load_tokenizer(tokenizer)), {"devices": jax.device_count()}
    for count in (1, 2):
        reached[str(count)] = start(setup, folder / str(count), count)
    for first, then in ((1, 2), (2, 1)):
        name = f"{first}-{then}"
        reached[name] = [start(setup, folder / name, first, stop=9), start(setup, folder / name, then)]
    print(json.dumps(reached))


@pytest.fixture(scope="module")
def runs(corpus, tokenizer, tmp_path_factory):
    """(folder of the four runs, what report_starts printed last as a dict, all that was printed)."""
    folder = tmp_path_factory.mktemp("devices")
    tokenizer.save(str(folder / "tokenizer.json"))
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "support")]
    places = [str(corpus.train[0].parent), str(folder / "tokenizer.json"), str(folder)]
    code = f"import sys; sys.path[:0] = {paths}; from pathlib import Path; import test_02_devices as test"
    code += f"; test.report_starts(*map(Path, {places}))"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    reached = json.loads(done.stdout.splitlines()[-1])
    assert reached["devices"] == 2 and reached["1"] == reached["2"] == 26
    return folder, reached, done.stdout


def column(rows, key):
    return [row[key] for row in rows if key in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1-2", "2-1"])
def test_a_run_resumes_on_another_number_of_devices(runs, name):
    """A checkpoint of one device on two, and of two on one: each batch once, the same losses to float32 rounding."""
    folder, reached, said = runs
    (at, end), (first, then) = reached[name], name.split("-")
    assert 9 <= at < 26 == end
    rows, before, want = (read_rows(folder / run) for run in (name, first, "1"))
    assert [(row["step"], *row) for row in rows] == [(row["step"], *row) for row in want]
    for key in ("loss", "grad_norm", "val_bpb"):
        np.testing.assert_allclose(column(rows, key), column(want, key), rtol=1e-4, err_msg=key)
    assert column(rows, "loss")[:at] == column(before, "loss")[:at], "up to there it is that run, to the last bit"
    assert f"changed: device is {then} x cpu, was {first} x cpu up to here" in said
    config = json.loads((folder / name / "config.json").read_text())
    assert config["device"] == f"{then} x cpu" and list_checkpoints(folder / name)[-1] == "step_00000026"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1-2", "2-1", "2"])
def test_the_end_is_the_same_to_rounding(runs, name):
    """Parameters and moments of the last checkpoint, next to those of one device throughout."""
    ours, theirs = (read_arrays(newest(runs[0] / run)) for run in (name, "1"))
    assert ours.keys() == theirs.keys()
    for key, (dtype, shape, raw) in theirs.items():
        assert ours[key][:2] == (dtype, shape)
        np.testing.assert_allclose(*(np.frombuffer(r, dtype) for r in (ours[key][2], raw)), rtol=1e-2, atol=1e-4)
