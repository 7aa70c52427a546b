"""Starts and ends the web server around a Talker: a page to chat on, and OpenAI's API under /v1."""

import asyncio
import socket
import threading
import time
from importlib.util import find_spec

from onechip.errors import UserError, first_line, say
from onechip.machine import deferred_interrupt
from onechip.webguard import USUAL_LIMITS, check_door

STOP_SECONDS = 10.0  # for answers to end and connections to close


def check_packages():
    """UserError, one line, unless what the server is made of is installed."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"serve: {' and '.join(missing)} must be installed first: pip install {' '.join(missing)}")


def listen(door):
    """A socket that listens at a Door's address; UserError, one line, if that cannot be had."""
    family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
    try:
        return socket.create_server((door.host, door.port), family=family, backlog=256)
    except OSError as error:
        remedy = "choose another port, or 0 for any free one"
        raise UserError(f"port={door.port}: cannot listen on {door.host} ({first_line(error)}); {remedy}") from None


class Served:
    """A server that runs in a thread. address: where it is, such as http://127.0.0.1:8000; port: its number."""

    def __init__(self, talker, door, limits):
        import uvicorn

        from onechip.connection import patient_protocol
        from onechip.webapp import WebApp

        self._app = WebApp(talker, door, limits)
        self._socket = listen(door)
        self.port = self._socket.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(door.host, door.host)
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        config = uvicorn.Config(
            self._app.asgi, http=patient_protocol(limits), ws="none", lifespan="off",
            loop="asyncio", log_config=None, log_level="error", access_log=False, proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=STOP_SECONDS,
            h11_max_incomplete_event_size=1 << 14,
        )  # fmt: skip
        self._server, self._loop = uvicorn.Server(config), None
        self.thread = threading.Thread(target=self._run, name="server", daemon=True)
        self.thread.start()
        while self.thread.is_alive() and not self._server.started:
            time.sleep(0.01)
        if not self._server.started:
            raise UserError("serve: the server ended while it was being started; the lines above say why")

    def _run(self):
        async def run():
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(run())

    def stop(self):
        """Ends all answers, closes all connections and waits for the threads. More than once is no error."""
        if self.thread.is_alive():
            self._loop.call_soon_threadsafe(self._app.close)
            self._server.should_exit = True
        self.thread.join(2 * STOP_SECONDS)
        for thread in self._app.threads():
            thread.join(STOP_SECONDS)


def serve_in_thread(talker, door, limits=USUAL_LIMITS):
    """Starts to serve a Talker and returns a Served, whose stop() ends it. UserError if it cannot be started.

    For notebooks and tests; a program calls `serve`.
    """
    check_door(door)
    check_packages()
    return Served(talker, door, limits)


def serve(talker, door, limits=USUAL_LIMITS):
    """Serves a Talker until Ctrl-C or SIGTERM, which end all answers first. UserError if it cannot be started."""
    with deferred_interrupt() as interrupt:
        served = serve_in_thread(talker, door, limits)
        try:
            say(f"chat with {talker.name} at {served.address}; API: {served.address}/v1; Ctrl-C ends it")
            if door.key:
                say("a key is asked for, as one is set")
            while served.thread.is_alive() and not interrupt.requested:
                time.sleep(0.1)
        finally:
            served.stop()
    say("server: ended")
