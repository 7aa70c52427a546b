"""A run folder that is open for training: restore, feed, step, save, log, interrupt, close. It knows no model."""

import contextlib
import dataclasses
import json
import math
import time

import jax

from onechip.checkpoints import newest_checkpoint, pack_state, unpack_state, write_checkpoint
from onechip.deadline import Deadline
from onechip.disk import Disk, rescue_folder, rescuing
from onechip.errors import NonFiniteLoss, first_line, say
from onechip.files import read_json_lines
from onechip.hosts import agree, compare_hosts, gathered, host_count, is_first, savers
from onechip.loader import PrefetchDataLoader
from onechip.lock import RunLock
from onechip.machine import deferred_interrupt
from onechip.orders import Orders
from onechip.parts import is_cut, load_onto, share
from onechip.plots import plot_losses, show_picture
from onechip.profile import ProfileWindow
from onechip.result import Result
from onechip.resume import bring_back, choose_checkpoint, compare_with_checkpoint
from onechip.runfolder import ABOUT, METRICS, RunFolder, checkpoint_name
from onechip.runlog import RunLog
from onechip.weights import all_finite
from onechip.writer import CHECKPOINTS, LONG_PAUSE, CheckpointWriter, describe_pause, write_apart


class Session:
    """One run between its steps: the state on the device, the position in the data after it, and their folder.

    State and position change hands together in `advance`, so that whatever is saved belongs together. Leaving the
    `with` block ends every thread; the last checkpoint is then written, and at its mirror if there is one. Of several
    hosts, each calls the same methods in the same order; host 0 writes the files.
    """

    def __init__(
        self, folder, config, origin, *, metric="val_loss", accept=(), lock=None, mirror=None, notes=None, on_log=None,
        hours=0.0, draw=None, traced=0,
    ):  # fmt: skip
        """origin: what the run is made from, as JSON; metric: the score whose lowest value marks the best checkpoint.

        accept: what of the origin may differ from the checkpoint's, and "owner" to take the run from another process;
        lock: the run's RunLock, if the caller holds it already; mirror is a Mirror; notes, JSON, travel in the
        checkpoints; on_log(row) gets every row of metrics.jsonl as a dict; hours: of this process, in which the run
        ends with a checkpoint; 0 for no limit. draw(rows, path, gzip_bpb): writes its picture, loss.png, if
        not plot_losses; traced: steps of the profile, 0 for the usual five.
        """
        self.config, self.folder, self.origin, self.metric = config, RunFolder(folder), origin, metric
        self.accept, self.mirror, self.on_log, self._lock = accept, mirror, on_log, lock
        self._draw, self._traced = draw, {"count": traced} if traced else {}
        self.state, self.position, self.rows = None, None, []
        self.scores, self.samples = {}, []
        self._record = {"best_step": None, "best_score": None, "notes": notes}
        self.disk, self._deadline = Disk(self.folder.path), Deadline(hours)
        self._orders = Orders(self._must_stop, self._is_late)
        self._scored = None, 0  # the last step with a score, and the rows before it
        self._paused = False  # whether a long pause has been reported
        self._mid_step, self._ruined, self._closing = False, False, contextlib.ExitStack()

    # ------------------------------------------------------------------------------------------------------------------
    # Opening and closing

    def __enter__(self):
        with contextlib.ExitStack() as opening:  # a refusal puts the signals back as they were
            self._interrupt = opening.enter_context(deferred_interrupt())
            compare_hosts({**dataclasses.asdict(self.config), **self.origin})
            if self._lock is None:
                self._lock = opening.enter_context(RunLock(self.folder.lock, "owner" in self.accept))
            self._closing = opening.pop_all()
        return self

    def __exit__(self, *exception):
        self._closing.close()  # each of them, whatever another raises

    def restore(self, like):
        """The state of the newest complete checkpoint, or None if there is none.

        like: the state's pytree as jax.ShapeDtypeStruct with shardings. UserError: a checkpoint of another run.
        """
        bring_back(self.folder, self.mirror)
        path = choose_checkpoint(self.folder)
        if path is None:
            return None
        # First: it names the field, not an array's shape.
        compare_with_checkpoint(path, self.config, self.origin, self.accept)
        state, self.position, record = unpack_state(path, like, load_onto)
        # Checkpoints written before 2026-11-21 have the second names.
        score = record.get("best_score", record.get("best_val_bpb"))
        notes = self._record["notes"] or record.get("notes", record.get("remember"))
        self._record = {"best_step": record.get("best_step"), "best_score": score, "notes": notes}
        self.rows = read_json_lines(path / METRICS)
        step = int(state["step"])
        say(f"resuming: {self.folder.path} continues after step {step:,} of {self.config.num_iterations:,}")
        return state

    def begin(self, state, batches, place, *, paces=None, facts=None, files=None):
        """Opens what training needs: log, profile, writer, loader. Nothing of the run is written before this.

        batches(position) yields (batch, position after it); a position's "log", a dict, goes into the evaluations'
        rows. place puts a batch on the device. paces: {shape of a batch's first array: tokens/s at the devices' peak
        FLOP/s, or None}, for MFU; facts: more JSON for config.json; files: {name: bytes} that the run's folder and
        every checkpoint hold.
        """
        config, folder = self.config, self.folder
        self.state, self.step = state, int(state["step"])
        self._first = self._saved_step = self.step
        self._saved_at = time.monotonic()
        about = {"config": dataclasses.asdict(config), **self.origin, **(facts or {})}
        if is_first():
            folder.begin(about, files or {})
        self._files = {**(files or {}), ABOUT: json.dumps(about, indent=2).encode()}
        self._gzip_bpb = about.get("gzip_bits_per_byte")
        if self.mirror:
            self._closing.callback(self.mirror.finish)
        up = {"after": self.mirror.offer, "held": self.mirror.held} if self.mirror else {}
        self._writer = CheckpointWriter(folder.checkpoints, config.keep, disk=self.disk, **up)
        self._closing.callback(self._finish_saving)
        self._paces, self._shape = paces or {}, (config.total_batch_size, config.seq_len)
        pace = math.prod(self._shape), self._paces.get(self._shape)
        logged = {"on_log": self.on_log, "rows": self.rows, "disk": self.disk}
        self.log = RunLog(folder.metrics, config.num_iterations, self.step, *pace, **logged)
        self._closing.callback(self.log.close)
        self._profile = ProfileWindow(folder.profile, config.num_iterations - self.step, **self._traced)
        self._closing.callback(self._profile.close)
        self._loader = PrefetchDataLoader(batches(self.position), place)
        self._closing.callback(self._loader.close)

    # ------------------------------------------------------------------------------------------------------------------
    # Between two steps

    @property
    def is_complete(self):
        """Whether the last step has run."""
        return self.step >= self.config.num_iterations

    def continues(self):
        """Whether there is another step to run: false after the last one, an interrupt, or when the hours are up."""
        return not (self.is_complete or self._orders.stops(self.step))

    def _must_stop(self):
        """Why this process has to stop, in words; empty if it need not."""
        if self._interrupt.requested:
            return "interrupted"
        return self._deadline.describe() if self._deadline.has_come(self.state, self.mirror) else ""

    def _is_late(self):
        """Whether a save is due by the clock, or again after one that failed."""
        if self._writer.failed:
            return not self.disk.waits(CHECKPOINTS)
        return 0 < 60 * self.config.save_minutes < time.monotonic() - self._saved_at

    def due(self, what):
        """Whether "save", "eval" or "sample" is due; the last step's are done after the loop."""
        late = what == "save" and self._orders.saves(self.step)
        every = getattr(self.config, f"{what}_every")
        return late or every > 0 and 0 < self.step < self.config.num_iterations and self.step % every == 0

    def advance(self, train_step):
        """Trains on the next batch: train_step(state, batch) -> (state, metrics)."""
        self._writer.check()
        if self._lock.lost:
            self._lock.check()
        batch, position = next(self._loader)
        shape = jax.tree.leaves(batch)[0].shape
        if shape != self._shape and shape in self._paces:  # another stage
            self._shape = shape
            self.log.set_pace(math.prod(shape), self._paces[shape])
        done = self.step - self._first
        self._mid_step = True  # the old state is donated, the new one and its position are not both here yet
        with self._profile.before(done):
            self.state, metrics = train_step(self.state, batch)
        self.position, self.step, self._mid_step = position, self.step + 1, False
        self._profile.after(done, metrics)
        self.log.add(self.step, metrics)

    def save(self):
        """Hands a checkpoint to the writer's thread, unless this step has one; after a failure once a minute."""
        with self.log.pause():
            if not agree(self._wants_save()):
                return
            self._check_state()
            began = time.monotonic()
            self._writer.save(self.step, share(self._pack(), savers()), self._record["best_step"])
            self._saved_step, self._saved_at = self.step, time.monotonic()
            if self._saved_at - began > LONG_PAUSE and not self._paused:
                self._paused = True
                self.log.say(describe_pause(self._saved_at - began, self.step, self.state))

    def _wants_save(self):
        waits = self._writer.failed and self.continues() and self.disk.waits(CHECKPOINTS)
        return not waits if self._writer.failed else self.step != self._saved_step

    def _check_state(self):
        """Raises UserError for a run that another process has, NonFiniteLoss for a state that is not worth saving."""
        self._lock.check()
        if not all_finite(self.state["params"]):  # finite loss and gradient, but the update overflowed
            raise NonFiniteLoss(f"step {self.step} left parameters that are not finite: lower learning_rate")

    def _pack(self):
        record = {**self._record, "made_from": self.origin}
        # A score of this very step, where its checkpoint failed at first, is made again by who resumes from it.
        text = self.log.text(self._scored[1] if self._scored[0] == self.step else None)
        return {**pack_state(self.state, self.position, record, self.config, text), **self._files}

    def record(self, scores):
        """Logs the scores of an evaluation, {name: number}: the run's metric, which redraws loss.png, or others."""
        self.scores = self.scores | scores
        if self._scored[0] != self.step:
            self._scored = self.step, len(self.log.rows)
        row = {"step": self.step, **scores, **(self.position or {}).get("log", {})}
        if self.metric not in scores:
            self.log.say("step {}: {} {:.4f}".format(self.step, *next(iter(scores.items()))))  # what sums them up
            return self.log.write(row)
        best, score = self._record["best_score"], scores[self.metric]
        if best is None or score < best:
            self._record |= {"best_step": self.step, "best_score": score}
        self.log.show(val=f"{scores['val_bpb']:.3f} bpb" if "val_bpb" in scores else f"{scores['val_loss']:.3f}")
        self.log.write(row)
        drawn = self._draw or plot_losses, self.log.rows, self.folder.picture, self._gzip_bpb
        if is_first() and self.disk.attempt(self.folder.picture.name, *drawn):
            show_picture(self.folder.picture)

    def show(self, samples):
        """Prints samples, (prompt, continuation) each, above the progress bar."""
        self.samples = samples
        for prompt, text in samples:
            self.log.say(f"step {self.step}: {prompt!r} -> {text!r}")

    # ------------------------------------------------------------------------------------------------------------------
    # Ends

    def result(self):
        """What the run has reached, as a Result."""
        params, scores = gathered(self.state["params"]), [self.scores.get(name) for name in ("val_loss", "val_bpb")]
        return Result(params, self.step, *scores, self._gzip_bpb, self.samples, self.folder.path)

    @contextlib.contextmanager
    def saving(self):
        """Saves what was reached when training is interrupted, or when something between two steps raises an error.

        A second interrupt, and one in the middle of a step, is raised: there is nothing consistent to save then. A
        state with a non-finite loss is written separately.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self._interrupt.insisted or self._mid_step or host_count() > 1:
                raise
            self.save()
        except NonFiniteLoss as error:
            self._ruined = True
            kept = None
            self._save_apart()
            with contextlib.suppress(OSError):  # a disk that is away must not hide the loss
                kept = newest_checkpoint(self.folder.checkpoints)
            where = f"the last good checkpoint is {kept.name}" if kept else "there is no checkpoint yet"
            raise NonFiniteLoss(f"{error}; {where}") from None
        except Exception:
            if not self._mid_step and host_count() == 1:  # the others may be elsewhere
                self._save_in_spite()
            raise
        if not self.is_complete:
            self.log.say(f"{self._orders.describe()} after step {self.step:,}; the same command resumes from there")

    def _save_apart(self):
        """Writes the state as nonfinite_NNNNNNNN, to be looked into; nothing resumes from it."""
        self._writer.wait()
        write_apart(self.folder.nonfinite(self.step), share(self._pack(), savers()), self.disk)

    def _save_in_spite(self):
        """Saves what was reached before an error is raised, which nothing here may replace."""
        self.log.on_log = None  # it may be what has raised
        try:
            self.save()
        except Exception as error:
            self._ruined = True
            self.log.say(f"checkpoint: none of step {self.step:,}: {first_line(error)}")

    def _finish_saving(self):
        """Waits for the last checkpoint, and writes it to this machine's own disk if the run's does not take it."""
        self._writer.wait()
        if not self._writer.failed or self._mid_step or self._ruined or self._interrupt.insisted:
            return
        if host_count() == 1:
            self._check_state()
        elif not is_first() or any(map(is_cut, jax.tree.leaves(self.state))):  # no disk but the shared one has all
            return
        path = rescue_folder(self.folder.path) / checkpoint_name(self.step)
        with rescuing(path):
            if not path.exists():
                write_checkpoint(path, self._pack())
        say(f"checkpoint: rescued to {path}; the same command brings it back when {self.folder.path} can be written to")
        if self.mirror:
            self.mirror.offer(path)
