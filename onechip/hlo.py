"""The text of a compiled program, HLO: its computations, and sums over its instructions as often as they run."""

import re


def split_computations(hlo):
    """({name: its lines}, the entry's name) of an HLO module's text."""
    computations, entry, lines = {}, None, None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*->.*\{$", line)
        if header:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def bound_of(condition):
    """How often a loop that counts from 0 runs: the constant that its condition compares with."""
    return max((int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)), default=1)


def add_up(hlo, count):
    """The sum of count(line) over a program's instructions, a loop's times its number of runs."""
    computations, entry = split_computations(hlo)

    def total_of(name):
        total = 0
        for line in computations.get(name, ()):
            if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                total += total_of(loop[2]) * (int(known[1]) if known else bound_of(computations[loop[1]]))
            elif call := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
                total += total_of(call[1])
            else:
                total += count(line)
        return total

    return total_of(entry)
