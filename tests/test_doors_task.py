"""A task with a loss mask that 02 does not know, handed in through its door; nothing is patched.

The larger of two digits: the model is trained, and scored, on the answer alone.
"""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import newest, read_rows, tiny

train = importlib.import_module("02_train")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

CONFIG = tiny(num_iterations=60, eval_every=20, save_every=0)
BASE, EQUALS = 10, 11  # token ids: the digits are 0 to 9


def write_digits(rng, rows):
    """A batch of rows like "3 5 = 5 1 2 = 2 ...": what precedes an answer is not learned."""
    a, b = rng.integers(0, BASE, (2, rows, CONFIG.seq_len))
    text = np.stack([a, b, np.full_like(a, EQUALS), np.maximum(a, b)], axis=-1).astype(np.int32).reshape(rows, -1)
    mask = np.tile(np.arange(CONFIG.seq_len) % 4 == 2, (rows, 1)).astype(np.int32)
    x, y = text[:, : CONFIG.seq_len], text[:, 1 : CONFIG.seq_len + 1]
    return {"x": x, "y": y, "mask": mask}


def batches(position):
    """The stream's position is a count and the generator's own state."""
    position = position or {"drawn": 0}
    while True:
        rng = np.random.default_rng(position["drawn"])
        batch = write_digits(rng, CONFIG.total_batch_size)
        batch["mask"] = batch["mask"] * rng.integers(
            0, 2, batch["mask"].shape, dtype=np.int32
        )  # rows differ in targets
        position = {"drawn": position["drawn"] + 1}
        yield batch, position


def score(config, model, mesh):
    held_out = write_digits(np.random.default_rng(2**32), 64)

    @jax.jit
    def loss(params):
        return train.cross_entropy(config, model, params, held_out)

    return lambda params: {"val_loss": float(loss(params))}


TASK = train.Task(batches, train.cross_entropy, score, origin={"data": {"name": "digits", "revision": "1"}})


@pytest.mark.slow
def test_it_trains_on_the_answers_and_resumes_to_the_last_bit(tmp_path):
    """From log V to less than a guess among ten digits; interrupted in the middle it ends with the same bits."""

    def stop(row):
        if row["step"] == 31:
            raise KeyboardInterrupt

    whole = train.train(CONFIG, TASK, tmp_path / "whole")
    train.train(CONFIG, TASK, tmp_path / "cut", on_log=stop)
    train.train(CONFIG, TASK, tmp_path / "cut")
    rows = read_rows(tmp_path / "whole")
    assert rows[0]["loss"] == pytest.approx(math.log(300), abs=0.01) and whole.val_loss < math.log(10)
    assert whole.val_bpb is None and "val_bpb" not in rows[-1] and rows == read_rows(tmp_path / "cut")
    for name in ("params.safetensors", "opt.safetensors", "stream.safetensors"):
        assert (newest(tmp_path / "whole") / name).read_bytes() == (newest(tmp_path / "cut") / name).read_bytes()
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_answer_counts_the_same_and_nothing_else_does():
    """A step of three microbatches with unequal masks is the gradient of the mean over all answers of the batch."""
    batch, _ = next(batches({"drawn": 3}))
    counts = batch["mask"].reshape(3, -1).sum(axis=1)
    assert len(set(counts)) > 1
    mesh = train.make_mesh(jax.local_devices()[:1])
    sgd = train.Optimizer("sgd", lambda *_: (), lambda c, w, p, s, g, *rest: (jax.tree.map(jnp.subtract, p, g), s))
    config = tiny(grad_clip=0.0)
    state = train.init_state(config, mesh, optimizer=sgd)
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), state["params"])
    loss = lambda params, batch: train.cross_entropy(config, train.GPT, params, batch)
    value, grads = jax.value_and_grad(loss)(params, batch)
    expected = jax.tree.map(jnp.subtract, params, grads)
    other = batch | {"y": np.where(batch["mask"], batch["y"], (batch["y"] + 1) % 300)}
    assert loss(params, other) == value
    state, metrics = train.make_train_step(config, mesh, optimizer=sgd)({**state, "params": params}, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state["params"], expected)
