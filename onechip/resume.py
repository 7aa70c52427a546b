"""What a run is resumed from: its checkpoints here and on the Hub, and what of it may have changed since."""

import dataclasses
from pathlib import Path

import jax

from onechip.checkpoints import clear_leftovers, newest_checkpoint
from onechip.disk import bring_back_rescued
from onechip.errors import require, say
from onechip.files import read_json
from onechip.hosts import agree, first_alone, is_first
from onechip.machine import git_commit
from onechip.runfolder import CONFIG, STATE, TOKENIZER
from onechip.settings import fixed_fields


def describe_machine(mesh):
    """What runs a training, for config.json: nothing secret, nothing of the user's machine but its device."""
    device = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return {"commit": git_commit(), "jax": jax.__version__, "device": device}


def read_origin(path):
    """What the run of a checkpoint was made from, a dict; empty in a checkpoint that does not say."""
    origin = read_json(Path(path) / STATE).get("made_from")
    return origin if isinstance(origin, dict) else {}


KEPT_ORIGIN = ("model", "optimizer", "tokenizer_sha256", "data")  # what a run keeps besides its fixed fields
UNNAMED = ("model", "optimizer")  # in checkpoints written before 2026-11-21


def compare_with_checkpoint(path, config, origin, accept=()):
    """Prints what has changed since the checkpoint was written; UserError for what may not change.

    origin: what else the run depends on, a dict that JSON can hold: model, optimizer, data, tokenizer, commit,
    versions, device. accept: names in it that may change although a run keeps them.
    """
    was = read_origin(path)
    changed = [name for name, value in origin.items() if value != was.get(name)]
    changed = [name for name in changed if name in was or name not in UNNAMED]
    for name in changed:  # first: another model has other settings as well
        way_out = " or set --other_data true" if name == "data" else ""
        remedy = f"{path} was trained with {was.get(name)!r}; use that, give the new run another name{way_out}"
        require(name in accept or may_change(name, was.get(name), origin[name]), name, origin[name], remedy)
    now = dataclasses.asdict(config)
    # A field that is younger than the checkpoint has a default that does what was done before it.
    before = {field.name: field.default for field in dataclasses.fields(config)} | read_json(Path(path) / CONFIG)
    fixed = fixed_fields(config)
    for name in (name for name in now if now[name] != before[name]):
        remedy = f"{path} was trained with {before[name]!r}; set that, or give the new run another name"
        require(name not in fixed, name, now[name], remedy)
        say(f"changed: {name} is {now[name]!r}, was {before[name]!r} up to here")
    for name in changed:
        say(f"changed: {name} is {origin[name]}, was {was.get(name)} up to here")


def may_change(name, before, now):
    """Whether a run may resume with another value of this part of its origin; more shards are no other text."""
    if name == "data" and isinstance(before, dict) and isinstance(now, dict):
        return {**before, "shards": None} == {**now, "shards": None}
    return name not in KEPT_ORIGIN or before is None


def bring_back(folder, mirror=None):
    """Sweeps what a killed process left in a RunFolder, and brings newer checkpoints to it: rescued ones, the Hub's.

    UserError if something else is in the place of one of its files or folders.

    Once in the life of a mirror: after that a checkpoint may wait there for its upload. Hold the run's lock. The other
    hosts wait while host 0 does it.
    """
    with first_alone() as first:
        if first:
            _bring_back(folder, mirror)


def _bring_back(folder, mirror):
    folder.check()
    if mirror is None or not mirror.restored:
        for place in (folder.path, folder.model, folder.checkpoints):
            clear_leftovers(place)
        bring_back_rescued(folder)
    if mirror:
        mirror.restore(folder.checkpoints)


def choose_checkpoint(folder):
    """The newest complete checkpoint of a RunFolder, on all hosts the one that host 0 finds; None if there is none."""
    path = newest_checkpoint(folder.checkpoints) if is_first() else None
    name = agree(path and path.name)
    if name is None or is_first():
        return path
    path = folder.checkpoints / name
    require(path.is_dir(), "out", str(path), "host 0 resumes from it: --out must be a folder that all hosts share")
    return path


def find_tokenizer(folder):
    """The tokenizer file that the run in a RunFolder keeps, or None."""
    newest = newest_checkpoint(folder.checkpoints, set_aside=is_first())
    places = ([newest / TOKENIZER] if newest else []) + [folder.tokenizer]
    return next((path for path in places if path.exists()), None)


def find_data(folder):
    """{"name", "revision", ...} of the data that the run in a RunFolder began with; empty if it has not begun."""
    newest = newest_checkpoint(folder.checkpoints, set_aside=is_first())
    data = read_origin(newest).get("data") if newest else None
    return data if isinstance(data, dict) else {}
