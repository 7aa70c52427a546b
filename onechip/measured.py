"""What others have measured: chip_check.json files in docs/chips/, and what they make of an estimate.

Anybody may have written such a file. It is JSON of bounded size; of its content only numbers and short printable words
of known rows are taken, and one that is anything else is skipped with a line.
"""

import statistics
from pathlib import Path
from typing import NamedTuple

from onechip.check_report import FORMAT
from onechip.errors import UserError, require, say
from onechip.files import read_json
from onechip.settings import is_finite
from onechip.tables import table

CHIP_FILES = Path(__file__).resolve().parent.parent / "docs" / "chips"
MOST_FILES, MOST_BYTES, MOST_ROWS = 200, 1 << 20, 2000


class Measured(NamedTuple):
    """A training step that somebody has timed: seconds measured and estimated, and what it was a step of."""

    file: str
    device: str
    jax: str
    model: str
    attn_impl: str
    device_batch_size: int
    seconds: float
    estimated: float

    @property
    def ratio(self):
        return self.seconds / self.estimated


def word(path, field, value):
    """A short printable text, or UserError."""
    sound = isinstance(value, str) and 0 < len(value) <= 60 and value.isascii() and value.isprintable()
    require(sound, f"{path.name}: {field}", value, "must be a short word")
    return value


def amount(path, field, value, kind=(int, float)):
    """A positive number, or UserError."""
    sound = isinstance(value, kind) and not isinstance(value, bool) and is_finite(value) and 0 < value < 1e12
    require(sound, f"{path.name}: {field}", value, "must be a positive number")
    return value


def steps_in(path):
    """The Measured steps in a file that have an estimate; UserError if it is no chip_check.json."""
    require(path.stat().st_size <= MOST_BYTES, f"{path.name}: bytes", path.stat().st_size, f"at most {MOST_BYTES:,}")
    found = read_json(path)
    require(found.get("format") == FORMAT, f"{path.name}: format", found.get("format"), f"must be {FORMAT!r}")
    machine, rows = found.get("machine"), found.get("rows")
    listed = isinstance(machine, dict) and isinstance(rows, list) and len(rows) <= MOST_ROWS
    require(listed, f"{path.name}: machine, rows", type(rows).__name__, "must be an object and a list of findings")
    device, version = (word(path, name, machine.get(name)) for name in ("device", "jax"))
    steps = []
    for row in rows:
        require(isinstance(row, dict), f"{path.name}: row", row, "must be an object")
        if row.get("part") != "step" or row.get("status") != "ok" or "expected" not in row:
            continue
        more = row.get("more")
        require(isinstance(more, dict), f"{path.name}: more", more, "must be an object")
        names = (word(path, name, more.get(name)) for name in ("model", "attn_impl"))
        size = amount(path, "device_batch_size", more.get("device_batch_size"), int)
        times = (amount(path, name, row.get(name)) / 1e3 for name in ("measured", "expected"))
        steps.append(Measured(path.stem, device, version, *names, size, *times))
    return steps


def read_measured(folder=CHIP_FILES):
    """The Measured steps of all files NAME.json in a folder; a line for each file that is skipped."""
    files = sorted(path for path in Path(folder).glob("*.json") if path.is_file())
    if len(files) > MOST_FILES:
        say(f"{Path(folder).name}: has {len(files):,} files; the first {MOST_FILES} are read")
    steps = []
    for path in files[:MOST_FILES]:
        try:
            steps += steps_in(path)
        except (UserError, OSError) as error:
            say(f"measured: skipped {printable(error)}")
    return steps


def printable(error):
    """An error's first 300 characters that a terminal can be given."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(error)[:300])


def describe_measured(steps):
    """A table of measured against estimated, as text."""
    if not steps:
        return "nobody has contributed a chip_check.json yet: docs/chips/README.md says how"
    heads = ["device", "model", "attention", "at a time", "measured, ms", "estimated, ms", "ratio", "jax", "file"]
    rows = [
        [s.device, s.model, s.attn_impl, s.device_batch_size, f"{1e3 * s.seconds:.1f}", f"{1e3 * s.estimated:.1f}",
         f"{s.ratio:.2f}", s.jax, s.file]
        for s in sorted(steps, key=lambda step: step[1:])
    ]  # fmt: skip
    return table(rows, heads, "< < < > > > > <")


def ratio_for(device, attn_impl, folder=CHIP_FILES):
    """(median of measured over estimated, how many steps) on a device with an attention; None if there is none."""
    ratios = [step.ratio for step in read_measured(folder) if (step.device, step.attn_impl) == (device, attn_impl)]
    return (statistics.median(ratios), len(ratios)) if ratios else None
