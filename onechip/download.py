"""Public files of the Hub: downloaded whole and checked, or not there."""

import hashlib
import os
import re

from onechip.errors import UserError, say
from onechip.files import atomic_write, hash_file, read_json_or_none, write_json
from onechip.hubclient import load_hub, try_again
from onechip.machine import home


def is_commit(revision):
    """Whether a revision is a commit: a branch could be other text tomorrow."""
    return isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision) is not None


def newest_revision(name, repo, branch=None):
    """The commit of a dataset, or of a branch of it, that was its newest when this machine first asked for it."""
    note = home() / "revisions" / f"{name}.json"
    known = (read_json_or_none(note) or {}).get("revision")
    if not is_commit(known):
        api = load_hub().HfApi(token=False)
        known = try_again(lambda: api.dataset_info(repo, revision=branch).sha, f"{repo}: has not said what is newest")
        write_json(note, {"revision": known})
        say(f"revision: {repo} is at {known[:12]}, which stays the one for this machine ({note})")
    return known


def look_up_files(repo, names, revision, repo_type="dataset"):
    """What the Hub says of each file, in one request: {name: RepoFile with its size in bytes and its hash}."""
    api = load_hub().HfApi(token=False)  # public data: no login, so no expired one can be in the way
    listed = try_again(
        lambda: api.get_paths_info(repo, names, revision=revision, repo_type=repo_type),
        f"{repo} at {revision[:12]}: cannot be downloaded",
    )
    listed = {file.path: file for file in listed}
    for name in names:
        if name not in listed:
            raise UserError(f"{name}: {repo} has no such file at {revision[:12]}; choose another revision")
    return listed


def check_hash(path, listed):
    """OSError unless a file is the one that the Hub lists: by SHA-256, or as git has it where it is no large file."""
    if listed.lfs:
        arrived, wanted, kind = hash_file(path), listed.lfs.sha256, "SHA-256"
    else:
        content = path.read_bytes()
        arrived = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        wanted, kind = listed.blob_id, "git's SHA-1"
    if arrived != wanted:
        raise OSError(f"{kind} {arrived[:12]} is not the Hub's {wanted[:12]}")


def download_file(path, listed, repo, revision, check, repo_type="dataset", remedy=None, is_wanted=lambda: True):
    """Downloads the file `listed` to `path`, under its own name only if it is complete and checked; returns its bytes.

    check(path) raises UserError for a file that is not of the right kind; is_wanted() ends the attempts once it is
    false.
    """

    def fetch():
        if not is_wanted():
            raise UserError(f"{path.name}: no longer needed")
        with atomic_write(path) as part:
            options = {"repo_type": repo_type, "revision": revision, "local_dir": part.parent}
            arrived = load_hub().HfApi(token=False).hf_hub_download(repo, listed.path, **options)
            os.replace(arrived, part)  # a file in a folder of the repository arrives in such a folder
            check_hash(part, listed)
            try:
                check(part)
            except UserError as error:
                raise UserError(str(error).replace(str(part), f"{path.name} of {repo}")) from None
            return part.stat().st_size

    return try_again(fetch, f"{path.name}: cannot be downloaded", **({"remedy": remedy} if remedy else {}))
