"""A check of the chip that is attached: is what it computes right, how fast is it, is it the same to the last bit?

What is checked comes from a notebook, as a Given; what is found is a table for people and chip_check.json. Parts run in
turn. One that fails is a row, one that does not fit the time is a row, and an interrupt leaves what is done.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from onechip.check_bits import bit_checks, resume
from onechip.check_compare import PIECES, attention_checks, piece_checks
from onechip.check_report import (
    FAILED,
    OK,
    SKIPPED,
    STOPPED,
    Row,
    as_json,
    describe_check,
    name_remedies,
    recommend,
    scrub,
)
from onechip.check_sizes import Sizes
from onechip.check_time import machine_checks, step_checks, training_checks
from onechip.chips import GIB, memory_limit
from onechip.errors import SafeStream, UserError, first_line, require, say
from onechip.files import write_json
from onechip.machine import deferred_interrupt, home, is_interrupted


class Subject(NamedTuple):
    """A model, the Optimizer that trains it, and the Config that it is timed with."""

    model: object
    optimizer: object
    config: object


class Given(NamedTuple):
    """What a notebook hands over: its functions, by the names that they have there.

    attentions: {name: function}; reference: the one to hold them to, in float32; rope(T, H) -> cosines, signed sines;
    subjects: {name: Subject}, of which the first is trained; batches(config): yields (batch, position); pieces: what is
    compared besides attention; orthogonalize: Muon's, or None; child: words of a command that resumes a checkpoint,
    whose path is added.
    """

    attentions: dict
    reference: Callable
    rope: Callable
    subjects: dict
    batches: Callable
    make_mesh: Callable
    workload: Callable
    init_state: Callable
    sharding_of: Callable
    make_sampler: Callable
    flops_per_token: Callable
    orthogonalize: Callable | None = None
    pieces: dict = PIECES
    child: tuple = ()


@dataclasses.dataclass
class Context:
    """What all parts of one check share. programs: training steps that are compiled; rows: found so far."""

    given: Given
    sizes: Sizes
    rows: list = dataclasses.field(default_factory=list)
    programs: dict = dataclasses.field(default_factory=dict)
    chosen: str = ""

    def __post_init__(self):
        self.mesh = self.given.make_mesh()
        self.device = self.mesh.devices.flat[0]

    def attention(self, own):
        """The attention to train with: a config's own, unless it was found wrong here; then the fastest right one."""
        tried = [row for row in self.rows if row.part == "attention" and row.more.get("attn_impl") == own]
        if self.chosen or all(row.status not in ("wrong", FAILED) for row in tried):
            return self.chosen or own
        return recommend(self.rows).get("attn_impl", own)


PARTS = ("machine", "attention", "pieces", "step", "loader", "checkpoint", "writing", "bits")


def choose_parts_of(only):
    """The names of parts in a text, "attention,step", in their order; all if it is empty. UserError for another."""
    names = only.replace(",", " ").split()
    for name in names:
        require(name in PARTS, "only", name, f"use any of {', '.join(PARTS)}")
    return [part for part in PARTS if part in names or not names]


def checks_of(context, part):
    """The Checks of a part; those of steps are asked for late, when it is known which attention is right."""
    simple = {
        "machine": machine_checks, "attention": attention_checks, "pieces": piece_checks, "step": step_checks,
        "bits": bit_checks,
    }  # fmt: skip
    return list(simple[part](context) if part in simple else training_checks(context)[part])


# ----------------------------------------------------------------------------------------------------------------------
# What is there


def version_of(package):
    """The version of a package; "none" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe_here(context):
    """What is attached and installed: {what: text or number}; no path and no name of the machine or its user."""
    device, limit = context.device, memory_limit(context.device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device.device_kind, "platform": device.platform, "count": context.mesh.size,
        "usable GiB": round(limit / GIB, 2) if limit else "unknown",
        "jax": jax.__version__, "jaxlib": version_of("jaxlib"), "libtpu": version_of("libtpu"),
        "python": platform.python_version(), "host cores": os.cpu_count(), "host memory GiB": round(memory / GIB, 1),
        "disk free GiB": round(shutil.disk_usage(".").free / GIB, 1), "sizes": context.sizes.preset,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Running


def kept_marker(context):
    """The file that says that a check like this one has left its compiled programs on this machine."""
    kind = "".join(letter if letter.isalnum() else "-" for letter in context.device.device_kind)
    return home() / f"chip_check-{kind}-{jax.__version__}"


def progress(text, end="\n"):
    """Prints a part of a line at once."""
    stream = SafeStream(sys.stdout)
    stream.write(text + end)
    stream.flush()


def run_check(context, part, check, start):
    """Appends the Rows of a Check to those found; any error but an interrupt is a Row."""
    began = time.perf_counter()
    try:
        progress(f"[{began - start:4.0f} s] {part}: {check.what} ... ", end="")
        if is_interrupted():  # the check before has swallowed it, as code that is called back from C++ does
            raise KeyboardInterrupt
        found = check.run()
        rows = [found] if isinstance(found, Row) else found
    except BaseException as error:
        if is_interrupted() or not isinstance(error, Exception):
            context.rows.append(Row(part, check.what, STOPPED, more=dict(check.about)))
            progress("interrupted")
            raise KeyboardInterrupt from None
        rows = [Row(part, check.what, FAILED, note=scrub(first_line(error)), more=dict(check.about))]
    context.rows += rows
    bad = next((row.status for row in rows if row.status != OK), OK)
    progress(f"{bad}, {time.perf_counter() - began:.1f} s")


def run_parts(context, parts, budget, clock, after):
    """Runs all checks of some parts while there is time; after(): called when something has been found."""
    began, start = clock(), time.perf_counter()
    for part in parts:
        try:
            checks = checks_of(context, part)
        except Exception as error:
            context.rows.append(Row(part, "all", FAILED, note=scrub(first_line(error))))
            continue
        for check in checks:
            if clock() - began >= budget:
                note = f"{budget:.0f} s are over: --only {part}, or --all"
                context.rows.append(Row(part, check.what, SKIPPED, note=note, more=dict(check.about)))
                continue
            run_check(context, part, check, start)
            after()


def check_chip(given, sizes, only="", out="chip_check.json", clock=time.monotonic):
    """Checks the device that is attached, prints a table, and leaves it as JSON in `out`; returns that as a dict.

    only: names of parts, all if empty. KeyboardInterrupt, SIGTERM too: what is done is printed and left, and returned.
    """
    parts, context = choose_parts_of(only), Context(given, sizes)
    machine, marker = describe_here(context), kept_marker(context)
    budget, out = sizes.budget[0 if marker.exists() else 1], Path(out)
    say(f"chip_check: {machine['count']} x {machine['device']}, {', '.join(parts)}; Ctrl-C leaves what is done")

    def finding():
        recommended = recommend(context.rows)
        return machine, name_remedies(context.rows, recommended), recommended

    def leave():
        found = as_json(*finding(), datetime.date.today().isoformat())
        try:
            write_json(out, found)
        except OSError as error:
            raise UserError(f"out={str(out)!r}: cannot be written ({error.strerror}); choose another --out") from None
        return found

    leave()  # where that cannot be, five minutes are saved
    with deferred_interrupt():  # an interrupt while the table is printed changes nothing; a second one ends it
        try:
            with deferred_interrupt(raise_at_once=True):
                run_parts(context, parts, budget, clock, leave)
        except KeyboardInterrupt:
            if all(row.status != STOPPED for row in context.rows):  # it came between two of them
                context.rows.append(Row("all", "what follows", STOPPED))
        if parts == list(PARTS) and not any(row.status in (SKIPPED, STOPPED) for row in context.rows):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        found = leave()
        say(describe_check(*finding()))
    say(f"left in {out}: nothing in it is private; docs/chips/README.md says how to contribute it")
    return found


def resume_in_child(given, sizes, path, attention=""):
    """What a new process does for the part `bits`: trains on from a checkpoint and prints the state's digest."""
    context = Context(given, sizes, chosen=attention)
    print(json.dumps({"digest": resume(context, Path(path))}), flush=True)
