"""The web application around a Talker: the page, and OpenAI's API, with limits on what one request may take."""

import asyncio
import base64
import hashlib
import re
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from onechip.errors import UserError, first_line, say
from onechip.openai_answers import KEEP_ALIVE, Reply, model_entry, to_sse
from onechip.openai_requests import ApiError, read_request, unknown_model
from onechip.relay import NoPlace, Places, Relay
from onechip.talker import PromptTooLong, TalkDone
from onechip.webguard import Guard, send_json

PAGE = Path(__file__).with_name("page.html")


def page_and_policy():
    """The page, bytes, and the Content-Security-Policy that lets it run its own script and style and nothing else."""
    page = PAGE.read_text()

    def hashes(tag):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
        )

    rules = ["default-src 'none'", f"script-src {hashes('script')}", f"style-src {hashes('style')}"]
    rules += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return page.encode(), "; ".join(rules)


async def read_body(request, limits):
    """The body of a request, bytes; ApiError if it is too large, too slow, or no JSON by its own account."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body of the request must be JSON, sent as Content-Type: application/json.")
    too_large = ApiError(413, f"The body of the request has more than {limits.body_bytes} bytes.", headers=CLOSE)
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "The body of the request took too long to come.", headers=CLOSE) from None
    return bytes(body)


CLOSE = [("connection", "close")]
ONCE = [("x-should-retry", "false")]  # what OpenAI's client asks before it sends a request again


def closing_error():
    """What a client is answered when the server ends its answer."""
    return ApiError(503, "The server is shutting down.", None, "shutting_down", "server_error", CLOSE)


def as_api_error(error):
    """What a client is answered for an error of the model or of this server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, NoPlace):
        again = [("retry-after", "1")]
        return ApiError(429, f"The server is busy: {error}.", None, "rate_limit_exceeded", "rate_limit_error", again)
    if isinstance(error, TimeoutError):
        message = "The answer took longer than this server lets a request take."
        return ApiError(504, message, None, "timeout", "server_error", ONCE)
    say(f"server: a request failed: {type(error).__name__}: {first_line(error)}")
    return ApiError(500, "The server failed to answer; its own output says why.", None, None, "server_error", ONCE)


class WebApp:
    """An application that answers from a Talker: `asgi`, which belongs to the event loop that first runs it."""

    def __init__(self, talker, door, limits):
        self._talker, self._limits, self._created = talker, limits, int(time.time())
        self._places, self._closing, self._relays = Places(talker.places, limits.waiting), asyncio.Event(), set()
        self._page, self._policy = page_and_policy()
        routes = [
            Route("/", self._show_page),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", Answering(self, chat=True)),
            Route("/v1/completions", Answering(self, chat=False)),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: refuse_route})
        app.router.redirect_slashes = False
        self.asgi = Guard(app, door, keyless=("/",))

    def close(self):
        """Ends all answers, and refuses new ones; called in the event loop."""
        self._closing.set()
        for relay in list(self._relays):
            relay.cancel()

    def threads(self):
        """The threads of answers that are still written."""
        return [relay.thread for relay in list(self._relays)]

    async def _show_page(self, request):
        return Response(self._page, media_type="text/html", headers={"content-security-policy": self._policy})

    async def _list_models(self, request):
        return JSONResponse({"object": "list", "data": [model_entry(self._talker, self._created)]})

    async def _show_model(self, request):
        name = request.path_params["name"]
        if name != self._talker.name:
            error = unknown_model(name, self._talker)
            return JSONResponse(error.body, error.status)
        return JSONResponse(model_entry(self._talker, self._created))

    async def read(self, request, chat):
        """The Ask that a request's body holds; ApiError if it holds none."""
        return read_request(await read_body(request, self._limits), self._talker, chat, self._limits.messages)

    async def answer(self, ask, send):
        """Answers an Ask through an ASGI send. Raises what went wrong, be it before or after the first event."""
        async with asyncio.timeout(self._limits.request_seconds):
            await self._places.take(self._limits.queue_seconds)
            relay = self._start(ask)
            try:
                reply = Reply(ask, self._talker.name)
                await (self._stream if ask.stream else self._send_whole)(relay, reply, send)
            finally:
                relay.cancel()

    def _start(self, ask):
        """A Relay for an Ask, whose place is free again when it has ended."""

        def end():
            self._relays.discard(relay)
            self._places.free()

        if self._closing.is_set():
            self._places.free()
            raise closing_error()
        relay = Relay(self._talker, ask.prompt, ask.settings, end)
        self._relays.add(relay)
        return relay

    async def _take(self, relay):
        """The next events of an answer, as Relay.take; ApiError if it was cancelled, as when the server closes."""
        events = await relay.take()
        if isinstance(events[-1], TalkDone) and events[-1].reason == "cancelled":
            raise closing_error()
        return events

    async def _send_whole(self, relay, reply, send):
        while True:
            for event in await self._take(relay):
                reply.add(event)
                if isinstance(event, TalkDone):
                    return await send_json(send, 200, reply.whole(event))

    async def _stream(self, relay, reply, send):
        events = await self._take(relay)  # what fails before the first event is answered by a status
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = reply.opening()
        while True:
            body += b"".join(map(reply.event, events)) or KEEP_ALIVE
            done = bool(events) and isinstance(events[-1], TalkDone)
            await send({"type": "http.response.body", "body": body, "more_body": not done})
            if done:
                return
            body, events = b"", await self._next(relay)

    async def _next(self, relay):
        """The next events of an answer; none if it was quiet for a while."""
        try:
            async with asyncio.timeout(self._limits.quiet_seconds):
                return await self._take(relay)
        except TimeoutError:
            return []


class Answering:
    """The ASGI application of one route: reads a request, answers it, and stops when its client leaves."""

    def __init__(self, app, chat):
        self._app, self._chat = app, chat

    async def __call__(self, scope, receive, send):
        started = False

        async def send_noted(message):
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["method"] != "POST":
                raise ApiError(405, "This address takes POST.", headers=[("allow", "POST")])
            ask = await self._app.read(Request(scope, receive), self._chat)
            await until_gone(self._app.answer(ask, send_noted), receive)
        except ClientDisconnect:
            return
        except Exception as error:
            refusal = as_api_error(error)
            if started:  # a stream's status is sent already
                await send({"type": "http.response.body", "body": to_sse(refusal.body)})
            else:
                await send_json(send, refusal.status, refusal.body, refusal.headers)


async def until_gone(work, receive):
    """Awaits `work`, a coroutine; cancels it when the client of an ASGI `receive` has left."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def refuse_route(request, error):
    """What Starlette's own refusals, of an unknown address or method, are answered with."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)
