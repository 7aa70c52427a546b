"""A user's own conversations, who the model is, say: a file with one in each line, as JSON."""

import json
from pathlib import Path

from onechip.conversations import check_messages
from onechip.errors import UserError, first_line, require

LARGEST_FILE = 1 << 30  # bytes


def read_conversations(path):
    """The conversations of a JSONL file, each a list of messages; UserError names file, line and field.

    A line is a list of messages or an object with "messages"; empty lines are left out. Each conversation ends with an
    assistant's message, as there is nothing to learn from one that does not.
    """
    try:
        size = Path(path).stat().st_size
        require(size <= LARGEST_FILE, "conversations", str(path), f"has {size:,} bytes: at most {LARGEST_FILE:,}")
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"conversations={str(path)!r}: cannot be read ({first_line(error)})") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(read_line(line))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    require(found, "conversations", str(path), "has none: one in each line, as JSON")
    return found


def read_line(line):
    """The messages of one line; UserError names the field."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON ({first_line(error)})") from None
    if isinstance(value, dict):
        require("messages" in value, "messages", None, "is missing")
        value = value["messages"]
    check_messages(value)
    role = value[-1]["role"]
    require(role == "assistant", f"messages[{len(value) - 1}].role", role, "must be assistant: it says the last word")
    return value
