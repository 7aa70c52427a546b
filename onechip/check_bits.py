"""Is training the same to the last bit, twice in a row and through a checkpoint?"""

import functools
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import jax

from onechip.check_report import FAILED, OK, WRONG, Row
from onechip.check_time import Check, Training, first_subject
from onechip.checkpoints import name_leaves, pack_state, unpack_state, write_checkpoint
from onechip.errors import UserError, first_line
from onechip.parts import load_onto
from onechip.statefile import fetch

CHILD_SECONDS = 300  # that a new process may take


def digest(state):
    """SHA-256, hex, of every bit of a state."""
    found = hashlib.sha256()
    for name, array in sorted(name_leaves(state).items()):
        found.update(name.encode())
        found.update(fetch(array).tobytes())
    return found.hexdigest()


def train_for(training, steps):
    """Runs that many steps; returns the digest of the state."""
    for _ in range(steps):
        training()
    return digest(training.state)


def compare_digests(what, found, wanted, note=""):
    """The Row of two digests."""
    status = OK if found == wanted else WRONG
    return Row("bits", what, status, note=note if status == OK else "parameters or moments differ")


class Runs:
    """20 steps from step 0, trained once and asked for by several comparisons."""

    def __init__(self, context):
        self._context = context

    @functools.cached_property
    def whole(self):
        """The digest after all steps."""
        return train_for(Training(self._context, *first_subject(self._context)), self._context.sizes.steps)

    def again(self):
        """The Row of a second run of the same steps."""
        steps, first = self._context.sizes.steps, self.whole
        second = train_for(Training(self._context, *first_subject(self._context)), steps)
        return compare_digests(f"{steps} steps, twice", second, first)

    def resumed(self):
        """The Row of half the steps, a checkpoint, and the other half: in a new process where one can have the device.

        One process owns a TPU: there it is this one.
        """
        half, context = self._context.sizes.steps // 2, self._context
        what, wanted = f"{half} + {half} steps through a checkpoint", self.whole
        with tempfile.TemporaryDirectory(prefix="onechip-check-") as folder:
            path = Path(folder) / "half"
            training = Training(context, *first_subject(context))
            train_for(training, half)
            write_checkpoint(path, pack_state(training.state, {}, {}, training.config))
            attention, training.state = training.config.attn_impl, None  # two states need not fit
            if context.device.platform == "tpu" or not context.given.child:
                return compare_digests(what, resume(context, path), wanted, "in this process")
            try:
                found = run_child(context, path, attention)
            except UserError as error:
                return Row("bits", what, FAILED, note=f"the new process: {error}")
            return compare_digests(what, found, wanted, "in a new process")


def resume(context, path):
    """The digest after the second half of the steps, from the checkpoint of the first half."""
    training = Training(context, *first_subject(context))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), training.state)
    training.state = None
    training.state = unpack_state(path, shapes, load_onto)[0]
    return train_for(training, context.sizes.steps // 2)


def run_child(context, path, attention):
    """The digest that a new process gets from a checkpoint; UserError with its last line if it gets none."""
    kept = jax.config.jax_compilation_cache_dir
    # On a GPU this process has taken most of the memory already.
    more = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"} | ({"JAX_COMPILATION_CACHE_DIR": kept} if kept else {})
    command = [*context.given.child, str(path), attention]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | more, timeout=CHILD_SECONDS)
        return json.loads(done.stdout.strip().splitlines()[-1])["digest"]
    except subprocess.TimeoutExpired:
        raise UserError(f"has not finished within {CHILD_SECONDS} s") from None
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        last = done.stderr.strip().splitlines()[-1:] if not isinstance(error, OSError) else [first_line(error)]
        raise UserError(last[0] if last else "ended without a word") from None


def bit_checks(context):
    """Checks for two runs and for one through a checkpoint."""
    runs = Runs(context)
    return [Check("twice", runs.again), Check("through a checkpoint", runs.resumed)]
