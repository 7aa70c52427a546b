"""An answer's parts from its events, and its cut at a stop string."""

import random

from onechip.talker import StopStrings, TalkDone, TextPiece, ToolCall, ToolOutput, add_part, text_of


def test_parts_of_an_answer():
    """Text in a row is one part; code and output are parts of their own; what is said leaves them out."""
    parts, events = [], [TextPiece("a"), TextPiece("b"), ToolCall("1+1"), ToolOutput("2"), TextPiece("c")]
    for event in [*events, TalkDone("stop", 3, 4)]:
        add_part(parts, event)
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "ab"), ("python", "1+1"), ("python_output", "2"), ("text", "c")
    ]  # fmt: skip
    assert text_of(parts) == "abc"


def test_a_text_is_cut_however_it_is_split():
    """Any pieces of a text give what comes before the first stop string in it, or all of it; never a part of it."""
    source = random.Random(18)
    cut = 0
    for _ in range(3000):
        text = "".join(source.choices("ab", k=source.randint(0, 12)))
        stop = tuple("".join(source.choices("ab", k=source.randint(1, 5))) for _ in range(source.randint(0, 3)))
        strings, said, left = StopStrings(stop), "", text
        while left and not strings.found:
            size = source.randint(1, 4)
            said += strings.add(left[:size])
            left = left[size:]
        said += strings.rest()
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(stop)] if stop else []
        longest = max((len(string) for string in stop if ends and text[: ends[0]].endswith(string)), default=0)
        assert strings.found == bool(ends) and said == (text[: ends[0] - longest] if ends else text)
        cut += strings.found
    assert 1000 < cut < 2900
