"""Requests in the format of OpenAI's API: what is read from them, and what is refused, in its format of errors."""

import json
from typing import Any, NamedTuple

from onechip.conversations import check_messages, check_text
from onechip.errors import UserError, show_value
from onechip.talker import TalkSettings


class ApiError(Exception):
    """What a client is answered instead: an HTTP status and an error object. headers: more of them, (name, value)."""

    def __init__(self, status, message, param=None, code=None, kind="invalid_request_error", headers=()):
        super().__init__(message)
        self.status, self.headers = status, list(headers)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_value(field, value, remedy, code="invalid_value"):
    """The ApiError that says what is wrong with a field."""
    return ApiError(400, f"{field}={show_value(value)}: {remedy}", field, code)


class Ask(NamedTuple):
    """What a request asks for. prompt: messages, or a text; stream, usage: whether events and their count are sent."""

    prompt: Any
    settings: TalkSettings
    stream: bool
    usage: bool
    chat: bool


NOTHING = object()
# Parameters that change nothing in an answer, so any value will do.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
IGNORED |= {"prompt_cache_retention", "parallel_tool_calls"}
# Parameters that this server lacks, at the values that ask for nothing; null is such a value of each.
NEUTRAL = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
NEUTRAL_CHAT = NEUTRAL | {"logprobs": False, "top_logprobs": NOTHING, "tools": [], "functions": [], "audio": NOTHING}
NEUTRAL_CHAT |= {"tool_choice": "none", "function_call": "none", "modalities": ["text"], "prediction": NOTHING}
NEUTRAL_CHAT |= {"response_format": {"type": "text"}, "reasoning_effort": "none", "verbosity": NOTHING}
NEUTRAL_CHAT |= {"web_search_options": NOTHING}
NEUTRAL_TEXT = NEUTRAL | {"logprobs": NOTHING, "echo": False, "best_of": 1, "suffix": ""}
KNOWN_FIELDS = {"model", "stream", "stream_options", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens"}
COMPLETION_TOKENS = 16  # of an answer to /v1/completions that names no number, as at OpenAI


# ----------------------------------------------------------------------------------------------------------------------
# Single fields


def parse_json(raw):
    """A request's body, a JSON object, as a dict."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(raw.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body of the request is not valid JSON.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The body of the request must be a JSON object.", code="invalid_json")
    return body


def number_of(body, field, low, high, default, kinds=(int, float)):
    """A number of the body, between low and high; `default` where it is missing or null."""
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise bad_value(field, value, f"must be {'an integer' if kinds is int else 'a number'}", "invalid_type")
    if not low <= value <= high:
        raise bad_value(field, value, f"must be from {low} to {high}")
    return value


def flag_of(body, field):
    """A boolean of the body, False where it is missing or null."""
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise bad_value(field, value, "must be true or false", "invalid_type")
    return bool(value)


def stop_strings(body):
    """The strings that end an answer: at most four, each of 1 to 200 characters."""
    given = body.get("stop")
    strings = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(strings, list) or len(strings) > 4:
        raise bad_value("stop", given, "must be a string, or a list of at most four")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= 200:
            raise bad_value("stop", string, "must be a string of 1 to 200 characters")
    return tuple(strings)


def plain_text(content, field):
    """The text of a message's content: a string, or a list of parts of the type text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_value(field, content, "must be a string, or a list of text parts", "invalid_type")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad_value(f"{field}[{i}]", part, 'only text can be read here: {"type": "text", "text": ...}')
    return "".join(part["text"] for part in content)


# ----------------------------------------------------------------------------------------------------------------------
# Messages


def read_message(message, field):
    """A message as onechip.conversations has it; an assistant's keeps its parts python and python_output."""
    if not isinstance(message, dict):
        raise bad_value(field, message, 'must be {"role": ..., "content": ...}', "invalid_type")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise bad_value(f"{field}.role", role, "must be system, user or assistant; tools are run by the server itself")
    if message.get("tool_calls") or message.get("function_call"):
        raise bad_value(f"{field}.tool_calls", message.get("tool_calls"), "tools are run by the server itself")
    parts = content if role == "assistant" and isinstance(content, list) else []
    if any(isinstance(part, dict) and part.get("type") in ("python", "python_output") for part in parts):
        return {"role": role, "content": parts}  # checked with the conversation
    return {"role": "system" if role == "developer" else role, "content": plain_text(content, f"{field}.content")}


def read_messages(body, most):
    """The messages of a chat, at most `most`, checked: a system's may be first, then user and assistant take turns."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise bad_value("messages", given, "must be a list of at least one message", "invalid_type")
    if len(given) > most:
        raise ApiError(400, f"messages: {len(given)} of them; must be at most {most}", "messages", "array_above_max")
    messages = [read_message(message, f"messages[{i}]") for i, message in enumerate(given)]
    try:
        check_messages(messages)
    except UserError as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from None
    if messages[-1]["role"] != "user":
        raise bad_value(f"messages[{len(messages) - 1}].role", messages[-1]["role"], "an answer follows a user's")
    return messages


def read_prompt(body):
    """The text that is to be continued: a string, or a list of one."""
    given = body.get("prompt")
    prompt = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(prompt, str):
        raise bad_value("prompt", given, "must be a string, or a list of one; token ids cannot be read here")
    try:
        check_text(prompt, "prompt")
    except UserError as error:
        raise ApiError(400, str(error), "prompt", "invalid_value") from None
    return prompt


# ----------------------------------------------------------------------------------------------------------------------
# Whole requests


def check_known(body, neutral, known):
    """ApiError for the first parameter that is unknown, or that asks for what this server lacks."""
    for field, value in body.items():
        if field in known or field in IGNORED:
            continue
        if field not in neutral:
            raise ApiError(400, f"Unrecognized request argument: {show_value(field)}", field[:200], "unknown_parameter")
        same = value == neutral[field] and isinstance(value, bool) == isinstance(neutral[field], bool)
        if value is not None and not same:
            only = "" if neutral[field] is NOTHING else f"; only {json.dumps(neutral[field])} is"
            raise bad_value(field, value, f"is not supported by this server{only}", "unsupported_parameter")


def talk_settings_of(body, context, default):
    """The TalkSettings of a request; context: the most tokens; default: how many where the request names no number."""
    most = number_of(body, "max_completion_tokens", 1, context, None, int)
    if most is None:
        most = number_of(body, "max_tokens", 1, context, default, int)
    seed = number_of(body, "seed", -(2**63), 2**63 - 1, None, int)
    top_p = number_of(body, "top_p", 0, 1, 1.0)
    if top_p == 0:
        raise bad_value("top_p", top_p, "must be above 0")
    return TalkSettings(
        temperature=float(number_of(body, "temperature", 0, 2, 1.0)),
        top_k=number_of(body, "top_k", 0, 2**31 - 1, 0, int),
        top_p=float(top_p),
        max_tokens=most,
        seed=None if seed is None else seed % 2**32,
        stop=stop_strings(body),
    )


def wants_usage(body, stream):
    """Whether stream_options asks for a last event with the numbers of tokens."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise bad_value("stream_options", options, 'must be {"include_usage": true or false}, and stream true')
    return flag_of(options, "include_usage")


def read_request(raw, talker, chat, most_messages):
    """A request to /v1/chat/completions, or /v1/completions if not `chat`, as an Ask; ApiError if it does not fit.

    raw: its body, bytes.
    """
    try:
        return read_fields(parse_json(raw), talker, chat, most_messages)
    except RecursionError:  # a value that Python could just about read, but not show
        raise ApiError(400, "The body of the request is nested too deeply.", code="invalid_json") from None


def read_fields(body, talker, chat, most_messages):
    """The Ask of a parsed body, a dict."""
    model = body.get("model")
    if model is not None and model != talker.name:
        raise unknown_model(model, talker)
    if chat:
        check_known(body, NEUTRAL_CHAT, KNOWN_FIELDS | {"messages", "max_completion_tokens"})
    else:
        check_known(body, NEUTRAL_TEXT, KNOWN_FIELDS | {"prompt"})
    stream = flag_of(body, "stream")
    usage = wants_usage(body, stream)
    settings = talk_settings_of(body, talker.context, None if chat else min(COMPLETION_TOKENS, talker.context))
    prompt = read_messages(body, most_messages) if chat else read_prompt(body)
    return Ask(prompt, settings, stream, usage, chat)


def unknown_model(name, talker):
    """The ApiError for another model's name."""
    message = f"model={show_value(name)}: is not here; use {talker.name!r}"
    return ApiError(404, message, "model", "model_not_found")
