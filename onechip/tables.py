"""Tables as aligned text."""


def table(rows, heads=None, align="<"):
    """Rows of strings as aligned text, one line each; `heads`, if given, is the line above them.

    align: the columns' format specs, separated by blanks, such as "<28 >12": "<" puts text to the left and ">" to the
    right, the number is the least width in characters. The last one holds for all further columns. A column grows with
    its longest cell; two blanks separate columns.
    """
    lines = [list(map(str, line)) for line in ([] if heads is None else [heads]) + list(rows)]
    specs = align.split()
    columns = []
    for i, column in enumerate(zip(*lines, strict=True)):
        spec = specs[min(i, len(specs) - 1)]
        width = max(int(spec[1:] or 0), *map(len, column))
        columns.append([f"{cell:{spec[0]}{width}}" for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
