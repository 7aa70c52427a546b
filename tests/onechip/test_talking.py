"""What --talk and --serve open: a desk with its tools and options, refused in a line before anything is opened."""

import io
import sys
import types

import openai
import pytest
from configs import quick_compiler  # noqa: F401  (a fixture for every test)
from letters import CONFIG, SCRIPTED, TOKENS, LetterTokenizer, script_of, script_params, train

from onechip.conversations import render_prompt
from onechip.errors import UserError
from onechip.sandbox import find_walls
from onechip.server import serve_in_thread
from onechip.speculate import CopyDraft
from onechip.talker import TalkDone, TalkSettings, TextPiece, ToolCall, ToolOutput
from onechip.talking import TalkDesk, check_talk, door_of, talk

pytestmark = pytest.mark.usefixtures("in_time")
QUESTION = [{"role": "user", "content": "how many"}]
BEFORE = [TOKENS.bos] * (len(render_prompt(TOKENS, QUESTION)) - 1)
SERVED = {"talk": False, "serve": True, "address": "127.0.0.1", "port": 0, "key_file": "", "origins": "", "names": ""}
USUAL = {"tools": "calculator", "places": 2, "int8": False, "draft": "", "temperature": 0.0, "top_k": 0} | SERVED


def options(**fields):
    return types.SimpleNamespace(**USUAL | fields)


def script_with(program, places):
    return script_of("so ", TOKENS.python_start, program, TOKENS.python_end, (places,), "ok", TOKENS.assistant_end)


def desk_of(script, open_draft=None, **fields):
    opened = (CONFIG, script_params(BEFORE + script), LetterTokenizer(), SCRIPTED)
    return TalkDesk("scripted", opened, train.attention_parts, options(**fields), open_draft)


def answer_of(desk):
    """The events of an answer to QUESTION, pieces of text in a row as one."""
    parts, text = [], ""
    for event in desk.talker.start(QUESTION, TalkSettings(temperature=0.0)):
        if isinstance(event, TextPiece):
            text += event.text
            continue
        parts, text = [*parts, *([text] if text else []), event], ""
    desk.close()
    assert isinstance(parts[-1], TalkDone) and parts[-1].reason == "stop"
    return parts[:-1]


@pytest.mark.slow
def test_calls_go_to_the_tool_that_was_chosen():
    """To the calculator, to nobody, or to Python in its sandbox, which the calculator cannot do."""
    known = script_with("12*12", 5)
    assert answer_of(desk_of(known)) == ["so ", ToolCall("12*12"), ToolOutput("144"), "ok"]
    alone = script_with("12*12", 0)
    assert answer_of(desk_of(alone, tools="none")) == ["so ", ToolCall("12*12"), "ok"]
    program = "print(max(3, 40))".replace(",", " +")
    assert answer_of(desk_of(script_with(program, 0))) == ["so ", ToolCall(program), "ok"]


@pytest.mark.skipif(find_walls()[0] is None, reason="no sandbox here")
def test_python_runs_in_the_sandbox():
    """What it prints comes back, and so does the line of its error; the row waits for it."""
    about = desk_of(script_with("print(max(3))", 0), tools="python")
    assert "sandbox" in about.about
    about.close()
    printed = answer_of(desk_of(script_with("print(3 + int(4))", 3), tools="python"))
    assert printed == ["so ", ToolCall("print(3 + int(4))"), ToolOutput("7"), "ok"]


def test_a_draft_has_the_models_tokenizer():
    """copy is by the text itself; a smaller model is opened, and refused where its ids mean something else."""
    desk = desk_of(script_with("12*12", 5), draft="copy", int8=True, places=3)
    assert isinstance(desk.engine.draft, CopyDraft) and desk.engine.rows == 3
    assert answer_of(desk) == ["so ", ToolCall("12*12"), ToolOutput("144"), "ok"]

    class Other(LetterTokenizer):
        def to_str(self):
            return "other"

    with pytest.raises(UserError, match="draft='small': has another tokenizer"):
        desk_of([], lambda name: (CONFIG, script_params([]), Other(), SCRIPTED), draft="small")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"address": "0.0.0.0"}, "host='0.0.0.0': others reach it, so set ONECHIP_API_KEY"),
        ({"key_file": "nowhere/key"}, "key_file='nowhere/key': cannot be read"),
        ({"origins": "localhost:3000"}, "origins='localhost:3000': must be such as"),
        ({"draft": "nowhere"}, "model='nowhere': no such folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_opened(monkeypatch, fields, said):
    monkeypatch.delenv("ONECHIP_API_KEY", raising=False)
    with pytest.raises(UserError, match=said) as error:
        check_talk(options(**fields))
    assert "\n" not in str(error.value)
    check_talk(options())


def test_a_key_in_a_file_is_asked_for(tmp_path):
    """With it, OpenAI's client is answered; with another, it is not."""
    (tmp_path / "key").write_text("0123456789abcdefghij\n")
    door = door_of(options(key_file=str(tmp_path / "key"), names="chat.example.org", origins="http://localhost:3000"))
    assert door.hosts == ("chat.example.org",) and door.origins == ("http://localhost:3000",)
    desk = desk_of(script_with("12*12", 5))
    served = serve_in_thread(desk.talker, door)
    client = lambda key: openai.OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0)
    made = client(door.key).chat.completions.create(model="scripted", messages=QUESTION, temperature=0)
    assert made.choices[0].message.content == "so ok"
    with pytest.raises(openai.AuthenticationError):
        client("x" * 20).models.list()
    served.stop()
    desk.close()


def test_lines_through_a_pipe_are_answered(monkeypatch, capsys):
    """While the page is there too; both end with the input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("how many\n"))
    talk(desk_of(script_with("12*12", 5)), options(talk=True))
    said = capsys.readouterr()
    assert "python> 12*12\noutput> 144\nok\n" in said.out and "the page is at http://127.0.0.1:" in said.out + said.err
