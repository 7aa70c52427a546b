"""onechip/mesh.py: meshes in words, and what of an array is split."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from onechip.errors import UserError
from onechip.mesh import (
    UNSHARED,
    Share,
    Spread,
    as_shares,
    build_mesh,
    describe_mesh,
    mesh_sizes,
    meshes_of,
    split_axis,
)
from onechip.weights import Weight, constant


def test_words_are_sizes():
    """An axis that is not named has size 1; nothing said: all of the devices are data."""
    assert mesh_sizes("", 6) == (6, 1) and mesh_sizes("data=6", 6) == (6, 1) and mesh_sizes("fsdp=6", 6) == (1, 6)
    assert mesh_sizes("data=2,fsdp=3", 6) == mesh_sizes("fsdp=3, data=2", 6) == (2, 3)


@pytest.mark.parametrize(
    "words", ["data", "data=0", "data=-2,fsdp=3", "model=6", "data=2 fsdp=3", "data=2,data=3", "data=2,", "data=1e1"]
)
def test_other_words_are_refused(words):
    """In one line, with what would be right."""
    with pytest.raises(UserError, match=r'^mesh=.*must name data or fsdp.*"data=2,fsdp=4"$'):
        mesh_sizes(words, 6)


def test_a_mesh_of_other_devices_is_refused():
    """The line has both numbers."""
    with pytest.raises(UserError, match=r"^mesh='data=2,fsdp=4': must be a mesh of the 6 devices here$"):
        mesh_sizes("data=2,fsdp=4", 6)


def test_the_least_split_comes_first():
    """Of eight devices; fsdp divides what it splits."""
    assert meshes_of(8, 84) == ["data=8,fsdp=1", "data=4,fsdp=2", "data=2,fsdp=4"]
    assert meshes_of(1, 84) == ["data=1,fsdp=1"]


def test_a_mesh_is_described_as_it_is_asked_for():
    """Axes of size 1 are left out, but for a mesh of one device."""
    assert describe_mesh(build_mesh(jax.devices()[:1])) == "data=1"
    assert describe_mesh(SimpleNamespace(shape={"data": 2, "fsdp": 4})) == "data=2,fsdp=4"
    assert describe_mesh(SimpleNamespace(shape={"data": 1, "fsdp": 4})) == "fsdp=4"


def test_what_is_split_is_marked():
    """The axis that a PartitionSpec has on fsdp; what it does not split stays as it is."""
    assert split_axis(PartitionSpec(None, "fsdp")) == 1 and split_axis(PartitionSpec("data")) is None
    marked = as_shares({"a": PartitionSpec("fsdp"), "b": PartitionSpec()}, {"a": np.ones(3), "b": np.ones(2)})
    assert isinstance(marked["a"], Share) and marked["a"].axis == 0 and marked["b"].shape == (2,)


def test_a_matrix_is_split_by_its_inputs_or_by_its_outputs():
    """D of D->NH is an input, of NH->D an output; without a mesh nothing is split."""
    place = {"D": "fsdp"}
    spread = Spread(object(), lambda weight: PartitionSpec(*(place.get(letter) for letter in weight.letters)))
    weights = [Weight(axes, constant(0.0), "mlp") for axes in ("D->NH", "NH->D", "N->H")]
    assert [spread.axis_of(weight) for weight in weights] == [0, 1, None]
    assert UNSHARED.axis_of(weights[0]) is None and UNSHARED(lambda a, b: (a + 1, b), None, 1, 2) == (2, 2)
