"""An evaluation as a file, eval.json, read back with every field checked."""

import math
import re

import numpy as np

from onechip.errors import UserError, require
from onechip.files import read_json, write_json
from onechip.questions import Outcome
from onechip.verdicts import Evaluation

EVAL_FORMAT = 1  # of eval.json: raise it when an older reader would misread the file


def save_evaluation(path, evaluation):
    """Writes an Evaluation as JSON, completely or not at all; verdicts are a string of 0 and 1 for each task."""
    fields = evaluation._asdict()
    tasks = [
        {**outcome._asdict(), "correct": "".join(str(int(right)) for right in outcome.correct)}
        for outcome in fields.pop("outcomes")
    ]
    write_json(path, {"format": EVAL_FORMAT, **fields, "tasks": tasks})


def load_evaluation(path):
    """The Evaluation in a file that save_evaluation wrote; UserError names the file and what is wrong in it."""
    fields = read_json(path)
    form = fields.pop("format", None)
    if form != EVAL_FORMAT:
        raise UserError(
            f"{path}: format={form!r}: this version reads {EVAL_FORMAT}; evaluate again, or use a newer onechip"
        )
    tasks = _take(fields, "tasks", list, path)
    known = {name: _take(fields, name, kind, path) for name, kind in FIELDS.items()}
    if fields:
        raise UserError(f"{path}: has the field {sorted(fields)[0]!r}, which no evaluation has")
    for name in ("limits", "scores"):
        for key, value in known[name].items():
            _check(_is_number(value), path, f"{name}.{key}", value, "must be a number")
    outcomes = [_read_task(task, f"{path}, task {i}") for i, task in enumerate(tasks, 1)]
    labels = [outcome.label for outcome in outcomes]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    _check(not twice, path, "tasks", ", ".join(twice), "each must be there once")
    _check(len(labels) <= known["size"], path, "size", known["size"], f"there are {len(labels)} tasks here")
    return Evaluation(**known, outcomes=outcomes)


FIELDS = {
    "suite": str, "size": int, "bundle": str, "model": str, "step": int, "source": str, "limits": dict, "scores": dict,
}  # fmt: skip


def _read_task(task, place):
    """An Outcome from its JSON object; UserError names the place."""
    _check(isinstance(task, dict), place, "task", task, "must be an object in braces")
    task = dict(task)
    label, verdicts = _take(task, "label", str, place), _take(task, "correct", str, place)
    total = _take(task, "total", int, place)
    baseline, ceiling = (_take(task, name, (int, float), place) for name in ("baseline", "ceiling"))
    _check(re.fullmatch("[0-1]+", verdicts), place, "correct", verdicts, "must be one 0 or 1 for each example")
    _check(total >= len(verdicts), place, "total", total, f"there are {len(verdicts)} verdicts here")
    _check(0 <= baseline < 1, place, "baseline", baseline, "must be in [0, 1)")
    _check(baseline < ceiling <= 1, place, "ceiling", ceiling, f"must be above the baseline {baseline:g}, at most 1")
    correct = np.frombuffer(verdicts.encode(), np.uint8) == ord("1")
    return Outcome(label, correct, total, float(baseline), float(ceiling))


def _take(fields, name, kind, place):
    """Removes and returns a field of a JSON object; UserError if it is missing or of another kind."""
    if name not in fields:
        raise UserError(f"{place}: has no field {name!r}: not an evaluation, or damaged; evaluate again")
    value = fields.pop(name)
    fits = _is_number(value) and isinstance(value, kind) if kind in (int, (int, float)) else isinstance(value, kind)
    _check(fits, place, name, value, f"must be {KIND_NAMES[kind]}")
    return value


KIND_NAMES = {str: "a string", int: "an integer", (int, float): "a number", dict: "an object in braces", list: "a list"}


def _is_number(value):
    return isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and math.isfinite(value)


def _check(holds, place, field, value, remedy):
    """As `require`, with the file's name in front."""
    require(holds, f"{place}: {field}", value, remedy)
