"""The Hugging Face Hub: repository names, uploads, and a repository as a run's second home."""

import concurrent.futures
import hashlib
import os
import re
import shutil
import threading
import time
from pathlib import Path

from onechip.checkpoints import MANIFEST, find_damage, newest_checkpoint
from onechip.errors import UserError, require, say
from onechip.hubclient import connect, describe_error, load_hub, try_again, without_bars
from onechip.runfolder import ABOUT, CONFIG, METRICS, PARAMS, TOKENIZER
from onechip.uploads import Pace, UploadReport


def is_repo_name(name):
    """Whether the Hub takes a name: 96 of A-Z a-z 0-9 _ - . at most, with no "--", ".." or outer "-" and "."."""
    form = re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?", name)
    return bool(form) and not re.search(r"--|\.\.|\.git$", name)


def repo_name(name):
    """A run's name as the Hub takes it. One that has to change ends in a hash: no two may share a repository."""
    if is_repo_name(name):
        return name
    words = "-".join(re.findall(r"[A-Za-z0-9_]+", name))
    return f"{words[:80].rstrip('-')}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:6]}"


def choose_repo(hub_repo, name, ask_user):
    """`hub_repo`, or a valid form of `name` where that is empty; of the account ask_user() where no owner is named.

    UserError for a hub_repo that the Hub does not take.
    """
    *owner, repo = hub_repo.split("/") if hub_repo else [repo_name(name)]
    valid = len(owner) < 2 and all(map(is_repo_name, [*owner, repo]))
    require(valid, "hub_repo", hub_repo, "must be owner/name, each of letters, digits and single - _ . inside")
    return f"{owner[0] if owner else ask_user()}/{repo}"


def find_user(api, token):
    """The name of the account that a token belongs to; UserError if the Hub does not take it."""
    return try_again(api.whoami, "the Hub did not confirm HF_TOKEN", "check the network", token)["name"]


def upload_folder(folder: Path, files: list[str], token: str | None, hub_repo: str = "", name: str = "") -> str | None:
    """One commit with `files` of `folder` to `hub_repo` (default: <you>/<name>), which is private if it is new.

    Returns the commit's address, or None with a line that says why nothing was uploaded: no token, or a refusal.
    """
    if not token:
        say(f"upload: none, as there is no HF_TOKEN in the environment or in Colab's secrets; all is in {folder}")
        return None

    def commit():
        api.create_repo(repo, private=True, exist_ok=True)
        message = f"Upload {', '.join(files)}"
        return api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message=message)

    try:
        api = connect(token)
        repo = choose_repo(hub_repo, name, lambda: find_user(api, token))
        address = try_again(commit, f"the Hub refused {repo}", "check the network", token).commit_url
    except Exception as error:  # what was trained is on disk: a refusal must not end the run
        say(f"upload: none, as {describe_error(error, token)}; all is in {folder}")
        return None
    say(f"upload: {', '.join(files)} to {address}")
    return address


OPENED = (PARAMS, CONFIG, METRICS, TOKENIZER, ABOUT)  # what of a checkpoint opens as a model, and shows how it learned


class HubMirror:
    """A Hub repository as a run's second home: checkpoints go up in a thread, one commit each, and come back from it.

    Whole checkpoints go up so often that at most `state_minutes` of work are not there, if uploads are quick enough,
    weights every `weights_minutes`, the last checkpoint in any case. They are read from their own folder, which has to
    stay while it is among those of `held()`. Training never waits for an upload and never ends because of one: a
    failure is reported when it happens and by `finish`.
    """

    def __init__(self, token, repo, weights_minutes=15.0, state_minutes=65.0):
        self._api, self._token, self.repo = connect(token), token, repo
        self._pace = Pace(60 * weights_minutes, 60 * state_minutes)
        self._newest = None  # the checkpoint that was offered last
        self._uploading = None
        self._whole = None  # the one that went up whole last
        self._exists = False  # whether the repository is known to exist
        self.restored = False  # whether `restore` has looked at the Hub
        self._report = UploadReport(repo, token)
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "hub")

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
            what = f"{path.name}: cannot be uploaded to {self.repo}"
            remedy = "training continues and tries it with the next checkpoint"
            began = time.monotonic()
            with without_bars():  # training shows its own
                try_again(lambda: self._commit(path, whole), what, remedy, self._token)
            self._report.worked(path.name)
            if late := self._pace.note_upload(offered, began, whole):
                self._report.warn(late)
            if whole:
                self._whole = path
        except Exception as error:  # an upload that fails must not stop training
            self._report.failed(path.name, error, describe_error(error, self._token))
            self._pace.note_failure()  # the next one is due at once
        finally:
            with self._lock:
                self._uploading = None

    def _commit(self, path, whole):
        add, delete = load_hub().CommitOperationAdd, load_hub().CommitOperationDelete
        weights = [name for name in OPENED if (path / name).exists()]
        if not self._exists:
            self._api.create_repo(self.repo, private=True, exist_ok=True)
            self._exists = True
        operations = [add(file, str(path / file)) for file in weights]
        if whole:
            state = [add(f"checkpoints/{path.name}/{file.name}", str(file)) for file in sorted(path.iterdir())]
            # By themselves: the weights, of the same content, are not sent a second time then.
            self._api.preupload_lfs_files(self.repo, state)
            operations += state
            files = self._api.list_repo_files(self.repo)
            old = {file.split("/")[1] for file in files if file.startswith("checkpoints/")}
            # Older ones only: a newer one was found damaged, and is not ours to delete.
            operations += [delete(f"checkpoints/{step}/", is_folder=True) for step in sorted(old) if step < path.name]
        what = "whole" if whole else "weights"
        self._api.create_commit(self.repo, operations, commit_message=f"{path.name}, {what}")

    def finish(self):
        """Uploads the newest checkpoint whole, unless that is done, waits, sums up failures and ends the thread."""
        if self._newest and self._newest != self._whole:
            self._pool.submit(self._upload, self._newest, time.monotonic(), whole=True)
        self._pool.shutdown(wait=True)
        self._report.sum_up()

    def restore(self, folder):
        """Brings the Hub's newest whole checkpoint to `folder`, if it is newer than the newest one there.

        If the one in `folder` is newer, it is offered. UserError if the Hub cannot be reached and `folder` has none.
        Only the first call looks.
        """
        if self.restored:
            return
        here = newest_checkpoint(folder)
        try:
            names = self._list_checkpoints()
        except UserError as error:
            if here is None:  # a fresh start might lose a run
                raise
            self.restored = True
            say(f"checkpoint: resuming from {here} without a look at the Hub: {error}")
            return
        self.restored = True
        for name in sorted(names, reverse=True):
            if here and name <= here.name:
                break
            if self._download(name, Path(folder)):
                say(f"checkpoint: {name} came from {self.repo}")
                return
        if here and here.name not in names:
            self.offer(here)

    def _list_checkpoints(self):
        absent = load_hub().errors.RepositoryNotFoundError
        try:
            paths = try_again(
                lambda: self._api.list_repo_files(self.repo), f"{self.repo}: cannot be listed", token=self._token
            )
        except UserError as error:
            if isinstance(error.__cause__, absent):
                return set()  # the first run of this name
            raise
        return {path.split("/")[1] for path in paths if path.startswith("checkpoints/") and path.endswith(MANIFEST)}

    def _download(self, name, folder):
        """Whether a checkpoint of the Hub arrived in `folder`, undamaged."""
        part = folder / f".{name}.download"
        arrived = part / "checkpoints" / name

        def fetch():
            self._api.snapshot_download(self.repo, allow_patterns=f"checkpoints/{name}/*", local_dir=part)

        for _ in range(2):  # a bit may flip on the way: a checkpoint is given up after the second time
            try_again(fetch, f"{name}: cannot be downloaded from {self.repo}", token=self._token)
            damage = find_damage(arrived)
            if damage is None:
                os.replace(arrived, folder / name)
            shutil.rmtree(part, ignore_errors=True)
            if damage is None:
                return True
        say(f"checkpoint: {name} on {self.repo} is damaged: {damage}; looking for an older one")
        return False


def open_mirror(run, token):
    """The HubMirror of a Run; None, with a line that says why, without a token that the Hub takes.

    Training does not need the Hub: whatever is wrong with it, with the token or with a name, nothing is raised.
    """
    if not token:
        return None
    try:
        user = find_user(connect(token), token)  # also where the repository is named: a token that expired is found now
        repo = choose_repo(run.hub_repo, f"onechip-{run.name}", lambda: user)
    except Exception as error:
        say(f"upload: checkpoints stay here: {describe_error(error, token)}")
        return None
    say(f"checkpoints: in {run.out}/{run.name}/checkpoints and, in the background, on {repo}")
    return HubMirror(token, repo, run.weights_minutes, run.state_minutes)
