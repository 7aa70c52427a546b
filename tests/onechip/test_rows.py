"""onechip/rows.py: embeddings' rows in training, and their gradients, against plain indexing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onechip import row_kernel, rows
from onechip.weights import Weight, normal

V, B, T = 37, 4, 24
TABLE = functools.partial(Weight, init=normal(1.0), kind="embed")
WEIGHTS = {
    "wte": TABLE("V->D"),
    "layers": [{"c": Weight("D->F", normal(1.0), "mlp"), "ve": TABLE("V->KH")}, {"positions": TABLE("T->D")}],
    "scale": Weight("", normal(1.0), "scalar"),
}


@dataclasses.dataclass
class Sizes:
    sizes = {"V": V, "D": 40, "F": 6, "K": 3, "H": 50, "T": T}


@pytest.fixture
def params():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    return jax.tree.map(lambda w: jax.random.normal(next(keys), w.shape(Sizes)), WEIGHTS)


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(1), (B, T), 0, V).at[0].set(5)  # one of them many times


def test_an_embedding_by_tokens_is_taken_out_and_put_back(params):
    """Only kind `embed` with a row a token; a table of positions stays where it is."""
    embeddings = rows.Embeddings(WEIGHTS, params)
    assert [table.shape for table in embeddings.tables] == [(V, 3, 50), (V, 40)]
    assert embeddings.others["wte"] is None and embeddings.others["layers"][1]["positions"].shape == (T, 40)
    jax.tree.map(np.testing.assert_array_equal, embeddings.join(embeddings.tables, embeddings.others), params)


def test_rows_are_those_of_the_tokens(params, tokens):
    """From all tables side by side, in each one's own shape."""
    embeddings = rows.Embeddings(WEIGHTS, params)
    for table, row in zip(embeddings.tables, embeddings.rows(tokens), strict=True):
        np.testing.assert_array_equal(rows.lookup(row, tokens), table[tokens])
        np.testing.assert_array_equal(rows.lookup(table, tokens), table[tokens])


def test_other_tokens_than_those_looked_up_are_refused(params, tokens):
    """Rows of one batch must not pass for those of another; indexing is answered with what to write."""
    [row, _] = rows.Embeddings(WEIGHTS, params).rows(tokens)
    with pytest.raises(ValueError, match=r"rows of \(4, 24\) tokens, asked for \(4, 1\)"):
        rows.lookup(row, tokens[:, :1])
    with pytest.raises(TypeError, match="use onechip.rows.lookup"):
        row[tokens]


def test_no_embedding_by_tokens_is_no_trouble():
    """A model without any has no sums and no rows."""
    none = rows.Embeddings({"c": Weight("D->F", normal(1.0), "mlp")}, {"c": np.ones((2, 3))})
    assert none.rows(None) == [] and none.gradients(none.add(none.no_sums(), None, [])) == []
    assert none.gradients_of(None, []) == []
    assert none.join([], none.others)["c"].shape == (2, 3)


def summed(embeddings, batches, **how):
    """Each embedding's gradient, float32, after adding (tokens, list of Rows) of several batches."""
    sums = embeddings.no_sums()
    for tokens, grads in batches:
        sums = embeddings.add(sums, tokens, grads, **how)
    return embeddings.gradients(sums)


def in_blocks(size):
    """`summed` by the kernel, in Pallas's interpreter, with no more tokens in a block than this."""

    def add(embeddings, batches):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_kernel, "block_rows", lambda *args: size)
            return summed(embeddings, batches, kernel=True)

    return add


def one_by_one(embeddings, batches):
    """The gradients of each batch alone, added."""
    found = [embeddings.gradients_of(*batch) for batch in batches]
    return [sum(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "add", [summed, in_blocks(16), in_blocks(32), one_by_one], ids=["plain", "16", "32", "one by one"]
)
def test_gradients_are_summed_as_in_float64(params, tokens, add, dtype):
    """Three batches, tokens many times in one block and in several: equal to np.add.at in float64, to rounding."""
    embeddings = rows.Embeddings(WEIGHTS, params)
    rng, batches = np.random.default_rng(0), []
    for i in range(3):
        grads = [rows.Rows(jnp.asarray(rng.normal(size=(B, T, *t.shape[1:])), dtype)) for t in embeddings.tables]
        batches.append(((tokens + i) % V, grads))
    found = add(embeddings, batches)
    for n, table in enumerate(embeddings.tables):
        wanted = np.zeros(table.shape)
        for ids, grads in batches:
            np.add.at(wanted, np.asarray(ids), np.asarray(grads[n].rows, np.float64))
        assert found[n].dtype == jnp.float32
        np.testing.assert_allclose(found[n], wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted).max() > 10


@pytest.mark.parametrize(
    ("count", "sublanes", "width", "block"),
    [(8192, 42, 2, 256), (8192, 156, 2, 256), (8192, 156, 4, 128), (96, 2, 4, 32), (8, 1, 4, 0), (8200, 1, 2, 0)],
)
def test_a_block_divides_the_tokens_and_fits(count, sublanes, width, block):
    """Depth 12 and 24 as they are; what cannot be divided goes without the kernel."""
    assert row_kernel.block_rows(count, sublanes, width) == block


def test_distinct_ids_come_first_and_ascend():
    """Each block for itself; how many there are is counted."""
    unique, counts = row_kernel.distinct(jnp.asarray([[7, 3, 7, 0], [2, 2, 2, 2]], jnp.int32))
    assert unique[0, :3].tolist() == [0, 3, 7] and unique[1, :1].tolist() == [2] and counts.tolist() == [3, 1]
    assert (np.asarray(unique)[0, 3:] > V).all() and (np.asarray(unique)[1, 1:] > V).all()
