"""The Hugging Face Hub: repository names, uploads, and a repository as a place for checkpoints."""

import hashlib
import os
import re
from pathlib import Path

from onechip.errors import UserError, require, say
from onechip.hubclient import connect, describe_error, load_hub, try_again, without_bars
from onechip.parts import holds_weights, name_weights
from onechip.runfolder import ABOUT, CONFIG, MANIFEST, METRICS, TOKENIZER
from onechip.uploads import LATER


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


OPENED = (CONFIG, METRICS, TOKENIZER, ABOUT)  # next to the weights: what opens a checkpoint, and shows how it learned


class HubPlace:
    """A Hub repository as a place for checkpoints (see Mirror): one commit each, and the weights lie on top as well."""

    def __init__(self, token, repo):
        """UserError if the token cannot be one; nothing is sent."""
        self._api, self.secret, self.name = connect(token), token, repo
        self._exists = False  # whether the repository is known to exist
        self._weights = None  # the names of its files with the newest weights, as far as they are known

    def upload(self, path, whole):
        """Brings a checkpoint's folder, or only what opens as a model, to the repository; UserError if that fails."""
        with without_bars():  # training shows its own
            what = f"{path.name}: cannot be uploaded to {self.name}"
            try_again(lambda: self._commit(path, whole), what, LATER, self.secret)

    def _commit(self, path, whole):
        add, delete = load_hub().CommitOperationAdd, load_hub().CommitOperationDelete
        weights = name_weights(path)
        if not self._exists:
            self._api.create_repo(self.name, private=True, exist_ok=True)
            self._exists = True
        opened = weights + [name for name in OPENED if (path / name).exists()]
        operations = [add(file, str(path / file)) for file in opened]
        there = self._api.list_repo_files(self.name) if whole or weights != self._weights else []
        # Of another number of hosts: a reader would take the older ones.
        operations += [delete(file) for file in there if holds_weights(file) and file not in weights]
        if whole:
            state = [add(f"checkpoints/{path.name}/{file.name}", str(file)) for file in sorted(path.iterdir())]
            # By themselves: the weights, of the same content, are not sent a second time then.
            self._api.preupload_lfs_files(self.name, state)
            operations += state
            old = {file.split("/")[1] for file in there if file.startswith("checkpoints/")}
            # Older ones only: a newer one was found damaged, and is not ours to delete.
            operations += [delete(f"checkpoints/{step}/", is_folder=True) for step in sorted(old) if step < path.name]
        what = "whole" if whole else "weights"
        self._api.create_commit(self.name, operations, commit_message=f"{path.name}, {what}")
        self._weights = weights

    def list(self):
        """The names of the whole checkpoints that are there, a set; UserError if that cannot be known."""
        absent = load_hub().errors.RepositoryNotFoundError
        try:
            paths = try_again(
                lambda: self._api.list_repo_files(self.name), f"{self.name}: cannot be listed", token=self.secret
            )
        except UserError as error:
            if isinstance(error.__cause__, absent):
                return set()  # the first run of this name
            raise
        return {path.split("/")[1] for path in paths if path.startswith("checkpoints/") and path.endswith(MANIFEST)}

    def download(self, name, part):
        """Brings a checkpoint to a folder `part`; returns its own folder there. UserError if it does not come."""

        def fetch():
            self._api.snapshot_download(self.name, allow_patterns=f"checkpoints/{name}/*", local_dir=part)

        try_again(fetch, f"{name}: cannot be downloaded from {self.name}", token=self.secret)
        return part / "checkpoints" / name
