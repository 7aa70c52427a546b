"""What is read from requests in OpenAI's format, and what is refused: with the field, its value and what would do."""

import json

import pytest
from scripted import ScriptedModel

from onechip.openai_requests import ApiError, parse_json, read_request

TALKER = ScriptedModel(context=50).talker()
HELLO = [{"role": "user", "content": "hello"}]


def read(chat=True, **fields):
    body = ({"messages": HELLO} if chat else {"prompt": "hello"}) | fields
    return read_request(json.dumps(body).encode(), TALKER, chat, 7)


def refused(chat=True, **fields):
    """(status, error object) of what is refused."""
    with pytest.raises(ApiError) as caught:
        read(chat, **fields)
    return caught.value.status, caught.value.body["error"]


def test_what_is_not_named_has_openai_s_defaults():
    """Temperature and top_p are 1; a chat's answer is as long as fits, a completion's has 16 tokens."""
    ask = read()
    assert ask.prompt == HELLO and not ask.stream and not ask.usage
    assert ask.settings == (1.0, 0, 1.0, None, None, ())
    assert read(chat=False).settings.max_tokens == 16
    assert read(max_tokens=None, stop=None, temperature=None, n=None, tools=None).settings == ask.settings


def test_settings_are_read():
    """Each setting by its name in the API; a seed is taken modulo 2**32; max_completion_tokens is the newer name."""
    ask = read(temperature=0, top_p=0.5, top_k=9, seed=-1, stop="END", max_tokens=7, stream=True)
    assert ask.settings == (0.0, 9, 0.5, 7, 2**32 - 1, ("END",)) and ask.stream
    assert read(stop=["a", "b"], max_completion_tokens=5, max_tokens=7).settings[3:] == (5, None, ("a", "b"))
    assert read(stream=True, stream_options={"include_usage": True}).usage
    assert read(user="me", metadata={"a": "b"}, n=1, logprobs=False, tools=[], response_format={"type": "text"})


def test_content_may_be_parts():
    """Content is a string or text parts; developer is system; an assistant's python and output stay what they are."""
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    used = [{"type": "python", "text": "1 + 1"}, {"type": "python_output", "text": "2"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": parts}]
    messages += [{"role": "assistant", "content": used}, {"role": "user", "content": "so?"}]
    system, user, assistant, _ = read(messages=messages).prompt
    assert system == {"role": "system", "content": "one two"} and user == {"role": "user", "content": "one two"}
    assert assistant["content"] == used
    assert read(chat=False, prompt=["once"]).prompt == "once"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.1}, {"temperature": -0.1}, {"temperature": "1"}, {"temperature": True}, {"top_p": 0},
        {"top_p": 1.5}, {"top_k": -1}, {"top_k": 1.5}, {"max_tokens": 0}, {"max_tokens": 51}, {"max_tokens": 3.5},
        {"max_completion_tokens": 10**30}, {"seed": 2**63}, {"seed": 1.0}, {"stop": ""}, {"stop": ["a"] * 5},
        {"stop": [1]}, {"stop": {"a": 1}}, {"stream": "yes"}, {"stream": 1}, {"n": 2}, {"n": True}, {"logprobs": True},
        {"top_logprobs": 3}, {"presence_penalty": 0.5}, {"logit_bias": {"5": 1}}, {"tools": [{"type": "function"}]},
        {"tool_choice": "required"}, {"response_format": {"type": "json_object"}}, {"stream_options": {}},
        {"audio": {}}, {"modalities": ["text", "audio"]}, {"frequencypenalty": 0}, {"model": "gpt-4o"}, {"model": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_parameter_that_does_not_fit_is_named(fields):
    """The error names the parameter in `param` and in its message, in one line."""
    status, error = refused(**fields)
    [name] = fields
    assert status == (404 if name == "model" else 400)
    assert error["param"] == name and name in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hello", {}, [3], [{}], [{"role": "user"}], [{"role": "tool", "content": "x"}], HELLO * 2, HELLO * 8,
        [{"role": "user", "content": 5}], [{"role": "user", "content": []}], [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [None]}],
        [{"role": "user", "content": [{"type": "python", "text": "1"}]}], [{"role": "assistant", "content": "x"}],
        [*HELLO, {"role": "assistant", "content": "x"}], [{"role": "system", "content": "x"}],
        [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "a\ufdd0"}], [*HELLO, {"role": []}],
        [*HELLO, {"role": "assistant", "content": [{"type": "python", "text": 3}]}, *HELLO],
        [*HELLO, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *HELLO],
    ],
    ids=str,
)  # fmt: skip
def test_messages_that_are_no_conversation_are_refused(messages):
    """Wrong types, roles, order, parts and numbers of messages: each is an error of status 400 that names the place."""
    status, error = refused(messages=messages)
    assert status == 400 and error["param"].startswith("messages") and "messages" in error["message"]


@pytest.mark.parametrize(
    "fields", [{"prompt": None}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"echo": True}, {"best_of": 2},
               {"suffix": "x"}, {"logprobs": 0}, {"messages": HELLO}, {"prompt": "\udfff"}], ids=str
)  # fmt: skip
def test_completions_that_do_not_fit_are_refused(fields):
    """Several prompts, token ids, and what only OpenAI's own models do, are refused by name."""
    status, error = refused(chat=False, **fields)
    assert status == 400 and error["param"] == next(iter(fields))


@pytest.mark.parametrize(
    "raw",
    [b"", b"hello", b"[]", b'"x"', b"{", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 100_000, b"\xff\xfe{}",
     b'{"a": ' + b"9" * 5000 + b"}"],
    ids=[f"raw{i}" for i in range(10)],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(raw):
    """Also numbers that JSON lacks, numbers beyond Python's limit of digits, and nesting beyond its stack."""
    with pytest.raises(ApiError) as caught:
        parse_json(raw)
    assert caught.value.status == 400 and caught.value.body["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("field", ["stop", "prompt", "model", "tools", "unknown"])
def test_deep_nesting_is_refused_at_every_depth(field):
    """Lists in lists as deep as Python can read, or can read but not show, or cannot read: a refusal, no failure."""
    for depth in (10, 500, *range(880, 1010), *range(9980, 10010), 100_000):  # around the limits of 3.11 and of 3.13
        raw = b'{"%s": %s%s}' % (field.encode(), b"[" * depth, b"]" * depth)
        with pytest.raises(ApiError) as caught:
            read_request(raw, TALKER, False, 7)
        assert caught.value.status in (400, 404) and len(str(caught.value)) < 300


def test_a_long_value_is_cut():
    """An error does not send a client's megabyte back."""
    _, error = refused(**{"x" * 100_000: 1})
    assert len(error["message"]) < 300 and len(error["param"]) <= 200
    _, error = refused(stop=["y" * 100_000])
    assert len(error["message"]) < 300
