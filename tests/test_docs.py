"""The python blocks of docs/extending.md run as they stand, one after another."""

import re

import numpy as np
import pytest
from conftest import ROOT
from corpus import TINY, newest, read_rows, train

pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S)


@pytest.mark.slow
def test_the_examples_of_extending_train_and_open_again(tmp_path, monkeypatch):
    """Attention, model, optimizer, task and the run of all: on a smaller preset it trains, and opens as MINE."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRESETS, "laptop", TINY)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"), names)
    losses = [row["loss"] for row in read_rows("runs/mine") if "loss" in row]
    assert len(losses) == 50 and np.isfinite(losses).all()  # a rate for the laptop's model, not for this one
    opened = train.open_model("runs/mine", names["MINE"])
    assert {"value_embeds"} <= set(opened.params["layers"][1]) and opened.model is names["MINE"]
    assert newest("runs/mine").name == "step_00000050"
    q, k = (np.random.default_rng(0).normal(size=(2, 9, heads, 8)).astype(np.float32) for heads in (4, 2))
    rope = train.rope_tables(names["config"], 9)
    mine, ours = (attend(q, k, k, rope, 5, 0.4) for attend in (names["attention_mine"], train.attention_einsum))
    np.testing.assert_allclose(mine, ours, rtol=1e-5, atol=1e-6)
