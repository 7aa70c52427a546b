"""onechip/tables.py: text that lines up."""

import pytest

from onechip.tables import table

# One of each layout that the notebooks print, with the alignment that makes it.
LAYOUTS = {
    "bytes per token, a column for each kind of text": (
        ["bytes per token", "English", "mathematics"],
        [["UTF-8 bytes, 256", "1.00", "1.00"], ["onechip, 8,192", "4.21", "2.10"]],
        "< >11",
        """\
bytes per token       English  mathematics
UTF-8 bytes, 256         1.00         1.00
onechip, 8,192           4.21         2.10""",
    ),
    "parameters by group": (
        None,
        [["  embed", "33,554,432", "12.5%"], ["  total", "268,435,456", "100.0%"]],
        "<12 >12 >6",
        """\
  embed         33,554,432   12.5%
  total        268,435,456  100.0%""",
    ),
    "trials of a sweep": (
        ["trial", "state", "steps", "n_head", ""],
        [["0001", "finished", "300", "4", ""], ["0012", "failed", "7", "16", "out of memory"]],
        "<",
        """\
trial  state     steps  n_head
0001   finished  300    4
0012   failed    7      16      out of memory""",
    ),
    "two models side by side": (
        ["v6e:1x1, estimated", "02_train", "04_maxtext"],
        [["parameters", "268.4M", "301.9M"], ["MFU", "47.8%", "unknown"]],
        "<28 >12",
        """\
v6e:1x1, estimated                02_train    04_maxtext
parameters                          268.4M        301.9M
MFU                                  47.8%       unknown""",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_line_up(layout):
    """Text to the left, numbers to the right, at least as wide as asked for and as wide as the longest cell."""
    heads, rows, align, expected = LAYOUTS[layout]
    assert table(rows, heads, align) == expected


def test_a_long_cell_widens_its_column_only():
    """No cell is cut and none touches the next."""
    assert table([["a" * 9, 1, "x"], ["b", 22, "y"]], align="<3 >1 <") == "aaaaaaaaa   1  x\nb          22  y"


def test_rows_of_different_lengths_are_an_error():
    with pytest.raises(ValueError):
        table([["a", "b"], ["c"]])


def test_no_rows_are_their_heads_only():
    assert table([], ["a", "b"]) == "a  b" and table([]) == ""
