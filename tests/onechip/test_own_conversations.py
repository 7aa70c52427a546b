"""onechip/own_conversations.py: a user's file of conversations."""

import json

import pytest

from onechip.errors import UserError
from onechip.own_conversations import read_conversations

WHO = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Ada."}]


def line(value=None, **more):
    return json.dumps(WHO if value is None else value) if not more else json.dumps(more)


def test_both_forms_are_read(tmp_path):
    """A list of messages, or an object that has it; empty lines, a byte-order mark, Windows' line ends do no harm."""
    path = tmp_path / "me.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([line(), "", line(messages=WHO, source="x"), ""]).encode())
    assert read_conversations(path) == [WHO, WHO]


@pytest.mark.parametrize(
    "bad, said",
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("3", "messages=3: must be a list"),
        (line(text="hi"), "messages=None: is missing"),
        (line(WHO[:1]), r"messages\[0\].role='user': must be assistant: it says the last word"),
        (line([*WHO, *WHO[1:]]), r"messages\[2\].role='assistant': must be user here"),
        (line([WHO[0], {"role": "assistant", "content": 5}]), r"messages\[1\].content=5: must be a string"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path, bad, said):
    """In one line."""
    path = tmp_path / "me.jsonl"
    path.write_text(f"{line()}\n\n{bad}\n")
    with pytest.raises(UserError, match=f"me.jsonl, line 3: {said}") as caught:
        read_conversations(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_such_file_is_named(tmp_path):
    """A file that is not there, that is empty, or that is no text."""
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, said in (("none", "cannot be read"), ("empty", "has none"), ("bytes", "cannot be read")):
        with pytest.raises(UserError, match=f"conversations='.*{name}': {said}"):
            read_conversations(tmp_path / name)
