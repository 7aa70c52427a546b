"""onechip/scoring.py: nats per token and bits per byte of all rows, however many are scored at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from onechip.scoring import make_scorer

VOCAB, ROWS, LENGTH = 11, 7, 5
TOKEN_BYTES = np.array([0, 1, 1, 2, 3, 5, 1, 0, 4, 2, 1], np.int32)  # 0 and 7 are special


def bigram_losses(params, x, y):
    """Nats of each y (B, T) after x, by a table of logits (V, V)."""
    logits = params[x]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]


def expected(table, x, y):
    """The same scores, in float64 and token for token."""
    table = table.astype(np.float64)
    nats = np.array([np.log(np.exp(table[a]).sum()) - table[a, b] for a, b in zip(x.flat, y.flat, strict=True)])
    size = TOKEN_BYTES[y.ravel()]
    return {"val_loss": nats.mean(), "val_bpb": nats[size > 0].sum() / np.log(2) / size.sum()}


@pytest.fixture
def drawn():
    """A table of logits (V, V) float32, and rows x, y (ROWS, LENGTH) int32 with both special tokens among them."""
    draw = np.random.default_rng(3)
    x, y = draw.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    y[0, :2] = 0, 7
    return draw.normal(0, 2, (VOCAB, VOCAB)).astype(np.float32), x, y


def one_device():
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_scores_are_those_of_float64_whatever_the_batch_size(drawn, rows):
    """The last batch is filled up where it must be, and what fills it counts nothing."""
    table, x, y = drawn
    got = make_scorer(bigram_losses, one_device(), rows, x, y, TOKEN_BYTES)(jnp.asarray(table))
    want = expected(table, x, y)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-6), name


def test_special_tokens_count_in_nats_per_token_only(drawn):
    """Another loss of a special token moves the loss and leaves bits per byte as they are, as in nanochat."""
    table, x, y = drawn
    scores = []
    for extra in (0.0, 3.0):
        losses = lambda params, x, y, extra=extra: bigram_losses(params, x, y) + extra * ((y == 0) | (y == 7))
        scores.append(make_scorer(losses, one_device(), 4, x, y, TOKEN_BYTES)(jnp.asarray(table)))
    special = ((y == 0) | (y == 7)).sum()
    assert scores[1]["val_loss"] - scores[0]["val_loss"] == pytest.approx(3 * special / y.size, rel=1e-5)
    assert scores[1]["val_bpb"] == scores[0]["val_bpb"]


def test_the_scorer_keeps_no_params(drawn):
    """Each call scores the params that it is given."""
    table, x, y = drawn
    score = make_scorer(bigram_losses, one_device(), 4, x, y, TOKEN_BYTES)
    for scale in (1, 0):
        assert score(jnp.asarray(table * scale))["val_loss"] == pytest.approx(
            expected(table * scale, x, y)["val_loss"], rel=2e-6
        )
    assert score(jnp.zeros((VOCAB, VOCAB)))["val_loss"] == pytest.approx(np.log(VOCAB), rel=1e-6)
