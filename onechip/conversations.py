"""Conversations as token ids, with a mask of what a model learns to say; and the same layout as a chat template.

The layout is nanochat's: <|bos|>, then <|user_start|>text<|user_end|> and <|assistant_start|>...<|assistant_end|> in
turn. An assistant's message is a string, or parts: text, python between <|python_start|> and <|python_end|>, and what
that printed, python_output, between <|output_start|> and <|output_end|>. Text is encoded apart from the special tokens
around it, and one that is spelled out in it stays text.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from tokenizers import Tokenizer

from onechip.errors import UserError, require

MAX_TOKENS = 2048
PART_TYPES = ("text", "python", "python_output")
# Unicode keeps this code point for a program's own use: no text has it. In a rendered template it says where the text
# is cut, and a tokenizer that is exported for chats drops it.
BOUNDARY = "\ufdd0"


class ChatTokens(NamedTuple):
    """The ids of the special tokens <|bos|> to <|output_end|>, in order, and encode(text) -> ids of plain text."""

    bos: int
    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int
    python_start: int
    python_end: int
    output_start: int
    output_end: int
    encode: Callable


def chat_tokens(tokenizer, encode=None):
    """The ChatTokens of a tokenizers.Tokenizer; UserError if it has none. encode: a faster one of the same ids."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ChatTokens._fields[:-1]}
    for name, i in ids.items():
        require(i is not None, f"tokenizer: <|{name}|>", None, "is needed for conversations; GPT-2's has none of them")
    tokenizer.encode_special_tokens = True  # spelled out in a text, they are text
    return ChatTokens(**ids, encode=encode or (lambda text: tokenizer.encode(text, add_special_tokens=False).ids))


# ----------------------------------------------------------------------------------------------------------------------
# What a conversation is


def check_text(text, field):
    """UserError unless a value is text that can be encoded, and whose end no program has marked."""
    require(isinstance(text, str), field, text, "must be a string")
    require(BOUNDARY not in text, field, text, "has U+FDD0, which Unicode reserves for programs: leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        require(False, field, text, "has half of a surrogate pair, which is no text")


def check_content(role, content, field):
    """UserError unless `content` is what a message of this role may hold."""
    if role != "assistant" or not isinstance(content, list):
        kinds = "a string, or a list of parts" if role == "assistant" else "a string"
        require(isinstance(content, str), field, content, f"must be {kinds}")
        return check_text(content, field)
    for i, part in enumerate(content):
        known = isinstance(part, dict) and part.get("type") in PART_TYPES
        require(known, f"{field}[{i}]", part, f'must be {{"type": ..., "text": ...}}, its type {", ".join(PART_TYPES)}')
        check_text(part.get("text"), f"{field}[{i}].text")


def check_messages(messages):
    """The messages of a conversation, {"role", "content"}, with a system message put ahead of the first user's text.

    UserError names the first message that does not fit: user and assistant take turns, the user begins.
    """
    require(isinstance(messages, list) and messages, "messages", messages, "must be a list of at least one message")
    first = messages[0].get("role") if isinstance(messages[0], dict) else None
    system = first == "system"
    for i, message in enumerate(messages):
        require(isinstance(message, dict), f"messages[{i}]", message, 'must be {"role": ..., "content": ...}')
        role = "system" if system and i == 0 else ("user", "assistant")[(i - system) % 2]
        require(message.get("role") == role, f"messages[{i}].role", message.get("role"), f"must be {role} here")
        check_content(role, message.get("content"), f"messages[{i}].content")
    if not system:
        return messages
    require(len(messages) > 1, "messages", messages, "a user's message must follow the system's")
    merged = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [merged, *messages[2:]]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def assistant_pieces(tokens, content):
    """Yields (ids, learned) of an assistant's message between <|assistant_start|> and <|assistant_end|>."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content:
        ids = tokens.encode(part["text"])
        if part["type"] == "python":
            ids = [tokens.python_start, *ids, tokens.python_end]
        elif part["type"] == "python_output":
            ids = [tokens.output_start, *ids, tokens.output_end]
        yield ids, part["type"] != "python_output"


def render_conversation(tokens, messages, max_tokens=MAX_TOKENS):
    """A conversation as (ids, mask), two lists of int; mask is 1 where the model learns to say the token.

    Those are an assistant's text, python with its delimiters, and <|assistant_end|>. What stands elsewhere is given to
    it: <|bos|>, the user's messages, <|assistant_start|>, and what tools return. The first max_tokens are kept, all if
    it is None. tokens: ChatTokens. UserError as in check_messages.
    """
    pieces = [([tokens.bos], False)]
    for message in check_messages(messages):
        if message["role"] == "user":
            pieces.append(([tokens.user_start, *tokens.encode(message["content"]), tokens.user_end], False))
        else:
            pieces.append(([tokens.assistant_start], False))
            pieces += assistant_pieces(tokens, message["content"])
            pieces.append(([tokens.assistant_end], True))
    ids = [i for piece, _ in pieces for i in piece]
    mask = [int(learned) for piece, learned in pieces for _ in piece]
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tokens, messages, max_tokens=MAX_TOKENS):
    """The ids that an assistant's answer follows: the messages, at most max_tokens of them, and <|assistant_start|>.

    UserError unless the last message is a user's.
    """
    ids, _ = render_conversation(tokens, messages, max_tokens)
    role = messages[-1]["role"]
    require(role == "user", f"messages[{len(messages) - 1}].role", role, "an answer follows a user's message")
    return [*ids, tokens.assistant_start]


def assistant_parts(tokens, ids, decode):
    """The parts of an assistant's message from the ids after <|assistant_start|>, up to <|assistant_end|> if it came.

    The inverse of assistant_pieces, for whatever a model has written: what is cut off or not closed is a part as well,
    and special tokens that have no place there are left out. decode(ids) -> text.
    """
    kinds = {tokens.python_start: "python", tokens.output_start: "python_output"}
    ends, parts, kind, run = (tokens.python_end, tokens.output_end), [], "text", []

    def close():
        if run or kind != "text":
            parts.append({"type": kind, "text": decode(run)})

    for i in ids:
        if i in (tokens.assistant_end, tokens.bos):
            break
        if i in kinds or i in ends:
            close()
            kind, run = kinds.get(i, "text"), []
        elif i not in tokens[:-1]:
            run.append(i)
    close()
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# The same as a chat template, for transformers and what else reads its files

# A template renders one string, in which the tokenizer then looks for special tokens. BOUNDARY keeps those that are
# spelled out in a message from being found, and two texts in a row apart. The split pattern cuts between "<|" and a
# letter anyway: the ids are those of the text without it. `generation` marks what is learned, see render_conversation.
CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
    {%- set ns = namespace(text=text) -%}
    {%- for letter in "abopu" -%}
        {%- set ns.text = ns.text | replace("<|" ~ letter, "<|BOUNDARY" ~ letter) -%}
    {%- endfor -%}
    {{- ns.text -}}
{%- endmacro -%}
{%- set ns = namespace(system="", turn=0, said="", after_text=false) -%}
{{- "<|bos|>" -}}
{%- for message in messages -%}
    {%- if message["role"] == "system" and loop.first -%}
        {%- set ns.system = message["content"] ~ "\\n\\n" -%}
    {%- elif message["role"] != ["user", "assistant"][ns.turn % 2] -%}
        {{- raise_exception("a system message may come first, then user and assistant must take turns") -}}
    {%- elif message["role"] == "user" -%}
        {{- "<|user_start|>" ~ plain(ns.system ~ message["content"]) ~ "<|user_end|>" -}}
        {%- set ns.system = "" -%}
        {%- set ns.turn = ns.turn + 1 -%}
    {%- else -%}
        {{- "<|assistant_start|>" -}}
        {%- set ns.said = "" -%}
        {%- set ns.after_text = false -%}
        {%- set ns.turn = ns.turn + 1 -%}
        {%- if message["content"] is string -%}
            {%- set ns.said = plain(message["content"]) -%}
        {%- else -%}
            {%- for part in message["content"] -%}
                {%- if part["type"] == "python_output" -%}
                    {%- if ns.said -%}{%- generation -%}{{- ns.said -}}{%- endgeneration -%}{%- endif -%}
                    {{- "<|output_start|>" ~ plain(part["text"]) ~ "<|output_end|>" -}}
                    {%- set ns.said = "" -%}
                    {%- set ns.after_text = false -%}
                {%- elif part["type"] == "python" -%}
                    {%- set ns.said = ns.said ~ "<|python_start|>" ~ plain(part["text"]) ~ "<|python_end|>" -%}
                    {%- set ns.after_text = false -%}
                {%- elif part["type"] != "text" -%}
                    {{- raise_exception("a part is text, python or python_output") -}}
                {%- elif part["text"] -%}
                    {%- set ns.said = ns.said ~ ("BOUNDARY" if ns.after_text else "") ~ plain(part["text"]) -%}
                    {%- set ns.after_text = true -%}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {%- generation -%}{{- ns.said ~ "<|assistant_end|>" -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant_start|>" -}}{%- endif -%}
""".replace("BOUNDARY", BOUNDARY)

# Entries of tokenizer_config.json. The template's special tokens must be found in the string that it renders, so here,
# unlike in the tokenizer of a pretrained model, one that is spelled out in a plain text is a special token too.
CHAT_SETTINGS = {"chat_template": CHAT_TEMPLATE, "split_special_tokens": False, "eos_token": "<|assistant_end|>"}

DROP_BOUNDARY = {"type": "Split", "pattern": {"String": BOUNDARY}, "behavior": "Removed", "invert": False}


def with_boundary(tokenizer):
    """A copy of a tokenizer for CHAT_TEMPLATE: it cuts at BOUNDARY, which leaves no token."""
    parsed = json.loads(tokenizer.to_str())
    steps = parsed["pre_tokenizer"]
    if steps["type"] != "Sequence":
        raise UserError(f"tokenizer: {steps['type']} cuts its text, which is not the pattern that chats need")
    steps["pretokenizers"].insert(0, DROP_BOUNDARY)
    return Tokenizer.from_str(json.dumps(parsed))


def without_boundary(tokenizer):
    """The tokenizer that with_boundary was given; any other comes back as it is."""
    parsed = json.loads(tokenizer.to_str())
    steps = (parsed["pre_tokenizer"] or {}).get("pretokenizers", [])
    if DROP_BOUNDARY not in steps[:1]:
        return tokenizer
    del steps[0]
    return Tokenizer.from_str(json.dumps(parsed))
