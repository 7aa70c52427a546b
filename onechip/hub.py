"""The Hugging Face Hub: retries, uploads, and a repository as a run's second home."""

import concurrent.futures
import math
import os
import shutil
import time
from pathlib import Path

from onechip.checkpoints import MANIFEST, find_damage, newest_checkpoint
from onechip.errors import UserError, first_line, say
from onechip.files import is_full, link_or_copy

ATTEMPTS = 5


FIRST_PAUSE = 1.0  # seconds, doubled with each attempt


STALL = 60.0  # seconds without a byte


def load_hub():
    """Imports huggingface_hub with time-outs; it reads them, and HF_ENDPOINT, from the environment at its import."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "20")
    # Plain HTTP keeps to these time-outs; a xet download can hang for ever (huggingface_hub#4085).
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    from huggingface_hub.utils import _http

    if _http.default_client_factory is not _make_client.made_by:  # once: setting it closes the open connections
        _make_client.made_by = _http.default_client_factory
        huggingface_hub.set_client_factory(_make_client)
    return huggingface_hub


def _make_client():
    client = _make_client.made_by()
    client.timeout = STALL  # its own is none: an upload that stalls would never end
    return client


_make_client.made_by = None


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help: what was asked for is not there or not ours, or the disk is full."""
    errors = load_hub().errors
    absent = (errors.RemoteEntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
    return refused or isinstance(error, absent) or is_full(error)


def try_again(action, what: str):
    """action(), again after 1, 2, 4, 8 s when it fails; UserError when it keeps failing, "<what> (<reason>)"."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # httpx's, huggingface_hub's and the system's errors have no common class
            final = is_final(error)
            if final or attempt == ATTEMPTS - 1:
                tried = "" if final else f" after {ATTEMPTS} attempts"
                remedy = "check the name and revision" if final else "check the network and run again"
                raise UserError(f"{what}{tried} ({first_line(error)}); {remedy}, what came is kept") from error
        time.sleep(FIRST_PAUSE * 2**attempt)


def upload_folder(folder: Path, files: list[str], token: str | None, hub_repo: str = "", name: str = "") -> str | None:
    """One commit with `files` of `folder` to `hub_repo` (default: <you>/<name>), made private if it is new.

    Returns the commit's address, or None with a line that says why nothing was uploaded: no token, or a refusal.
    """
    if not token:
        say(f"upload: none, as there is no HF_TOKEN in the environment or in Colab's secrets; all is in {folder}")
        return None
    api = load_hub().HfApi(token=token)
    try:
        hub_repo = hub_repo or f"{api.whoami()['name']}/{name}"
        api.create_repo(hub_repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=hub_repo, folder_path=folder, allow_patterns=files, commit_message=f"Upload {', '.join(files)}"
        )
    except Exception as error:  # what was trained is on disk: a refusal must not end the run
        say(f"upload: none, as the Hub refused {hub_repo or name} ({first_line(error)}); all is in {folder}")
        return None
    say(f"upload: {', '.join(files)} to {commit.commit_url}")
    return commit.commit_url


class HubMirror:
    """A Hub repository as a run's second home: checkpoints go up in a thread, one commit each, and come back from it.

    Weights go up every `weights_minutes`, whole checkpoints every `state_minutes`, the last one in any case. Training
    never waits and never stops for it: what failed after retries is told by `finish`.
    """

    def __init__(self, token, repo, weights_minutes=15.0, state_minutes=60.0):
        self._api, self.repo, self._minutes = load_hub().HfApi(token=token), repo, (weights_minutes, state_minutes)
        self._uploaded = [-math.inf, -math.inf]  # when weights and whole checkpoints last went up
        self._newest, self._whole, self._failures, self._exists = None, None, [], False
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "hub")

    def offer(self, path):
        """Takes a checkpoint that is in place; uploads it if it is due and still the newest when its turn comes."""
        held = path.with_name(f".{path.name}.upload")  # links: clearing old checkpoints away does not touch them
        try:
            shutil.rmtree(held, ignore_errors=True)
            shutil.copytree(path, held, copy_function=link_or_copy)
        except OSError as error:
            self._failures.append(f"{path.name}: cannot be kept for its upload ({first_line(error)})")
            return
        before, self._newest = self._newest, held
        self._pool.submit(self._upload_if_due, held)
        if before:
            self._pool.submit(shutil.rmtree, before, ignore_errors=True)

    def _upload_if_due(self, held):
        weights_due, state_due = (
            time.monotonic() - at >= 60 * minutes for at, minutes in zip(self._uploaded, self._minutes, strict=True)
        )
        if held == self._newest and (weights_due or state_due):
            self._upload(held, whole=state_due)

    def _upload(self, held, whole):
        name = held.name.removeprefix(".").removesuffix(".upload")
        self._uploaded[0] = time.monotonic()
        if whole:
            self._uploaded[1] = time.monotonic()
        if not self._try(name, self._commit, held, name, whole):
            self._uploaded = [-math.inf, -math.inf]  # the next one is due at once
        elif whole:
            self._whole = held

    def _commit(self, held, name, whole):
        add, delete = (load_hub().CommitOperationAdd, load_hub().CommitOperationDelete)
        weights = ("params.safetensors", "config.json", "metrics.jsonl")
        if not self._exists:
            self._api.create_repo(self.repo, private=True, exist_ok=True)
            self._exists = True
        operations = [add(file, str(held / file)) for file in weights]
        if whole:
            operations += [add(f"checkpoints/{name}/{file.name}", str(file)) for file in sorted(held.iterdir())]
            old = {
                path.split("/")[1] for path in self._api.list_repo_files(self.repo) if path.startswith("checkpoints/")
            }
            # older ones: one that is newer was found damaged, and is not ours to delete
            operations += [delete(f"checkpoints/{step}/", is_folder=True) for step in sorted(old) if step < name]
        what = "whole" if whole else "weights"
        self._api.create_commit(self.repo, operations, commit_message=f"{name}, {what}")

    def _try(self, what, action, *args, **kwargs):
        try:
            try_again(lambda: action(*args, **kwargs), f"{what}: cannot be uploaded to {self.repo}")
            return True
        except Exception as error:  # an upload that fails must not stop training
            self._failures.append(first_line(error))
            return False

    def finish(self):
        """Uploads the newest checkpoint whole, unless that is done, waits, says what failed and ends the thread."""
        if self._newest and self._newest != self._whole:
            self._pool.submit(self._upload, self._newest, whole=True)
        if self._newest:
            self._pool.submit(shutil.rmtree, self._newest, ignore_errors=True)
        self._pool.shutdown(wait=True)
        for failure in dict.fromkeys(self._failures):
            say(f"upload: {failure}")

    def restore(self, folder):
        """Brings the Hub's newest whole checkpoint to `folder`, or offers the one there if the Hub has none as new."""
        here = newest_checkpoint(folder)
        try:
            names = self._list_checkpoints()
        except UserError as error:
            if here is None:  # starting afresh would be the loss of a run
                raise
            say(f"checkpoint: going on from {here}, without a look at the Hub: {error}")
            return
        for name in sorted(names, reverse=True):
            if here and name <= here.name:
                break
            if self._download(name, Path(folder)):
                say(f"checkpoint: {name} came from {self.repo}")
                return
        if here and here.name not in names:
            self.offer(here)

    def _list_checkpoints(self):
        errors = load_hub().errors
        try:
            paths = try_again(lambda: self._api.list_repo_files(self.repo), f"{self.repo}: cannot be listed")
        except UserError as error:
            if isinstance(error.__cause__, errors.RepositoryNotFoundError):
                return set()  # the first run of this name
            raise
        return {path.split("/")[1] for path in paths if path.startswith("checkpoints/") and path.endswith(MANIFEST)}

    def _download(self, name, folder):
        part = folder / f".{name}.download"
        arrived = part / "checkpoints" / name
        fetch = lambda: self._api.snapshot_download(self.repo, allow_patterns=f"checkpoints/{name}/*", local_dir=part)
        for _ in range(2):  # a byte may flip on the way: twice, before a checkpoint is given up
            try_again(fetch, f"{name}: cannot be downloaded from {self.repo}")
            damage = find_damage(arrived)
            if damage is None:
                os.replace(arrived, folder / name)
            shutil.rmtree(part, ignore_errors=True)
            if damage is None:
                return True
        say(f"checkpoint: {name} on {self.repo} is damaged: {damage}; looking for an older one")
        return False


def open_mirror(run, token):
    """The HubMirror of a Run, or None without a token or a Hub that takes it, which is said at once."""
    if not token:
        return None
    try:
        whoami = load_hub().HfApi(token=token).whoami
        repo = run.hub_repo or f"{try_again(whoami, 'the Hub does not say who we are')['name']}/onechip-{run.name}"
    except Exception as error:  # training does not need the Hub
        say(f"upload: checkpoints stay here: {first_line(error)}")
        return None
    say(f"checkpoints: in {run.out}/{run.name}/checkpoints and, in the background, on {repo}")
    return HubMirror(token, repo, run.weights_minutes, run.state_minutes)
