"""Who may use the server: its key, the Host that a browser names, pages of other websites."""

import asyncio

import pytest

from onechip.errors import UserError
from onechip.webguard import HEADERS, Door, Guard, check_door, read_api_key, send_json

KEY = "a-key-of-25-characters-xy"


def ask(door, path="/v1/models", method="GET", **headers):
    """(status, headers) of an answer to a request with these headers; "host" is 127.0.0.1:8000 if it is not given."""
    sent = []

    async def app(scope, receive, send):
        await send_json(send, 200, {})

    async def send(message):
        sent.append(message)

    pairs = {"host": "127.0.0.1:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in pairs.items() if value is not None]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    asyncio.run(Guard(app, door, keyless=("/",))(scope, None, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


LOCAL, OPEN = Door(), Door(host="0.0.0.0", key=KEY)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost:8000", "LocalHost", "localhost.", "[::1]:8000", "127.0.0.9"]
)
def test_this_machine_s_names_are_known(host):
    """By any of its own names, in any case and with any port, a server on loopback is reached."""
    assert ask(LOCAL, host=host)[0] == 200


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
             "10.0.0.7", "0.0.0.0", "localhost:8000@evil.example", "localhost/", "[::1", "a b", "\u00e4", "2130706433"]
)  # fmt: skip
def test_a_rebound_name_is_refused(host):
    """A website's own name, which may point to 127.0.0.1 by now, is no name of the server; nor is nonsense."""
    assert ask(LOCAL, host=host)[0] == 403


def test_names_may_be_added():
    """Names in `hosts` are known, and those below one that begins with a dot; no others that end alike."""
    door = Door(hosts=("model.example", ".colab.dev"))
    assert [ask(door, host=host)[0] for host in ("model.example", "8000-x.colab.dev:443", "localhost")] == [200] * 3
    assert [ask(door, host=host)[0] for host in ("x.model.example", "evilcolab.dev")] == [403] * 2


def test_beyond_loopback_any_address_is_known_but_no_name():
    """An address cannot be rebound, a name can: with a key or without."""
    auth = {"authorization": f"Bearer {KEY}"}
    assert [ask(OPEN, host=host, **auth)[0] for host in ("10.0.0.7:8000", "[fe80::1]:8000", "evil.example")] == [
        200,
        200,
        403,
    ]


def test_pages_of_other_websites_are_refused():
    """A request with another page's Origin is refused; one of this page or of an allowed one is let in."""
    assert ask(LOCAL, origin="http://127.0.0.1:8000")[0] == 200
    for origin in (
        "https://evil.example",
        "http://127.0.0.1:9000",
        "http://localhost:8000",
        "null",
        "",
        "127.0.0.1:8000",
    ):
        assert ask(LOCAL, origin=origin)[0] == 403, origin
    door = Door(origins=("http://localhost:3000",))
    status, headers = ask(door, origin="http://localhost:3000")
    assert status == 200 and headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "access-control-allow-origin" not in ask(door, origin="http://127.0.0.1:8000")[1]
    status, headers = ask(door, origin="http://localhost:3000", method="OPTIONS")
    assert status == 200 and "POST" in headers["access-control-allow-methods"]
    assert ask(door, origin="http://localhost:3001", method="OPTIONS")[0] == 403


@pytest.mark.parametrize(
    "sent", [None, "", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \u00e4",
             f"bearer{KEY}"]
)  # fmt: skip
def test_a_wrong_key_is_refused(sent):
    """With a key nothing but the page is to be had without it, also on loopback."""
    for door in (Door(key=KEY), OPEN):
        status, headers = ask(door, authorization=sent)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert ask(door, path="/", authorization=sent)[0] == 200


def test_the_right_key_is_let_in():
    """As a bearer token, whose word may be in any case."""
    assert ask(OPEN, authorization=f"Bearer {KEY}")[0] == ask(OPEN, authorization=f"bearer  {KEY} ")[0] == 200


def test_every_answer_says_what_a_page_may_not_do():
    """Refusals too: no frames, no guessing of types, no scripts, no referrer, nothing kept."""
    for answer in (ask(LOCAL), ask(LOCAL, host="evil.example"), ask(OPEN)):
        assert answer[1].items() >= HEADERS.items()


def test_a_door_to_others_needs_a_key(monkeypatch, tmp_path):
    """Bound beyond loopback without a key, or with a short one, is one line; none of them holds a key."""
    for host in ("0.0.0.0", "::", "10.0.0.7", "", "example.com"):
        with pytest.raises(UserError, match=r"^host=.*set ONECHIP_API_KEY"):
            check_door(Door(host=host))
        check_door(Door(host=host, key=KEY))
    for host in ("127.0.0.1", "127.0.0.5", "::1", "localhost"):
        check_door(Door(host=host))
    for key in ("short", "", "k" * 15, "a b" * 9, "k" * 20 + "\n", "\u00e4" * 20):
        with pytest.raises(UserError, match=r"^key: must have at least 16") as caught:
            check_door(Door(key=key))
        assert not key or key not in str(caught.value)
    for origin in ("localhost:3000", "http://a/", "*", "ftp://a", "http://"):
        with pytest.raises(UserError, match=r"^origins="):
            check_door(Door(origins=(origin,)))
    for port in (-1, 65536, "8000", True):
        with pytest.raises(UserError, match=r"^port="):
            check_door(Door(port=port))


def test_where_a_key_comes_from(monkeypatch, tmp_path):
    """From a file that is named, else from the environment; a file that cannot be read is one line."""
    monkeypatch.delenv("ONECHIP_API_KEY", raising=False)
    assert read_api_key() is None
    monkeypatch.setenv("ONECHIP_API_KEY", f" {KEY}\n")
    assert read_api_key() == KEY
    (tmp_path / "key").write_text("another-key-in-a-file\n")
    assert read_api_key(tmp_path / "key") == "another-key-in-a-file"
    with pytest.raises(UserError, match=r"^key_file='.*none': cannot be read \(FileNotFoundError\)"):
        read_api_key(tmp_path / "none")
