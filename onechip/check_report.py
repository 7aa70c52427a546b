"""What a check of a chip found: rows, a table for people, and JSON with nothing private in it."""

import getpass
import platform
import re
import socket
from typing import NamedTuple

from onechip.tables import table

FORMAT = "onechip chip_check 1"
OK, WRONG, FAILED, SKIPPED, STOPPED = "ok", "wrong", "failed", "skipped", "interrupted"


class Row(NamedTuple):
    """One finding.

    measured: in `unit`, a median; low, high: least and most of several runs. expected: an estimate or prediction in the
    same unit, by what `by` says. limit: of an error, above which it is wrong. more: JSON, such as a step's settings.
    """

    part: str
    what: str
    status: str = OK
    measured: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    expected: float | None = None
    by: str = ""
    limit: float | None = None
    note: str = ""
    more: dict = {}

    @property
    def ratio(self):
        """What was measured over what was expected; None if either is not known."""
        return self.measured / self.expected if self.measured is not None and self.expected else None


def compared(part, what, errors, more=None):
    """The Row of a comparison. errors: {array: (error, the largest that is right)}; the worst of them is reported."""
    share = lambda name: errors[name][0] / errors[name][1]
    # An error that is not a number is not right.
    name = max(errors, key=lambda name: share(name) if share(name) == share(name) else float("inf"))
    error, limit = errors[name]
    status, note = (OK, f"largest in {name}") if error <= limit else (WRONG, f"{name} is wrong")
    measured = float(error) if error == error else None
    return Row(part, what, status, measured, "error", limit=float(limit), note=note, more=more or {})


# ----------------------------------------------------------------------------------------------------------------------
# For people


def number(value):
    """A number in three digits, or nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def cells_of(row):
    """A Row as cells of text."""
    spread = f"{number(row.low)} to {number(row.high)}" if row.low is not None else ""
    expected = f"at most {number(row.limit)}" if row.limit is not None else number(row.expected)
    ratio = f"{row.ratio:.2f}" if row.ratio else ""
    measured = f"{number(row.measured)} {row.unit}" if row.measured is not None else ""
    return [row.part, row.what, measured, spread, expected, ratio, row.status, row.note]


HEADS = ["part", "what", "measured", "spread", "expected", "ratio", "is", ""]


def describe_check(machine, rows, recommended):
    """The whole finding as text: what is there, a table of rows, what is recommended."""
    here = "; ".join(f"{name} {value}" for name, value in machine.items())
    lines = [here, table([cells_of(row) for row in rows], HEADS, "< < > > > > <")]
    if recommended:
        tiny = " (at a test's sizes, which say little)" if machine.get("sizes") == "laptop" else ""
        lines.append(f"recommended{tiny}: " + " ".join(f"--{name} {value}" for name, value in recommended.items()))
    bad = [row for row in rows if row.status in (WRONG, FAILED)]
    counts = {status: sum(row.status == status for row in rows) for status in (OK, WRONG, FAILED, SKIPPED, STOPPED)}
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    lines += [f"  {row.status}: {row.part}, {row.what}: {row.note}" for row in bad]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# For a file that others may read

TOKENS = re.compile(r"\b(?:hf|gh[a-z]|github_pat|sk)[_-]\w{4,}|\b[A-Za-z0-9_-]{32,}\b")
PATHS = re.compile(r"(?:\b[A-Za-z]:)?(?<![\w.<])[~.]{0,2}[/\\][^\s'\",;:()]+|\w+://\S+")


def private_names():
    """What this machine and its user are called, where that is long enough to be a name."""
    names = {socket.gethostname(), platform.node(), socket.gethostname().partition(".")[0]}
    try:
        names.add(getpass.getuser())
    except (OSError, KeyError, ImportError):  # a container whose user has no name
        pass
    return sorted((name for name in names if len(name) > 1), key=len, reverse=True)


def scrub(text):
    """A text in which paths, addresses, tokens, host and user are replaced; at most 300 characters."""
    text = PATHS.sub("<path>", TOKENS.sub("<token>", str(text)))
    for name in private_names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text[:300]


def as_json(machine, rows, recommended, date):
    """The finding as a dict that JSON can hold; date: YYYY-MM-DD."""
    listed = [
        {key: value for key, value in {**row._asdict(), "ratio": row.ratio}.items() if value not in (None, "", {})}
        for row in rows
    ]
    for row in listed:
        row["note"] = scrub(row.get("note", ""))
    return {"format": FORMAT, "date": date, "machine": machine, "rows": listed, "recommended": recommended}


# ----------------------------------------------------------------------------------------------------------------------
# What follows from it


def recommend(rows):
    """{"attn_impl", "device_batch_size"} that are right and fastest here; what was not measured is left out.

    An attention is right if every comparison of it was made and passed. The fastest is that with the shortest time over
    the cases that all right ones were timed in.
    """
    found, seconds = {}, {}
    for row in rows:
        if row.part == "attention" and row.more:
            times = seconds.setdefault(row.more["attn_impl"], {})
            times[row.more.get("case", row.what)] = row.more.get("seconds") if row.status == OK else None
    right = {name: times for name, times in seconds.items() if None not in times.values()}
    if right:
        common = set.intersection(*map(set, right.values()))
        found["attn_impl"] = min(right, key=lambda name: sum(right[name][case] for case in common))
    steps = [row for row in rows if row.part == "step" and row.status == OK and row.measured]
    first = [row for row in steps if row.more["model"] == steps[0].more["model"]]
    if first:
        found["device_batch_size"] = min(first, key=lambda row: row.measured).more["device_batch_size"]
    return found


def name_remedies(rows, recommended):
    """The rows, with --attn_impl in the note of each attention that is wrong or does not compile."""
    works = recommended.get("attn_impl")
    remedy = f"; use --attn_impl {works}" if works else "; no attention that was tried is right"
    bad = lambda row: row.part == "attention" and row.status in (WRONG, FAILED)
    return [row._replace(note=row.note + remedy) if bad(row) else row for row in rows]
