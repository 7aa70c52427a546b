"""A run's folder: the name of every file and folder that a run leaves behind, in one place."""

import os
import re
from pathlib import Path

from onechip.errors import require
from onechip.files import atomic_write, read_json, read_json_or_none, write_json

CONFIG = "config.json"  # in a run: settings and origin; in a checkpoint: the settings alone
METRICS = "metrics.jsonl"
TOKENIZER = "tokenizer.json"  # of a run and of its checkpoints, which keep the one that they began with
ABOUT = "onechip.json"  # what a run's config.json says, in a checkpoint and in an export for another library

# The other files of a checkpoint.
PARAMS, OPT, STREAM = "params.safetensors", "opt.safetensors", "stream.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"


def checkpoint_name(step):
    """The name of a step's checkpoint folder: step_00000123."""
    return f"step_{step:08d}"


def find_checkpoints(folder):
    """{step: path} of the checkpoints in a folder, oldest first. Any other name is a person's, and not ours to touch.

    A link to a folder is found, too: it can be read, but it is not ours to rename or delete.
    """
    found = {}
    for path in Path(folder).glob("step_*"):
        digits = path.name.removeprefix("step_")
        if re.fullmatch("[0-9]{8,}", digits) and path.name == checkpoint_name(int(digits)) and path.is_dir():
            found[int(digits)] = path
    return dict(sorted(found.items()))


def newest_run(out, wanted=lambda about: True):
    """The folder, as text, of the run whose checkpoint is the newest in the folder `out`; None if no run has one.

    wanted(its config.json as a dict) -> whether it is one of those to choose from.
    """
    found = []
    for run in map(RunFolder, Path(out).glob("*")):
        steps = find_checkpoints(run.checkpoints)
        if steps and wanted(read_json_or_none(run.config) or {}):
            found.append((max(path.stat().st_mtime for path in steps.values()), str(run.path)))
    return max(found)[1] if found else None


class RunFolder:
    """The folder of one run. Nothing is created by naming it."""

    def __init__(self, path):
        self.path = Path(path)

    @property
    def config(self):
        """Settings, model, commit, versions, device, data and tokenizer."""
        return self.path / CONFIG

    @property
    def metrics(self):
        """One JSON object a line: a step's loss and speed, or an evaluation's scores."""
        return self.path / METRICS

    @property
    def tokenizer(self):
        """The tokenizer that the run began with."""
        return self.path / TOKENIZER

    @property
    def lock(self):
        """Says which process has the run."""
        return self.path / ".owner.json"

    @property
    def picture(self):
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def profile(self):
        """The folder of the trace."""
        return self.path / "profile"

    @property
    def checkpoints(self):
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self):
        """The folder of the exported model."""
        return self.path / "model"

    def check(self):
        """UserError, one line, for a folder where a run has a file, or a file where it has a folder."""
        for path in (self.config, self.metrics, self.tokenizer, self.picture):
            require(
                not path.is_dir(), "run", str(path), "is a folder, and a run writes a file there: move it elsewhere"
            )
        for path in (self.profile, self.checkpoints, self.model):
            free = path.is_dir() or not os.path.lexists(path)
            require(free, "run", str(path), "is not a folder, and a run keeps one there: move it elsewhere")

    def checkpoint(self, step):
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / checkpoint_name(step)

    def nonfinite(self, step):
        """The folder for the state of a step whose loss is not finite; no run resumes from it."""
        return self.checkpoints / f"nonfinite_{step:08d}"

    def begin(self, about, files):
        """Writes config.json and the files {name: bytes} that a run keeps."""
        write_json(self.config, about)
        for name, content in files.items():
            with atomic_write(self.path / name) as part:
                part.write_bytes(content)

    def read_config(self):
        """config.json as a dict; UserError, one line, if there is none that can be read."""
        return read_json(self.config)
