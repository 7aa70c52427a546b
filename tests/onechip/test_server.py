"""The server, through OpenAI's own client and through bare sockets: answers, limits, clients that leave, its end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from conftest import ROOT, SUPPORT
from scripted import ScriptedModel, endless, last_text, pieces, say_back

from onechip.errors import UserError
from onechip.server import serve_in_thread
from onechip.talker import TextPiece
from onechip.webguard import Door, WebLimits

pytestmark = pytest.mark.usefixtures("in_time")
LIMITS = WebLimits(body_bytes=5000, messages=7, waiting=2, queue_seconds=5, head_seconds=0.4, send_seconds=0.5)


@contextlib.contextmanager
def serving(model, key=None, **limits):
    """A server on a free port of loopback, with LIMITS but for those given."""
    served = serve_in_thread(model.talker(), Door(port=0, key=key), LIMITS._replace(**limits))
    try:
        yield served
    finally:
        served.stop()
        assert not served.thread.is_alive()


@pytest.fixture
def model():
    return ScriptedModel(places=2)


@pytest.fixture
def served(model):
    with serving(model) as served:
        yield served


def client(served, **more):
    return openai.OpenAI(base_url=f"{served.address}/v1", **({"api_key": "none", "max_retries": 0} | more))


def ask(served, text, **more):
    """A chat's answer by OpenAI's client."""
    said = [{"role": "user", "content": text}]
    return client(served).chat.completions.create(model="scripted", messages=said, **more)


def post(served, raw, path="/v1/chat/completions", **headers):
    """(status, parsed answer) of a request with a raw body."""
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(served.address + path, raw, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def body_of(text, **more):
    return json.dumps({"messages": [{"role": "user", "content": text}]} | more).encode()


def open_stream(served, text="go", receive_buffer=None):
    """A bare socket on which an answer begins to be streamed."""
    bare = socket.socket()
    if receive_buffer:
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    bare.connect(("127.0.0.1", served.port))
    body = body_of(text, stream=True)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    bare.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    assert bare.recv(100).startswith(b"HTTP/1.1 200")
    return bare


# ----------------------------------------------------------------------------------------------------------------------
# Answers, by OpenAI's client


def test_a_chat_is_answered(served, model):
    """A whole answer: its text, why it ended, its tokens; the tool's part is next to it; the model got the settings."""
    answer = ask(served, "what is 12*13?", temperature=0.5, seed=7, max_tokens=20, stop=["never"])
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Let me see. It is 156.")
    assert choice.finish_reason == "stop" and answer.model == "scripted" and answer.object == "chat.completion"
    assert [part["type"] for part in choice.message.parts] == ["text", "python", "python_output", "text"]
    usage = answer.usage
    assert usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8
    [(prompt, settings)] = model.asked
    assert prompt == [{"role": "user", "content": "what is 12*13?"}]
    assert (settings.temperature, settings.seed, settings.max_tokens, settings.stop) == (0.5, 7, 20, ("never",))


@pytest.mark.parametrize("usage", [False, True])
def test_a_chat_is_streamed(served, model, usage):
    """The pieces make up the text; one end, with its reason; the tokens in one last event if they were asked for."""
    model.pause = 0.005
    more = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(ask(served, "one two three", stream=True, **more))
    if usage:
        last = chunks.pop()
        assert last.choices == [] and last.usage.completion_tokens == 5
    assert all(chunk.usage is None and chunk.id == chunks[0].id for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 3
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "You said: one two three"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_a_text_is_continued(served):
    """/v1/completions, whole and streamed, has the text itself; the answer ends at a stop string or at its length."""
    ask = lambda **more: client(served).completions.create(model="scripted", prompt="one two three", **more)
    assert ask().choices[0].text == "You said: one two three" and ask().usage.completion_tokens == 5
    assert [ask(stop=" two").choices[0].text, ask(stop="two").choices[0].finish_reason] == ["You said: one", "stop"]
    assert [ask(max_tokens=2).choices[0].text, ask(max_tokens=2).choices[0].finish_reason] == ["You said: ", "length"]
    assert "".join(chunk.choices[0].text for chunk in ask(stream=True)) == "You said: one two three"


def test_models_are_listed(served):
    """The one model, by list and by name; another one is not found."""
    [model] = client(served).models.list().data
    assert model.id == "scripted" and client(served).models.retrieve("scripted").context_window == 200
    asked = lambda: ask(served, "x", extra_body={"model": "b"})
    for request in (lambda: client(served).models.retrieve("gpt-4o"), asked):
        with pytest.raises(openai.NotFoundError) as caught:
            request()
        assert caught.value.code == "model_not_found" and "scripted" in str(caught.value)


def test_errors_are_the_client_s_own(model):
    """Each error of the API is the class that OpenAI's client has for it, with code and parameter."""
    with serving(model, key="k" * 16) as served:
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(served, "x")
        assert caught.value.code == "invalid_api_key"
        right = client(served, api_key="k" * 16).chat.completions
        with pytest.raises(openai.BadRequestError) as caught:
            right.create(model="scripted", messages=[{"role": "user", "content": "x"}], n=3)
        assert (caught.value.param, caught.value.code) == ("n", "unsupported_parameter")
        with pytest.raises(openai.BadRequestError) as caught:
            right.create(model="scripted", messages=[{"role": "user", "content": "word " * 250}])
        assert caught.value.code == "context_length_exceeded"


def test_a_failure_says_nothing_of_the_machine(model, capfd):
    """What breaks in the model is a 500, or an error event once the stream has begun; the server's output says why."""
    secret = RuntimeError("broken at /some/path")
    model.script = lambda prompt: [*([TextPiece("half")] if "half" in last_text(prompt) else []), secret]
    with serving(model) as served:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(served, "x")
        assert "/some/path" not in str(caught.value)
        model.pause, said = 0.02, []
        with pytest.raises(openai.APIError, match="failed to answer"):
            for chunk in ask(served, "half", stream=True):
                said.append(chunk.choices[0].delta.content)
        assert "".join(said) == "half"
        model.script = say_back
        assert ask(served, "still there").choices[0].message.content == "You said: still there"
    assert capfd.readouterr().out.count("server: a request failed: RuntimeError: broken at /some/path\n") == 2


# ----------------------------------------------------------------------------------------------------------------------
# Hostile requests


def test_requests_that_do_not_fit_are_refused(served, model):
    """Type, size, number, method and address: the right status, an error object in each, and the model is not asked."""
    assert post(served, body_of("x"), Content_Type="text/plain")[0] == 415
    assert post(served, body_of("x" * 6000))[0] == 413
    assert post(served, b"{")[0] == post(served, b"[]")[0] == 400
    assert post(served, json.dumps({"messages": [{"role": "user", "content": "x"}] * 8}).encode())[0] == 400
    assert post(served, body_of("x"), Host="evil.example")[0] == 403
    assert post(served, body_of("x"), Origin="https://evil.example")[0] == 403
    assert post(served, None)[0] == 405 and post(served, b"", path="/")[0] == 405
    assert post(served, b"", path="/v1/nothing")[0] == 404 and post(served, b"", path="/v1/chat/completions/")[0] == 404
    assert model.asked == []
    error = post(served, b"", path="/v1/nothing")[1]["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "/v1/nothing" in error["message"]


def chunked(served, pieces):
    """What is answered to a body that is sent in chunks of unannounced number."""
    with socket.create_connection(("127.0.0.1", served.port)) as bare:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        bare.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                bare.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        return bare.recv(100)


def test_a_body_without_an_end_is_cut_off(model):
    """A body that announces no length is refused once it is too large, and one that comes too slowly after a while."""
    with serving(model, body_seconds=0.3) as served:
        assert chunked(served, [b"x" * 1000] * 50).startswith(b"HTTP/1.1 413")
        assert chunked(served, [b"{"]).startswith(b"HTTP/1.1 408")


HALF_HEADS = [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"]
HALF_HEADS += [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET"]  # a whole one first


@pytest.mark.parametrize("sent", HALF_HEADS, ids=range(4))
def test_a_head_without_an_end_is_dropped(served, sent):
    """A connection that sends no whole head, be it its first or its second, is dropped."""
    with socket.create_connection(("127.0.0.1", served.port)) as bare:
        bare.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while bare.recv(1 << 16):
                pass


def test_nonsense_costs_nothing(served, capfd):
    """Bytes that are no HTTP, huge headers and a WebSocket are refused; the server answers the next one, silently."""
    upgrade = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for raw in (b"\x16\x03\x01" * 50, b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000, b"GET / HTTP/9\r\n\r\n", upgrade):
        with socket.create_connection(("127.0.0.1", served.port)) as bare, contextlib.suppress(ConnectionError):
            bare.sendall(raw)
            bare.recv(100)
    assert ask(served, "hello").choices[0].message.content == "You said: hello"
    out, err = capfd.readouterr()
    assert out == err == ""


def test_connections_are_counted(model):
    """Beyond the limit a connection is dropped; there is room again when another one has left."""
    with serving(model, connections=4, head_seconds=20) as served:
        held = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(4)]
        time.sleep(0.1)
        with pytest.raises(openai.APIConnectionError):
            ask(served, "x")
        for bare in held:
            bare.close()
        time.sleep(0.1)
        assert ask(served, "x").choices


# ----------------------------------------------------------------------------------------------------------------------
# Places


def test_more_than_there_is_room_for(model):
    """Two are answered, two wait and are answered then, a fifth is refused with 429; no more than two run at once."""
    model.script, may_end = lambda prompt: held(prompt), threading.Event()

    def held(prompt):
        yield TextPiece("begun ")
        may_end.wait(20)
        yield TextPiece("ended")

    with serving(model) as served:
        answers, threads = [], []
        for i in range(4):
            fetch = lambda: answers.append(ask(served, "x").choices[0].message.content)
            threads.append(threading.Thread(target=fetch))
            threads[-1].start()
            while len(model.asked) < min(i + 1, 2):
                time.sleep(0.01)
        time.sleep(0.2)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(served, "x")
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "rate_limit_exceeded"
        may_end.set()
        for thread in threads:
            thread.join(10)
        assert answers == ["begun ended"] * 4 and model.most == 2


def test_waiting_has_an_end(model):
    """A request that got no place within queue_seconds is a 429."""
    model.script, model.pause = endless, 0.01
    with serving(model, queue_seconds=0.2) as served, open_stream(served), open_stream(served):
        with pytest.raises(openai.RateLimitError, match=r"no place became free within 0.2 s"):
            ask(served, "x")


def test_an_answer_has_an_end(model):
    """One that takes longer than request_seconds is a 504, or an error event; its place is free."""
    model.script, model.pause, model.context = endless, 0.01, 10**6
    with serving(model, request_seconds=0.3) as served:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(served, "x")
        assert caught.value.status_code == 504 and caught.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="longer than this server"):
            list(ask(served, "x", stream=True))
        model.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_place(model, stream):
    """The answer of a client that closed its connection is cancelled, streamed or not; both places are free again."""
    model.script, model.pause, model.context = endless, 0.01, 10**6
    with serving(model) as served:
        for _ in range(4):
            if stream:
                bare = open_stream(served)
            else:
                bare = socket.create_connection(("127.0.0.1", served.port))
                body = body_of("x")
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                bare.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                while not model.active:
                    time.sleep(0.01)
            bare.close()
            model.wait_until_idle()
        assert len(model.asked) == 4


def test_who_vanishes_in_the_line_is_not_answered(model):
    """A client that left while it waited costs neither a place nor an answer."""
    model.script, model.pause, model.context = endless, 0.01, 10**6
    with serving(model) as served, open_stream(served), open_stream(served) as second:
        waiting = socket.create_connection(("127.0.0.1", served.port))
        body = body_of("I wait")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        waiting.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        time.sleep(0.2)
        waiting.close()
        time.sleep(0.2)
        second.close()
        open_stream(served, "I am next").close()
        assert [last_text(prompt) for prompt, _ in model.asked] == ["go", "go", "I am next"]


def test_a_client_that_reads_nothing_frees_its_place(model):
    """A stream into a full socket is dropped after send_seconds; meanwhile and afterwards others are answered."""
    big = TextPiece("x" * 50_000)
    model.script, model.pause, model.context = lambda prompt: [big] * 10**6, 0.002, 10**9
    with serving(model) as served:
        bare = open_stream(served, receive_buffer=4096)
        assert model.active == 1
        model.script = say_back
        assert ask(served, "meanwhile").choices[0].message.content == "You said: meanwhile"
        model.wait_until_idle(20)
        got = b"x"
        with bare, contextlib.suppress(ConnectionResetError):
            while got:
                got = bare.recv(1 << 20)
                assert b"[DONE]" not in got


def test_a_slow_reader_keeps_no_model_waiting(model):
    """An answer that fits the socket is written at the model's speed; its reader gets all of it a second later."""
    model.script = lambda prompt: pieces("word " * 100)
    with serving(model) as served:
        bare = open_stream(served)
        model.wait_until_idle()
        time.sleep(1)
        got = b""
        while b"[DONE]" not in got:
            got += bare.recv(1000)
        bare.close()


# ----------------------------------------------------------------------------------------------------------------------
# The beginning and the end


def test_the_page_may_run_its_own_script_only(served):
    """It is whole HTML without anything from elsewhere, and its policy names the hash of its one script and style."""
    with urllib.request.urlopen(served.address) as answer:
        page, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert "http" not in page and page.count("<script>") == page.count("<style>") == 1
    assert policy.count("'sha256-") == 2 and "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_what_cannot_be_started_is_one_line(served, monkeypatch):
    """A port in use, an address of another machine, no key where one is needed, and missing packages."""
    talker = ScriptedModel().talker()
    for door, message in [
        (Door(port=served.port), rf"^port={served.port}: cannot listen on 127.0.0.1 .*in use"),
        (Door(host="192.0.2.1", port=0, key="k" * 16), r"^port=0: cannot listen on 192.0.2.1"),
        (Door(host="0.0.0.0"), r"^host='0.0.0.0': .*ONECHIP_API_KEY"),
    ]:
        with pytest.raises(UserError, match=message):
            serve_in_thread(talker, door)
    monkeypatch.setattr("onechip.server.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^serve: starlette and uvicorn must .*pip install starlette uvicorn$"):
        serve_in_thread(talker, Door(port=0))


def test_stop_ends_streams_and_threads(model):
    """Streams get an error event, those in the line a 503, and no thread of the server or of an answer is left."""
    model.script, model.pause, model.context = endless, 0.01, 10**6
    before = set(threading.enumerate())
    with serving(model) as served:
        streams, refused = [open_stream(served) for _ in range(2)], []

        def wait():
            with pytest.raises(openai.InternalServerError) as caught:
                ask(served, "x")
            refused.append(caught.value.status_code)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not served._app._places._line:
            time.sleep(0.01)
        start = time.monotonic()
        served.stop()
        assert time.monotonic() - start < 3
        waiting.join(5)
        assert refused == [503]
        for bare in streams:
            with bare, bare.makefile("rb") as file:
                assert b'"shutting_down"' in file.read()
    assert model.active == 0 and set(threading.enumerate()) <= before


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
from scripted import ScriptedModel, endless
from onechip.server import serve
from onechip.webguard import Door, read_api_key
serve(ScriptedModel(endless, pause=0.01, context=10**6).talker(), Door(port=0, key=read_api_key()))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program(number, interruptible):
    """In the middle of an answer: it ends, the program exits with 0, and its output is three lines without the key."""
    key = "a-key-that-is-never-printed"
    program = PROGRAM.format(paths=[str(ROOT), str(SUPPORT)])
    environment = os.environ | {"ONECHIP_API_KEY": key}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        address = process.stdout.readline().split(" at ")[1].split(";")[0]
        assert process.stdout.readline() == "a key is asked for, as one is set\n"
        stream = openai.OpenAI(base_url=f"{address}/v1", api_key=key).chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "x"}], stream=True
        )
        next(iter(stream))
        process.send_signal(number)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert out == "server: ended\n"
