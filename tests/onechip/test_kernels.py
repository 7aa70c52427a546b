"""onechip/kernels.py: the tiles that a window leaves. Values are tested with the model, programs in test_v6e."""

import pytest

from onechip import kernels


@pytest.mark.parametrize(
    "T, window, b", [(768, 1, 128), (768, 128, 128), (768, 129, 128), (768, 300, 256), (512, 512, 128)]
)
def test_tiles_hold_every_visible_pair_and_mask_where_some_pair_is_not(T, window, b):
    """A tile that is left out has no visible pair, a tile that is not masked has no other."""
    seen = {}
    for query in range(T):
        for key in range(max(0, query - window + 1), query + 1):
            seen[query // b, key // b] = seen.get((query // b, key // b), 0) + 1
    assert {(i, j): masked for i, j, masked in kernels.tiles(T, window, b)} == {t: n < b * b for t, n in seen.items()}
