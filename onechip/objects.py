"""Object storage as a place for a run's checkpoints: a folder of a bucket, through fsspec."""

import logging
import os
import re

from onechip.errors import UserError, say_above_bars
from onechip.hubclient import STALL, chain, describe_error, redact
from onechip.runfolder import MANIFEST
from onechip.uploads import LATER

EXAMPLE = "gs://bucket/folder"
CLIENTS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}
UPLOAD_PIECE = (
    16 << 20
)  # bytes of one request of a large upload: a multiple of 256 KiB; one is sent within STALL at 0.3 MB/s


# ----------------------------------------------------------------------------------------------------------------------
# The address


def check_address(url):
    """UserError, one line, unless a text is the address of a folder in a bucket, without credentials in it."""
    protocol, separator, rest = url.partition("://")
    if "@" in rest or "?" in rest:
        raise UserError(f"mirror: the address must not hold a user, a password or a key; use {EXAMPLE}")
    parts = rest.removesuffix("/").split("/")
    valid = re.fullmatch("[a-z][a-z0-9]*", protocol) and separator and not re.search(r"[\s*\[\]{}#:\x00-\x1f]", rest)
    if not valid or not all(part not in ("", ".", "..") for part in (parts[1:] if protocol == "file" else parts)):
        raise UserError(f"mirror={url[:200]!r}: must be a folder of a bucket, such as {EXAMPLE}")


def load_client(url):
    """The class of fsspec's client for an address; UserError, one line, if there is none or it is not installed."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise UserError(f"mirror={url!r}: {protocol}:// is no storage that fsspec knows; use {EXAMPLE}") from None
    except ImportError as error:
        package = CLIENTS.get(protocol)
        remedy = f"pip install {package}" if package else describe_error(error)
        raise UserError(f"mirror={url!r}: the client for {protocol}:// is not installed: {remedy}") from None


def client_options(protocol):
    """What a protocol's client is made with; nothing secret: credentials are found by the client itself."""
    # A listing is of what is there now; a client belongs to one place.
    options = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol == "file":
        return options | {"auto_mkdir": True}
    if protocol not in ("gs", "gcs"):
        return options
    import aiohttp

    if "GCSFS_DEBUG" not in os.environ:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # each failed request would be a traceback
    # Its own limit is 5 minutes for a file, however fast that comes.
    patience = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
    options |= {"consistency": "md5", "session_kwargs": {"timeout": patience}}
    return options | ({"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {})


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


ANONYMOUS = ("DefaultCredentialsError", "RefreshError", "NoCredentialsError")  # errors of clients without credentials


def find_cause(error):
    """What to do about an error that another attempt cannot fix, in a few words; None for any other."""
    code = str(getattr(error, "code", None))
    if code == "404" or (isinstance(error, FileNotFoundError) and error.errno is None):  # no file of this machine
        return "there is no such bucket: check its name, or create it"
    if code == "401" or type(error).__name__ in ANONYMOUS:
        login = "gcloud auth application-default login"
        return f"there are no credentials that it takes: run `{login}`, or set GOOGLE_APPLICATION_CREDENTIALS"
    if isinstance(error, PermissionError) or code == "403" or str(error).startswith("Forbidden"):
        return "the account needs the role Storage Object Admin; a TPU VM also the scope cloud-platform"
    if isinstance(error, ValueError) and not isinstance(error, UserError):
        return f"check the address, such as {EXAMPLE}"
    return None


class Refusal(UserError):
    """What a place did not do. passes: whether another attempt, later, may help."""

    passes = True


def request(action, what, remedy):
    """action(), of a client that repeats by itself what may pass; Refusal, one line, if it fails."""
    try:
        return action()
    except Exception as error:
        cause = find_cause(error)
        words = " ".join(str(error).split()).strip(", ") or type(error).__name__
        refusal = Refusal(f"{what} ({describe_error(RuntimeError(words))}); {cause or remedy}")
        refusal.passes = cause is None
        secret = any(redact(str(link)) != str(link) for link in chain(error))
        raise refusal from (None if secret else error)  # a notebook shows the causes of an error too


# ----------------------------------------------------------------------------------------------------------------------
# The place


class ObjectPlace:
    """A folder of a bucket as a place for checkpoints (see Mirror), at <folder>/checkpoints/<name>/<file>.

    There are no commits: a checkpoint is whole when its manifest is there, which goes up last and is deleted first.
    """

    secret = None

    def __init__(self, url):
        """url: such as gs://bucket/folder; UserError if it cannot be one. Nothing is sent."""
        check_address(url)
        self.name, protocol = url, url.partition("://")[0]
        client = load_client(url)
        make = lambda: client(**client_options(protocol))
        self._client = request(make, f"{url}: cannot be opened", "check the address")
        self._folder = client._strip_protocol(url).rstrip("/")
        self._chunks = {"chunksize": UPLOAD_PIECE} if protocol in ("gs", "gcs") else {}
        self._complained = False

    def check(self):
        """UserError if the folder can never be listed or written to; what may pass is left to those who need it."""
        probe = f"{self._folder}/.probe"
        try:
            request(self._steps, f"{self.name}: cannot be listed", "")
            request(lambda: self._client.pipe_file(probe, b"onechip"), f"{self.name}: cannot be written to", "")
            request(lambda: self._client.rm_file(probe), f"{self.name}: nothing can be deleted there", "")
        except Refusal as refusal:
            if not refusal.passes:
                raise

    def _steps(self):
        """{name of a checkpoint: names of its files} of what is there, whole or not."""
        self._client.invalidate_cache()
        found, start = {}, f"{self._folder}/checkpoints/"
        for path in self._client.find(start.rstrip("/")):
            match = re.fullmatch(r"(step_[0-9]{8,})/(\w[\w.-]*)", path.removeprefix(start))
            if match and path.startswith(start):
                found.setdefault(match[1], set()).add(match[2])
        return found

    def list(self):
        """The names of the whole checkpoints that are there, a set; UserError if that cannot be known."""
        steps = request(self._steps, f"{self.name}: cannot be listed", "check the network")
        return {name for name, files in steps.items() if MANIFEST in files}

    def upload(self, path, whole=True):
        """Brings a checkpoint's folder to the place and deletes older ones; UserError if it does not get there."""
        what = f"{path.name}: cannot be uploaded to {self.name}"
        steps = request(self._steps, what, LATER)
        request(lambda: self._send(path, MANIFEST in steps.get(path.name, ())), what, LATER)
        # Older ones only: a newer one was found damaged, and is not ours to delete.
        self._clear({name: steps[name] for name in sorted(steps) if name < path.name})

    def _send(self, path, again):
        target = f"{self._folder}/checkpoints/{path.name}"
        if again:  # an earlier one of this name: until all is replaced it is not whole
            self._client.rm_file(f"{target}/{MANIFEST}")
        names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
        for name in [*names, MANIFEST]:
            self._client.put_file(str(path / name), f"{target}/{name}", **self._chunks)

    def _clear(self, steps):
        """Deletes checkpoints, {name: names of its files}; what cannot be deleted stays, with a line the first time."""
        try:
            for step, files in steps.items():
                for name in sorted(files, key=lambda name: name != MANIFEST):
                    self._client.rm_file(f"{self._folder}/checkpoints/{step}/{name}")
        except Exception as error:
            if not self._complained:
                self._complained = True
                say_above_bars(f"upload: older checkpoints stay in {self.name} ({describe_error(error)})")

    def download(self, name, part):
        """Brings a checkpoint to a folder `part`; returns its own folder there. UserError if it does not come."""
        arrived, source = part / name, f"{self._folder}/checkpoints/{name}"
        arrived.mkdir(parents=True, exist_ok=True)

        def fetch():
            for file in sorted(self._steps()[name]):
                self._client.get_file(f"{source}/{file}", str(arrived / file))

        request(fetch, f"{name}: cannot be downloaded from {self.name}", "check the network and run again")
        return arrived
