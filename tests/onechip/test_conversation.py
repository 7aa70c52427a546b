"""A conversation in plain text: history, commands, errors, tools in lines of their own, no raw control characters."""

import os
import signal
import threading
import time

import pytest
from scripted import ScriptedModel, endless, pieces

from onechip.conversation import Conversation, events_of, without_controls
from onechip.talker import Talker, TalkSettings, TextPiece, ToolCall, ToolOutput


def converse(model, *lines, faint=str):
    """What is written out for these lines, and the Conversation."""
    written = []
    conversation = Conversation(model.talker(), TalkSettings(), written.append, faint)
    kept = [conversation.take_line(line) for line in lines]
    return "".join(written), conversation, kept


def test_a_history_is_kept():
    """Each question is asked with all before it, the tools' parts too; /new forgets them; blank lines ask nothing."""
    model = ScriptedModel()
    written, conversation, kept = converse(model, "one", "", "2*3", "/new", "three")
    tool = "Let me see. \npython> 2*3\noutput> 6\nIt is 6.\n"
    assert written == f"You said: one\n{tool}a new conversation\nYou said: three\n"
    asked = [prompt for prompt, _ in model.asked]
    assert [len(prompt) for prompt in asked] == [1, 3, 1] and kept == [True] * 5
    assert asked[1][1]["content"] == [{"type": "text", "text": "You said: one"}]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_commands():
    """A temperature is taken or refused in a line; help names every command; an unknown one is no question."""
    model = ScriptedModel()
    written, conversation, kept = converse(
        model, "/temperature 0.25", "x", "/temperature", "/temperature hot", "/temperature nan", "/temperature 3",
        "/temp\x1b", "/help", "/quit",
    )  # fmt: skip
    lines = written.splitlines()
    assert lines[:2] == ["temperature: 0.25", "You said: x"] and model.asked[0][1].temperature == 0.25
    assert [line.startswith("error: temperature=") for line in lines[2:6]] == [True] * 4
    assert lines[6] == "/temp\u241b is no command; /help lists them"
    for command in ("/new", "/temperature", "/help", "/quit"):
        assert f"\n{command} " in written
    assert kept == [True] * 8 + [False] and len(model.asked) == 1 and conversation.settings.temperature == 0.25


def test_errors_are_lines_and_leave_no_trace():
    """A prompt that is too long, and a model that fails in mid-answer: one line each, and the history is as before."""
    model = ScriptedModel()
    written, conversation, _ = converse(model, "fine", "word " * 250, "again")
    lines = written.splitlines()
    assert lines[0] == "You said: fine" and lines[1].startswith("error: prompt: 2") and lines[2] == "You said: again"
    assert len(conversation.messages) == 4
    model.script = lambda prompt: [*pieces("so far "), ValueError("broken\nin two lines")]
    written, conversation, _ = converse(model, "x")
    assert written == "so far \nerror: ValueError: broken\n" and conversation.messages == []


def test_why_an_answer_ended_is_said():
    """One that reached its most tokens says so, in faint letters as the tools do."""
    model = ScriptedModel(lambda prompt: [ToolCall("a\nb"), ToolOutput(""), TextPiece("1"), TextPiece("2")])
    written = []
    conversation = Conversation(model.talker(), TalkSettings(max_tokens=3), written.append, lambda text: f"<{text}>")
    conversation.take_line("x")
    lines = ["<python> a>", "<python> b>", "<output> >", "1", "<(cut off: the most tokens were reached)>"]
    assert "".join(written).splitlines() == lines


def test_no_control_character_comes_through():
    """Of all characters, only line breaks and tabs of the control characters are left; nor what reorders."""
    text = "".join(map(chr, range(0x300)))
    shown = without_controls(text)
    assert [char for char in shown if ord(char) < 32 or 127 <= ord(char) < 160] == ["\t", "\n"]
    assert without_controls("\x1b]0;title\x07\x9b2J\r\u202egnp.exe") == "\u241b]0;title\u2407<9B>2J\u240d<202E>gnp.exe"
    assert (
        without_controls("na\u00efve \U0001f469\u200d\U0001f680 \u05d0\u0628")
        == "na\u00efve \U0001f469\u200d\U0001f680 \u05d0\u0628"
    )
    assert without_controls("\ud800").isprintable()


def press_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_stops_an_answer(in_time, interruptible):
    """The answer ends as cancelled, what came is kept, and Ctrl-C acts as before afterwards."""
    model = ScriptedModel(endless, pause=0.01, context=10**6)
    press_after(0.5)
    written, conversation, [continues] = converse(model, "go on and on")
    assert continues and written.startswith("word0 word1 ") and written.endswith("\n(stopped)\n")
    assert conversation.messages[1]["content"][0]["text"].startswith("word0 ") and model.active == 0
    with pytest.raises(KeyboardInterrupt):
        press_after(0.1)
        time.sleep(5)


def test_what_hangs_can_be_left(in_time, interruptible, monkeypatch):
    """A Talk that does not end when it is cancelled is left by pressing Ctrl-C again; never by the first."""
    monkeypatch.setattr("onechip.conversation.INSIST_SECONDS", 0.2)

    class Hanging:
        def __iter__(self):
            yield TextPiece("x")
            time.sleep(20)

        def cancel(self):
            pass

    press_after(0.2)
    press_after(0.8)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(events_of(Talker("x", 9, 1, lambda prompt, settings: Hanging()), "x", TalkSettings()))
    assert time.monotonic() - start > 0.7


def test_an_answer_that_is_left_is_cancelled():
    """Whoever stops reading events frees the answer's place; from another thread than the main one, too."""
    model = ScriptedModel(endless, pause=0.01, context=10**6)

    def read_two():
        events = events_of(model.talker(), "x", TalkSettings())
        next(events), next(events)
        events.close()

    thread = threading.Thread(target=read_two)
    thread.start()
    thread.join(5)
    model.wait_until_idle()
