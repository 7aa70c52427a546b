"""Meshes of eight CPU devices: the same losses as one device, weights in shares, Muon shared out, refusals.

bench/slices.py runs every case on every mesh; here each mesh and each case is met once, in a process of eight devices.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
COVER = {
    "gpt, adamw": ["data=2,fsdp=4"],
    "gpt, adamw, no accumulation": ["fsdp=8"],
    "swiglu, muon": ["data=8", "fsdp=2"],
    "nanochat, muon": ["data=4,fsdp=2", "fsdp=8"],
}


def report():
    """Prints what the tests below compare, as a line of JSON."""
    import jax

    slices, train = importlib.import_module("slices"), importlib.import_module("02_train")
    found = [row for case, meshes in COVER.items() for row in slices.compare_meshes([case], meshes)]
    shared = {text: slices.muon_shared_out(train.make_mesh(shape=text)) for text in slices.MESHES[:4]}
    model, optimizer, config = slices.CASES["gpt, adamw"]
    kept = {}
    for text in ("data=8", "data=2,fsdp=4", "fsdp=8"):
        mesh = train.make_mesh(shape=text)
        state = train.init_state(config, mesh, model, optimizer)
        kept[text] = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    print(json.dumps({"rows": found, "shared": shared, "kept": kept}))


@pytest.fixture(scope="module")
def reported():
    """What report prints in a process of eight CPU devices."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]
    code = f"import sys; sys.path[:0] = {paths}; import test_02_mesh; test_02_mesh.report()"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", COVER)
def test_every_mesh_has_the_losses_of_one_device(reported, case):
    """Windows, grouped heads, value embeddings; with and without accumulation; AdamW and Muon.

    One step's gradients and ten steps' losses to float32 rounding; over 20 steps a mesh is no further from one device
    than that, or than some times what one device makes of a start that is one unit in the last place off.
    """
    rows = [row for row in reported["rows"] if row["case"] == case]
    assert [row["mesh"] for row in rows] == COVER[case]
    for row in rows:
        assert row["gradients"] < 1e-5, row
        assert row["early"][0] < 2e-6 and row["early"][1] < 2e-5, row
        for found, noise, bound in zip(row["all"], row["noise"], (2e-6, 2e-5), strict=True):
            assert found < max(bound, 4 * noise), row


@pytest.mark.slow
def test_muon_shared_out_is_muon(reported):
    """Each matrix is bit for bit what a device makes of it alone; in one stack products sum in another order."""
    for text, (same, apart) in reported["shared"].items():
        assert same and apart < 1e-5, text


@pytest.mark.slow
def test_a_device_has_its_share_of_the_state(reported):
    """All of it on data=8, a quarter on fsdp=4, an eighth on fsdp=8, but for a few numbers."""
    whole, quarter, eighth = reported["kept"].values()
    assert quarter == pytest.approx(whole / 4, rel=0.01) and eighth == pytest.approx(whole / 8, rel=0.01)


def test_files_for_a_slice_hold_together():
    """The YAML and the script are well formed, and what they start are notebooks with settings that exist."""
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((ROOT / "docs" / "slices" / "skypilot.yaml").read_text())
    script = ROOT / "docs" / "slices" / "slice.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    usage = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert usage.returncode == 2 and "slice.sh create v6e-8" in usage.stdout
    train = importlib.import_module("02_train")
    settings = {field for kind in (train.Run, train.Config) for field in kind.__dataclass_fields__}
    for command in (task["run"], usage.stdout):
        notebook, *words = re.findall(r"0\d_\w+\.py|--(?!locked)\w+", command)
        assert (ROOT / notebook).exists() and words
        assert {word.removeprefix("--") for word in words} <= settings


def test_a_mesh_that_does_not_divide_is_refused():
    """The batch by all devices, n_embd by fsdp: one line each, which names the field and both numbers."""
    slices, train = importlib.import_module("slices"), importlib.import_module("02_train")
    config = slices.CASES["gpt, adamw"][2]
    on = lambda data, fsdp: SimpleNamespace(size=data * fsdp, shape={"data": data, "fsdp": fsdp})
    train.check_mesh(config, on(2, 4))
    with pytest.raises(
        train.UserError, match=r"^total_batch_size=16: must be .* device_batch_size \* devices = 1 \* 6$"
    ):
        train.check_mesh(config, on(2, 3))
    with pytest.raises(train.UserError, match=r"^mesh='fsdp=3': fsdp=3 must divide n_embd=32$"):
        train.check_mesh(dataclasses.replace(config, total_batch_size=24), on(1, 3))
