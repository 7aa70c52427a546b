"""The Hugging Face Hub's client: its time-outs, one retry policy, and no secret in what it says."""

import contextlib
import functools
import logging
import os
import re
import time
import urllib.parse
import warnings

from onechip.errors import UserError
from onechip.files import is_full

ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds, doubled with each attempt
LONGEST_PAUSE = 300.0  # seconds: the window of the Hub's rate limits
STALL = 60.0  # seconds without a byte


# ----------------------------------------------------------------------------------------------------------------------
# The client


@functools.cache
def load_hub():
    """huggingface_hub, imported here because that takes a second, with time-outs and with this room's retry policy."""
    # It reads these, and HF_ENDPOINT, at its import.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "20")
    # Plain HTTP respects these time-outs; a xet download can hang for ever (huggingface_hub#4085).
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    if "HF_HUB_DISABLE_XET" in os.environ:  # another library may have imported the client before
        constants.HF_HUB_DISABLE_XET = os.environ["HF_HUB_DISABLE_XET"].upper() in constants.ENV_VARS_TRUE_VALUES

    def make_client():
        client = _http.default_client_factory()
        client.timeout = STALL  # its own is none: an upload that stalls would never end
        return client

    huggingface_hub.set_client_factory(make_client)
    # Neither http_backoff nor its callers let anyone else set how often a request is repeated.
    if hasattr(_http, "_http_backoff_base"):  # a private name: without it the client repeats by its own policy
        _http._http_backoff_base = repeat_as_here(_http._http_backoff_base)
    for module in (_http, file_download):
        logging.getLogger(module.__name__).addFilter(is_news)
    warnings.filterwarnings("ignore", "Not enough free disk space")  # a disk that is full says so itself, once
    return huggingface_hub


RETRIED = f"this request was repeated {ATTEMPTS - 1} times"  # a note on the client's errors


def repeat_as_here(backoff):
    """The client's own loop around a request, with as many attempts and the same pauses as try_again.

    An error that it gives up with carries the note RETRIED, so that try_again does not multiply the attempts.
    """

    def repeat(*args, **options):
        options |= {"max_retries": ATTEMPTS - 1, "base_wait_time": FIRST_PAUSE}
        with contextlib.closing(backoff(*args, **options)) as responses:
            try:
                response = next(responses)
            except Exception as error:
                # Some callers want an attempt without an answer to be the only one.
                if status_of(error) or options.get("retry_on_exceptions") != ():
                    error.add_note(RETRIED)
                raise
            yield response

    return repeat


def is_news(record):
    """A filter of the client's log: leaves out each failed attempt, as the outcome is reported in one line here."""
    text = record.getMessage()
    attempts = ("Retrying in", "Rate limited", "Error while downloading")
    return "thrown while requesting" not in text and not text.startswith(attempts)


@contextlib.contextmanager
def without_bars():
    """Keeps the client from drawing progress bars, of all threads, through the one that is on screen."""
    bars = load_hub().utils
    shown = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bars()


def connect(token):
    """The client's HfApi for a token; UserError if the token cannot be one."""
    check_token(token)
    return load_hub().HfApi(token=token)


# ----------------------------------------------------------------------------------------------------------------------
# Secrets


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")  # in the environment


def check_token(token):
    """UserError, without the token's text, unless it has the form of a bearer token (RFC 6750).

    With a line break or a letter of another alphabet inside, the HTTP client would print all of it.
    """
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", token):
        raise UserError(
            "HF_TOKEN has a character inside that no token has, a blank or a line break perhaps; "
            "copy it again from https://huggingface.co/settings/tokens"
        )


def redact(text, *secrets):
    """`text` with *** for each secret, its parts between blanks, and what looks like a token of the Hub or Google."""
    forms = set()
    for secret in filter(None, secrets):
        forms |= {secret, repr(secret)[1:-1], repr(secret.encode(errors="replace"))[2:-1], urllib.parse.quote(secret)}
        forms |= set(re.findall(r"[^\s\\]{4,}", secret))
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    text = re.sub(r"\b(hf_[A-Za-z0-9]{16,}|ya29\.[\w.-]+)", "***", text)
    return re.sub(r"Bearer [^'\"\r\n]+", "Bearer ***", text)


def describe_error(error, token=None):
    """An error's message on one line without secrets: a UserError's whole, any other's first 200 characters."""
    known = [token, *map(os.environ.get, SECRETS)]
    text = redact(str(error).strip(), *known) or type(error).__name__
    return text if isinstance(error, UserError) else text.splitlines()[0][:200]


# ----------------------------------------------------------------------------------------------------------------------
# Retries


def chain(error):
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error):
    """The HTTP status of an error's answer, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def find_remedy(error):
    """What to do about an error that another attempt cannot fix, in a few words; None for any other."""
    errors = load_hub().errors
    absent = (errors.RemoteEntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    if is_full(error):
        return "free some space"
    if isinstance(error, (*absent, errors.HFValidationError)) and not isinstance(error, errors.GatedRepoError):
        return "check the name and revision"
    return "check HF_TOKEN and what it may do" if status_of(error) in (401, 403) else None


def pause_after(error, attempt):
    """Seconds to wait: 1, 2, 4, 8, or as long as the Hub's answer asks for."""
    asked = ""
    for link in chain(error):
        asked = asked or getattr(getattr(link, "response", None), "headers", {}).get("Retry-After", "")
    return max(FIRST_PAUSE * 2**attempt, min(float(asked), LONGEST_PAUSE) if asked.isdigit() else 0.0)


def try_again(action, what, remedy="check the network and run again, what came is kept", token=None):
    """action(), repeated after 1, 2, 4, 8 s while it fails in a way that may pass.

    UserError when it keeps failing, "<what> after 5 attempts (<reason>); <remedy>", or at once where another attempt
    cannot help: what was asked for does not exist or is not ours, or the disk is full. `token` is kept out of it.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # httpx's, huggingface_hub's and the system's errors have no common class
            links = list(chain(error))
            final = find_remedy(error)
            repeated = any(RETRIED in getattr(link, "__notes__", ()) for link in links)
            if final or repeated or attempt == ATTEMPTS - 1:
                tried = "" if final else f" after {ATTEMPTS} attempts"
                message = f"{what}{tried} ({describe_error(error, token)}); {final or remedy}"
                # A notebook shows the causes of an error too.
                secret = any(redact(str(link), token) != str(link) for link in links)
                raise UserError(message) from (None if secret else error)
            pause = pause_after(error, attempt)
        time.sleep(pause)
