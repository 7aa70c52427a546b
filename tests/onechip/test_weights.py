"""onechip/weights.py: what a table of weights says of shapes, first values, types, counts and places.

The tables of the models are tested with them.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import quick_compiler  # noqa: F401  (for every test)

from onechip.errors import UserError
from onechip.weights import (
    Weight,
    bytes_of,
    cast_weights,
    constant,
    count_by_kind,
    draw_weights,
    normal,
    place_like,
    stored_like,
    uniform,
    widened,
)
from onechip.weights import weight_shapes as shapes_of

CONFIG = SimpleNamespace(sizes={"D": 22, "N": 6, "H": 14, "F": 34, "L": 3, "V": 31})
LAYER = {"c_q": Weight("D->NH", uniform, "attention"), "c_proj": Weight("NH->D", uniform, "attention")}
TABLE = {
    "wte": Weight("V->D", normal(0.5), "embed"),
    "layers": [LAYER, LAYER | {"c_fc": Weight("D->F", constant(2.0), "mlp")}],
    "gates": Weight("D->L", constant(0.1), "scalar"),
    "one": Weight("", constant(3.0), "scalar"),
}


def draw(table, seed=0):
    return jax.device_get(draw_weights(CONFIG, table, jax.random.key(seed)))


@pytest.fixture(scope="module")
def params():
    return draw(TABLE)


def test_axes_say_shape_and_inputs():
    """Letters are sizes; what is before the arrow is summed over, one axis or two."""
    weights = {axes: Weight(axes, uniform, "mlp") for axes in ("D->NH", "NH->D", "D->F", "L", "")}
    assert {axes: w.shape(CONFIG) for axes, w in weights.items()} == {
        "D->NH": (22, 6, 14), "NH->D": (6, 14, 22), "D->F": (22, 34), "L": (3,), "": (),
    }  # fmt: skip
    assert [weights[axes].fan_in(CONFIG) for axes in ("D->NH", "NH->D", "D->F")] == [22, 84, 22]


def test_an_arrow_makes_a_matrix_and_a_kind_is_a_group():
    """A table with no optimizer in mind needs no groups: each weight is in that of its kind unless it names another."""
    weights = [weight for weight in jax.tree.leaves(TABLE)]
    assert [w.group for w in weights] == [w.kind for w in weights]
    gate = Weight("D->", uniform, "attention", "gates")
    assert (gate.kind, gate.group) == ("attention", "gates") and gate == Weight("D->", uniform, "attention", "gates")
    matrices = {"D->NH": True, "NH->D": True, "D->": True, "L": False, "": False}
    assert {axes: Weight(axes, uniform, "mlp").is_matrix for axes in matrices} == matrices


def test_an_unknown_kind_is_refused():
    """A weight that nobody counts would make MFU wrong without a word."""
    with pytest.raises(UserError) as refusal:
        Weight("D->F", uniform, "moe")
    assert str(refusal.value) == "kind='moe': use one of embed, attention, mlp, lm_head, scalar"


def test_arrays_have_the_tables_structure_and_start_as_it_says(params):
    """float32 arrays in the table's form: normal, constant, and uniform of variance 1 / inputs; layers differ."""
    shapes = shapes_of(CONFIG, TABLE)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    assert params["wte"].std() == pytest.approx(0.5, rel=0.1)
    assert (
        (params["layers"][1]["c_fc"] == 2).all() and (params["gates"] == np.float32(0.1)).all() and params["one"] == 3
    )
    for name, inputs in (("c_q", 22), ("c_proj", 84)):
        first, second = (layer[name] for layer in params["layers"])
        assert np.abs(first).max() <= math.sqrt(3 / inputs) and first.std() == pytest.approx(inputs**-0.5, rel=0.05)
        assert not np.array_equal(first, second)


def test_a_weight_is_stored_as_the_table_says(params):
    """bfloat16 where it says so: the same first values, rounded; widened and stored again they are the same bits."""
    narrow = {**TABLE, "wte": Weight("V->D", normal(0.5), "embed", dtype="bfloat16")}
    stored = draw(narrow)
    assert stored["wte"].dtype == jnp.bfloat16 == shapes_of(CONFIG, narrow)["wte"].dtype
    np.testing.assert_array_equal(stored["wte"], params["wte"].astype(jnp.bfloat16))
    assert bytes_of(params) - bytes_of(stored) == 2 * 31 * 22 == bytes_of(shapes_of(CONFIG, TABLE)) - bytes_of(stored)
    wide = widened(stored)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
    again = jax.device_get(stored_like(wide, stored))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), again, stored))


def test_a_weight_at_the_end_changes_no_other(params):
    """A new entry of a table or a layer leaves all first values as they are; another seed changes them."""
    extra = {"new": Weight("D->F", normal(1.0), "mlp")}
    more = draw({**TABLE, "layers": [layer | extra for layer in TABLE["layers"]], **extra})
    added = [more.pop("new"), *(layer.pop("new") for layer in more["layers"])]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, more))
    assert len({leaf.tobytes() for leaf in added}) == 3
    assert not np.array_equal(draw(TABLE, 1)["wte"], params["wte"])


def test_all_but_scalars_are_cast(params):
    """By kind, whatever the shape."""
    cast = cast_weights(TABLE, params, "bfloat16")
    float32 = [name for name in cast if name != "layers" and cast[name].dtype == jnp.float32]
    assert float32 == ["gates", "one"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cast["layers"])} == {"bfloat16"}


def test_parameters_are_counted_by_kind():
    """Every kind is there, those that a table lacks with 0."""
    counts = {"embed": 31 * 22, "attention": 4 * 22 * 84, "mlp": 22 * 34, "lm_head": 0, "scalar": 22 * 3 + 1}
    assert count_by_kind(CONFIG, TABLE) == {**counts, "total": sum(counts.values())}


def test_what_has_the_form_of_the_parameters_lies_as_they_do():
    """Moments lie like their weights, at any depth; a counter, or a tree of another form, is whole everywhere.

    So is a moment of another shape than its parameter's: one number a row does not split as a matrix does.
    """
    shapes = shapes_of(CONFIG, {"a": LAYER["c_q"], "b": [LAYER["c_proj"]]})
    places, whole = {"a": "place of a", "b": ["place of b"]}, "everywhere"
    rows = {"a": jax.ShapeDtypeStruct((22, 1, 1), jnp.float32), "b": shapes["b"]}
    with pytest.MonkeyPatch.context() as patch:  # a place is only handed on
        patch.setattr(jax, "ShapeDtypeStruct", lambda shape, dtype, sharding: sharding)
        count = SimpleNamespace(shape=(), dtype="int32")
        state = {"mu": shapes, "rows": rows, "deep": [{"nu": shapes}, count], "half": {"a": count}}
        assert place_like({"params": shapes, "opt": state}, shapes, places, whole) == {
            "params": places,
            "opt": {
                "mu": places,
                "rows": {"a": whole, "b": ["place of b"]},
                "deep": [{"nu": places}, whole],
                "half": {"a": whole},
            },
        }
