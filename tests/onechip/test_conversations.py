"""onechip/conversations.py: nanochat's layout, its mask, and the chat template that is equal to it."""

import importlib
import json
import random

import pytest

from onechip.conversations import (
    BOUNDARY,
    CHAT_SETTINGS,
    ChatTokens,
    assistant_parts,
    chat_tokens,
    render_conversation,
    render_prompt,
)
from onechip.errors import UserError

tok = importlib.import_module("01_tokenizer")

SPELLED = list(tok.SPECIAL_TOKENS)
PIECES = [
    "water",
    " the",
    "\n\n",
    " ",
    ".",
    "<|",
    "|>",
    "<",
    "<|b",
    "<|user",
    "'s",
    "1024",
    "7",
    "数据",
    "é",
    "👩‍🚀",
    "_a",
    "",
]
PIECES += [
    "\r\n",
    "\t",
    "{{ x }}",
    "{% if %}",
    "'",
    '"',
    "\\",
    " <|",
    "!<|",
    "x<|",
    "<|a|>",
    "\x00",
    "\u0301",
    *SPELLED,
]


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return chat_tokens(tokenizer)


@pytest.fixture(scope="module")
def name(tokenizer):
    """name(id) -> the token, as the tokenizer spells it."""
    return tokenizer.id_to_token


def user(text):
    return {"role": "user", "content": text}


def assistant(*content):
    """An assistant's message of a string, or of parts (type, text)."""
    return {"role": "assistant", "content": content[0] if content and isinstance(content[0], str) else parts(content)}


def parts(pairs):
    return [{"type": kind, "text": text} for kind, text in pairs]


def draw_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randrange(8)))


def draw_messages(rng):
    """A conversation of 1 to 7 messages, with or without a system's, of strings and of parts in any order."""
    messages = [{"role": "system", "content": draw_text(rng)}] if rng.random() < 0.3 else []
    for i in range(rng.randrange(1, 7)):
        if i % 2 == 0:
            messages.append(user(draw_text(rng)))
        elif rng.random() < 0.4:
            messages.append(assistant(draw_text(rng) + " "))
        else:
            kinds = rng.choices(["text", "python", "python_output"], [4, 2, 1], k=rng.randrange(7))
            messages.append(assistant(*((kind, draw_text(rng)) for kind in kinds)))
    return messages


def test_the_special_tokens_are_those_of_01():
    """In 01's order, under their names."""
    assert tuple(f"<|{name}|>" for name in ChatTokens._fields[:-1]) == tok.SPECIAL_TOKENS


def test_layout_and_mask_by_hand(tokens, name):
    """Each token of a conversation with a system message and a tool call, and what of it is learned."""
    content = [("text", "a"), ("python", "1+1"), ("python_output", "2"), ("text", "b")]
    messages = [{"role": "system", "content": "S"}, user("U"), assistant(*content), user("V"), assistant("W")]
    ids, mask = render_conversation(tokens, messages)
    newline = name(tokens.encode("\n\n")[0])
    spelled = "<|bos|> <|user_start|> S NL U <|user_end|> <|assistant_start|> a <|python_start|> 1 + 1 <|python_end|> "
    spelled += (
        "<|output_start|> 2 <|output_end|> b <|assistant_end|> <|user_start|> V <|user_end|> <|assistant_start|> "
    )
    spelled = (spelled + "W <|assistant_end|>").split()
    got = [name(i) for i in ids]
    i = got.index(newline)
    got[i : i + len(tokens.encode("\n\n"))] = ["NL"]
    mask[i : i + len(tokens.encode("\n\n"))] = [0]
    assert got == spelled
    learned = [token for token, m in zip(got, mask, strict=True) if m]
    assert learned == "a <|python_start|> 1 + 1 <|python_end|> b <|assistant_end|> W <|assistant_end|>".split()
    assert len(messages) == 5 and messages[1] == user("U"), "the messages themselves stay as they are"


def test_spelled_special_tokens_stay_text(tokens):
    """No special id comes from a message's text, and the text comes back."""
    text = "".join(SPELLED)
    ids, _ = render_conversation(
        tokens, [user(text), assistant(("text", text), ("python", text), ("python_output", text))]
    )
    special = [i for i in ids if i in tokens[:-1]]
    assert [tokens[:-1].index(i) for i in special] == [0, 1, 2, 3, 5, 6, 7, 8, 4]


def test_truncation_and_prompts(tokens):
    """The first max_tokens tokens with their mask; a prompt ends in <|assistant_start|>, after at most so many."""
    messages = [user("water"), assistant("energy"), user("number")]
    ids, mask = render_conversation(tokens, messages, None)
    assert len(ids) == len(mask) > 9
    assert render_conversation(tokens, messages, 9) == (ids[:9], mask[:9])
    assert render_prompt(tokens, messages) == [*ids, tokens.assistant_start]
    assert render_prompt(tokens, messages, 5) == [*ids[:5], tokens.assistant_start]
    assert len(render_conversation(tokens, [user("water " * 3000)])[0]) == 2048
    with pytest.raises(UserError, match=r"messages\[1\].role='assistant': an answer follows"):
        render_prompt(tokens, messages[:2])


def test_a_faster_encoder_gives_the_same_ids(tokens, tokenizer):
    """01's encoder by tiktoken in place of tokenizers'."""
    fast = chat_tokens(tokenizer, tok.fast_encoder(tokenizer).encode_ordinary)
    rng = random.Random(1)
    for _ in range(200):
        messages = draw_messages(rng)
        assert render_conversation(fast, messages) == render_conversation(tokens, messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages=.*at least one message"),
        ("hello", "messages='hello'"),
        ([user("a"), user("b")], r"messages\[1\].role='user': must be assistant here"),
        ([assistant("a")], r"messages\[0\].role='assistant': must be user here"),
        ([user("a"), {"role": "system", "content": "s"}], r"messages\[1\].role='system'"),
        ([{"role": "system", "content": "s"}], "a user's message must follow the system's"),
        ([{"role": "system", "content": "s"}, assistant("a")], r"messages\[1\].role='assistant': must be user"),
        ([user(None)], r"messages\[0\].content=None: must be a string"),
        ([user(parts([("text", "a")]))], r"messages\[0\].content=.*must be a string$"),
        ([user("a"), assistant(("code", "b"))], r"messages\[1\].content\[0\]=.*its type text, python, python_output"),
        ([user("a"), assistant(("text", 5))], r"messages\[1\].content\[0\].text=5: must be a string"),
        ([user("a"), {"role": "assistant", "content": 5}], r"messages\[1\].content=5: must be a string, or a list"),
        ([user(f"a{BOUNDARY}")], "has U.FDD0, which Unicode reserves"),
        ([user("a\ud800")], "half of a surrogate pair"),
        ([3], r"messages\[0\]=3: must be"),
    ],
)
def test_what_is_no_conversation(tokens, messages, message):
    """One line names the message and what would be right."""
    with pytest.raises(UserError, match=message) as caught:
        render_conversation(tokens, messages)
    assert "\n" not in str(caught.value)


def test_tokenizers_without_special_tokens_are_refused(tmp_path):
    """GPT-2's kind has none for conversations."""
    from tiny_gpt2 import write_tokenizer
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer: <|bos|>=None: is needed for conversations"):
        chat_tokens(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))


# ----------------------------------------------------------------------------------------------------------------------
# The template


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """transformers' AutoTokenizer of a tokenizer that is exported for chats."""
    import transformers

    folder = tmp_path_factory.mktemp("chat")
    tok.export_tokenizer(tokenizer, folder, chat=True)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_template_is_the_function(tokens, theirs):
    """The ids of generated conversations and prompts, special tokens spelled in them, are the same."""
    rng = random.Random(0)
    seen = set()
    for _ in range(1500):
        messages = draw_messages(rng)
        ids, _ = render_conversation(tokens, messages, None)
        assert theirs.apply_chat_template(messages)["input_ids"] == ids, messages
        if messages[-1]["role"] == "user":
            prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert prompt == render_prompt(tokens, messages, None)
        seen.update(token for message in messages for token in SPELLED if token in str(message))
    assert seen == set(SPELLED)


def test_the_templates_mask_is_the_functions(tokens, theirs):
    """With return_assistant_tokens_mask, where each tool's output follows a call, as it does in a real conversation."""
    rng = random.Random(2)
    learned = 0
    for _ in range(300):
        messages = draw_messages(rng)
        for message in messages:
            if isinstance(message["content"], list):
                kept = [p for p in message["content"] if p["type"] != "python_output"]
                after = (
                    lambda part: [part, *parts([("python_output", draw_text(rng))])] if rng.random() < 0.7 else [part]
                )
                message["content"] = [q for p in kept for q in (after(p) if p["type"] == "python" else [p])]
        ids, mask = render_conversation(tokens, messages, None)
        made = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert made["input_ids"] == ids and made["assistant_masks"] == mask, messages
        learned += sum(mask)
    assert learned > 1000


@pytest.mark.parametrize("messages", [[user("a"), user("b")], [assistant("a")], [user("a"), assistant(("code", "b"))]])
def test_the_template_refuses_what_the_function_does(theirs, messages):
    """Turns out of order and unknown parts are no conversation there either."""
    with pytest.raises(Exception, match="take turns|a part is text"):
        theirs.apply_chat_template(messages)


def test_an_export_for_chats_can_be_opened_again(tokenizer, theirs, tmp_path):
    """load_tokenizer gives the tokenizer as it was, whose text is cut as in training; plain text has the same ids."""
    tok.export_tokenizer(tokenizer, tmp_path, chat=True, model_max_length=77)
    again = tok.load_tokenizer(tmp_path / "tokenizer.json")
    assert tok.tokenizer_hash(again) == tok.tokenizer_hash(tokenizer)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["chat_template"] == CHAT_SETTINGS["chat_template"] and about["model_max_length"] == 77
    text = "import water, naïve 数据 1024\n\n <|user"
    assert theirs.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    tok.export_tokenizer(tokenizer, tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_an_answer_is_parsed_as_it_was_written(tokens, tokenizer):
    """Parts that are rendered come back, neighbours of one kind apart; what is cut off or out of place is no error."""
    decode = tokenizer.decode
    rng = random.Random(3)
    for _ in range(300):
        kinds = rng.choices(["text", "python", "python_output"], k=rng.randrange(5))
        told = [{"type": kind, "text": draw_text(rng)} for kind in kinds]
        told = [p for p in told if p["text"] or p["type"] != "text"]
        told = [p for i, p in enumerate(told) if i == 0 or not p["type"] == told[i - 1]["type"] == "text"]
        ids, _ = render_conversation(tokens, [user("a"), {"role": "assistant", "content": told}], None)
        answer = ids[ids.index(tokens.assistant_start) + 1 :]
        assert assistant_parts(tokens, [*answer, tokens.user_start, *tokens.encode("more")], decode) == told
    word = tokens.encode("water")
    odd = [tokens.python_end, *word, tokens.output_end, tokens.user_end, tokens.python_start, *word]
    assert assistant_parts(tokens, odd, decode) == parts([("text", "water"), ("python", "water")])
    assert assistant_parts(tokens, [], decode) == []
