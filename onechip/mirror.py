"""A run's second home: its checkpoints go up to a place in the background, and come back from it."""

import concurrent.futures
import math
import os
import shutil
import threading
import time
from pathlib import Path

from onechip.checkpoints import find_damage, newest_checkpoint
from onechip.errors import UserError, say
from onechip.hub import HubPlace, choose_repo, find_user
from onechip.hubclient import connect, describe_error
from onechip.objects import ObjectPlace
from onechip.uploads import Pace, UploadReport


class Mirror:
    """A place where a run's checkpoints go in a thread of their own, and from where they come back.

    Whole checkpoints go up so often that at most `state_minutes` of work are not there, if uploads are quick enough,
    weights every `weights_minutes`, the last checkpoint in any case. They are read from their own folder, which has to
    stay while it is among those of `held()`. Training never waits for an upload and never ends because of one: a
    failure is reported when it happens and by `finish`.

    A place has a name and a secret (None, or what no line may show), and three methods, which raise UserError if they
    fail: upload(folder of a checkpoint, whole), list() -> names of whole checkpoints, and download(name, folder) ->
    the checkpoint's folder in it. What was uploaded whole replaces older ones there.
    """

    def __init__(self, place, weights_minutes=15.0, state_minutes=65.0, repo=""):
        """repo: the Hub repository that the exported model goes to, if any."""
        self.place, self.repo = place, repo
        self._pace = Pace(60 * weights_minutes, 60 * state_minutes)
        self._newest = None  # the checkpoint that was offered last
        self._uploading = None
        self._whole = None  # the one that went up whole last
        self.restored = False  # whether `restore` has looked at the place
        self._report = UploadReport(place.name, place.secret)
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "mirror")

    @property
    def seconds(self):
        """What the last upload of a whole checkpoint took; 0 before there was one."""
        return self._pace.upload

    def held(self):
        """The paths of the checkpoints that an upload needs, or may still need."""
        with self._lock:
            return {self._newest, self._uploading} - {None}

    def offer(self, path):
        """Takes a complete checkpoint; uploads it if that is due and it is still the newest when its turn comes."""
        offered = self._pace.note_offer()
        with self._lock:
            self._newest = path
        self._pool.submit(self._upload_if_due, path, offered)

    def _upload_if_due(self, path, offered):
        weights_due, state_due = self._pace.due()
        if path == self._newest and (weights_due or state_due):
            self._upload(path, offered, whole=state_due)

    def _upload(self, path, offered, whole):
        with self._lock:
            if path != self._newest or path == self._whole:  # it may be gone, or there
                return
            self._uploading = path
        try:
            began = time.monotonic()
            self.place.upload(path, whole)
            self._report.worked(path.name)
            if late := self._pace.note_upload(offered, began, whole):
                self._report.warn(late)
            if whole:
                self._whole = path
        except Exception as error:  # an upload that fails must not stop training
            self._report.failed(path.name, error, describe_error(error, self.place.secret))
            self._pace.note_failure()  # the next one is due at once
        finally:
            with self._lock:
                self._uploading = None

    def finish(self):
        """Uploads the newest checkpoint whole, unless that is done, waits, sums up failures and ends the thread."""
        if self._newest and self._newest != self._whole:
            self._pool.submit(self._upload, self._newest, time.monotonic(), whole=True)
        self._pool.shutdown(wait=True)
        self._report.sum_up()

    def restore(self, folder):
        """Brings the place's newest whole checkpoint to `folder`, if it is newer than the newest one there.

        If the one in `folder` is newer, it is offered. UserError if the place cannot be reached and `folder` has none.
        Only the first call looks.
        """
        if self.restored:
            return
        here = newest_checkpoint(folder)
        try:
            names = self.place.list()
        except UserError as error:
            if here is None:  # a fresh start might lose a run
                raise
            self.restored = True
            say(f"checkpoint: resuming from {here} without a look at {self.place.name}: {error}")
            return
        self.restored = True
        for name in sorted(names, reverse=True):
            if here and name <= here.name:
                break
            if self._download(name, Path(folder)):
                say(f"checkpoint: {name} came from {self.place.name}")
                return
        if here and here.name not in names:
            self.offer(here)

    def _download(self, name, folder):
        """Whether a checkpoint of the place arrived in `folder`, undamaged."""
        part = folder / f".{name}.download"
        for _ in range(2):  # a bit may flip on the way: a checkpoint is given up after the second time
            arrived = self.place.download(name, part)
            damage = find_damage(arrived)
            if damage is None:
                os.replace(arrived, folder / name)
            shutil.rmtree(part, ignore_errors=True)
            if damage is None:
                return True
        say(f"checkpoint: {name} on {self.place.name} is damaged: {damage}; looking for an older one")
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Which one a run has


def open_mirror(run, token):
    """The Mirror of a Run: in the folder that --mirror names, otherwise on the Hub if there is a token; or None.

    UserError for a folder that cannot be. Training does not need the Hub: whatever is wrong with that, with the token
    or with a name, is a line, and nothing is raised.
    """
    here = f"checkpoints: in {run.out}/{run.name}/checkpoints and, in the background,"
    if run.mirror:
        place = open_place(run)
        rest = "; the Hub gets only the exported model" if token else ""
        say(f"{here} in {place.name}{rest}")
        # Whole ones only: of a checkpoint that is not there whole nothing could be resumed.
        return Mirror(place, math.inf, min(run.weights_minutes, run.state_minutes), find_repo(run, token))
    repo = find_repo(run, token, "upload: checkpoints stay here")
    if not repo:
        return None
    say(f"{here} on {repo}")
    return Mirror(HubPlace(token, repo), run.weights_minutes, run.state_minutes, repo)


def check_mirror(run):
    """UserError, one line, for a --mirror that can never be written to, before anything that takes long."""
    if run.mirror and not run.preflight:
        open_place(run)


def open_place(run):
    """The ObjectPlace of a Run with --mirror, looked at: UserError if it can never be written to."""
    place = ObjectPlace(f"{run.mirror.rstrip('/')}/{run.name}")
    place.check()
    return place


def find_repo(run, token, refusal=""):
    """The Hub repository of a Run; "" without a token that the Hub takes, with a line that begins with `refusal`."""
    if not token:
        return ""
    try:
        user = find_user(connect(token), token)  # also where the repository is named: a token that expired is found now
        return choose_repo(run.hub_repo, f"onechip-{run.name}", lambda: user)
    except Exception as error:
        if refusal:
            say(f"{refusal}: {describe_error(error, token)}")
        return ""
