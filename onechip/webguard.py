"""Who may use the server: a key, the Host that a browser names, the page that asks, and what an answer lets it do.

A page of any website can send requests to a server on 127.0.0.1 from its visitor's browser, either across origins or,
with a name of its own that it lets point to 127.0.0.1 (DNS rebinding), as if they were its own. So a request's Host
must be an address or name of this server, and its Origin, where there is one, the same or one that was allowed.
"""

import hmac
import ipaddress
import json
import os
import re
import socket
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from onechip.errors import UserError, require
from onechip.keeper import is_loopback
from onechip.openai_requests import ApiError

KEY_NAME = "ONECHIP_API_KEY"
MAKE_KEY = "python -c 'import secrets; print(secrets.token_urlsafe(24))'"
LEAST_KEY = 16  # characters
# Of every answer. An answer of a model is never HTML, and no other page may show or read it.
HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Door(NamedTuple):
    """Where the server listens, and to whom.

    host, port: the address, port 0 for any free one; key: what clients must send as a bearer token, None for none,
    which only loopback may have; hosts: more names that it is reached by, ".name" for all below a name;
    origins: of other websites' pages that may use it, such as "http://localhost:3000".
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    hosts: tuple = ()
    origins: tuple = ()


class WebLimits(NamedTuple):
    """What one request, or all of them, may take: sizes in bytes, times in seconds.

    waiting: requests in line for a place, others are refused at once; connections: open ones, more are dropped.
    """

    body_bytes: int = 1 << 18
    messages: int = 1000
    waiting: int = 64
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    head_seconds: float = 10.0
    send_seconds: float = 30.0
    connections: int = 512
    quiet_seconds: float = 15.0  # after which a stream sends a comment, so that no proxy takes it for dead


USUAL_LIMITS = WebLimits()


def read_api_key(path=None):
    """The key from a file if `path` is given, else from ONECHIP_API_KEY; None if there is none. It is never printed."""
    if path is None:
        return os.environ.get(KEY_NAME, "").strip() or None
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({type(error).__name__}); must be one line with a key"
        raise UserError(f"key_file={str(path)!r}: {problem}") from None


def check_door(door):
    """UserError, one line, unless a Door can be opened safely. No message has the key."""
    if door.key is None:
        safe = is_loopback(door.host)
        require(safe, "host", door.host, f"others reach it, so set {KEY_NAME} to a key: {MAKE_KEY}")
    elif not re.fullmatch(r"[!-~]+", door.key) or len(door.key) < LEAST_KEY:
        raise UserError(f"key: must have at least {LEAST_KEY} characters, printable ASCII without blanks: {MAKE_KEY}")
    whole = isinstance(door.port, int) and not isinstance(door.port, bool)
    require(whole and 0 <= door.port < 65536, "port", door.port, "must be from 0, for any free one, to 65535")
    for origin in door.origins:
        parts = urlsplit(origin)
        exact = parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{parts.netloc}" and parts.netloc
        require(exact, "origins", origin, "must be such as http://localhost:3000, without a path")


def split_host(value):
    """The name in a Host header, lower case and without its port; None if it is none."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", value)
    return match and match[1].strip("[]").lower().rstrip(".")


class Guard:
    """An ASGI application that lets through to `app` what a Door lets in, with HEADERS on each answer.

    keyless: the paths that need no key, such as the page that asks for it.
    """

    def __init__(self, app, door, keyless=()):
        self._app, self._door, self._keyless = app, door, set(keyless)
        self._own = {"localhost", door.host.lower(), *(host.lower() for host in door.hosts)}
        if not is_loopback(door.host):
            self._own.add(socket.gethostname().lower())

    def _knows(self, host):
        """Whether the server is reached by this name. An address cannot be rebound, so beyond loopback any will do."""
        if host in self._own:
            return True
        try:
            address = ipaddress.ip_address(host)
            return address.is_loopback or not is_loopback(self._door.host)
        except ValueError:
            return any(own.startswith(".") and host.endswith(own) for own in self._own)

    def _refuse(self, scope, headers):
        """The ApiError for a request that may not come in; None for one that may."""
        host = split_host(headers.get("host", ""))
        if host is None or not self._knows(host):
            message = "The Host of this request is no name of this server; start it with that name among its hosts."
            return ApiError(403, message, code="unknown_host")
        origin = headers.get("origin")
        same = origin is None or origin.lower().partition("://")[2] == headers["host"].lower()
        if not same and origin not in self._door.origins:
            message = "Pages of other websites may not use this server; start it with their origin among its origins."
            return ApiError(403, message, code="unknown_origin")
        if self._door.key is None or scope["path"] in self._keyless or scope["method"] == "OPTIONS":
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._door.key.encode()):
            message = "The API key is missing or wrong; send it as: Authorization: Bearer KEY."
            needed = ("www-authenticate", "Bearer")
            return ApiError(401, message, code="invalid_api_key", headers=[needed])
        return None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        cors = self._cors(headers.get("origin"))

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in (HEADERS | cors).items()]
                message = message | {"headers": [*message["headers"], *(pair for pair in more if pair[0] not in given)]}
            await send(message)

        refusal = self._refuse(scope, headers)
        if refusal:
            await send_json(send_guarded, refusal.status, refusal.body, refusal.headers)
        elif scope["method"] == "OPTIONS" and cors:
            await send_json(send_guarded, 200, {})
        else:
            await self._app(scope, receive, send_guarded)

    def _cors(self, origin):
        """The headers that let a page of an allowed origin read the answer."""
        if origin not in self._door.origins:
            return {}
        allow = {"origin": origin, "methods": "GET, POST, OPTIONS", "headers": "authorization, *"}
        return {f"access-control-allow-{name}": value for name, value in allow.items()} | {"vary": "Origin"}


async def send_json(send, status, value, headers=()):
    """Sends a whole answer, a value as JSON, through an ASGI `send`."""
    body = json.dumps(value).encode()
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    start += [(name.encode(), text.encode()) for name, text in headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
