"""An engine behind a Talker: a model that follows a script, its ids as text, tool calls, output and an end."""

import random
import threading
import time

import openai
import pytest
from configs import quick_compiler  # noqa: F401  (a fixture for every test)
from letters import CONFIG, SCRIPTED, TOKENS, decode, script_of, script_params, train

from onechip.calculator import calculate
from onechip.conversations import render_prompt
from onechip.engine import Engine
from onechip.enginetalk import TokenReader, engine_talker
from onechip.enginethread import EngineThread
from onechip.server import serve_in_thread
from onechip.talker import PromptTooLong, TalkDone, TalkSettings, TextPiece, ToolCall, ToolOutput
from onechip.tools import ToolRunner
from onechip.webguard import Door

pytestmark = pytest.mark.usefixtures("in_time")
QUESTION = [{"role": "user", "content": "how many"}]
PROMPT = render_prompt(TOKENS, QUESTION)
ROOM = CONFIG.seq_len - len(PROMPT)  # tokens of an answer
GREEDY = TalkSettings(temperature=0.0)


@pytest.fixture(scope="module")
def engine():
    return Engine(CONFIG, script_params([]), SCRIPTED, train.attention_parts(CONFIG), rows=2, at_once=6)


@pytest.fixture
def talk_of(engine):
    """A function (script, settings, prompt) -> the Talk of an answer that follows a script of ids."""
    with EngineThread(engine) as writer:
        tool = ToolRunner(TOKENS, decode, calculate)
        talker = engine_talker("scripted", writer, engine, TOKENS, decode, tool)

        def talk_of(script, settings=GREEDY, prompt=QUESTION):
            read = len(PROMPT) if prompt is QUESTION else 1 + len(prompt)
            engine.load(script_params([TOKENS.bos] * (read - 1) + script))
            return talker.start(prompt, settings)

        talk_of.talker = talker
        yield talk_of


def joined(events):
    """Events with text in a row as one piece."""
    out = []
    for event in events:
        if isinstance(event, TextPiece) and out and isinstance(out[-1], TextPiece):
            event = TextPiece(out.pop().text + event.text)
        out.append(event)
    return out


SCRIPT = script_of("it is ", TOKENS.python_start, "12*12", TOKENS.python_end, (5,), " ok", TOKENS.assistant_end)
EVENTS = [TextPiece("it is "), ToolCall("12*12"), ToolOutput("144"), TextPiece(" ok")]


def test_an_answer_with_a_tool(talk_of):
    """Text, the program, what it printed, text, and the end with its counts; the same again for the next one."""
    for _ in range(2):
        assert joined(talk_of(SCRIPT)) == [*EVENTS, TalkDone("stop", len(PROMPT), len(SCRIPT))]


def test_an_answer_s_length(talk_of):
    """max_tokens ends it, an open program is shown; without it, as many are written as there is room for."""
    events = joined(talk_of(SCRIPT, TalkSettings(0.0, max_tokens=9)))
    assert events == [TextPiece("it is "), ToolCall("12"), TalkDone("length", len(PROMPT), 9)]
    events = joined(talk_of(script_of("a" * ROOM)))
    assert events[-1] == TalkDone("length", len(PROMPT), ROOM)
    with pytest.raises(PromptTooLong, match="within 400"):
        talk_of.talker.start("a" * 400, GREEDY)


def test_stop_strings_end_an_answer_and_its_row(talk_of, engine):
    """The text before the string, in whatever tokens it came; the row is free, though 300 tokens had been asked for."""
    script = script_of("one two three ", "a" * 300)
    events = joined(talk_of(script, TalkSettings(0.0, max_tokens=320, stop=("two th", "xyz"))))
    assert events[0] == TextPiece("one ") and events[1].reason == "stop" and events[1].completion_tokens < 60
    assert joined(talk_of(SCRIPT))[:4] == EVENTS


def test_a_text_is_continued_without_tools(talk_of):
    """A prompt that is a string follows <|bos|>; a program in its answer is shown and not run."""
    script = script_of("b", TOKENS.python_start, "1+1", TOKENS.python_end, "c", TOKENS.bos)
    events = joined(talk_of(script, prompt="a"))
    assert events == [TextPiece("b"), ToolCall("1+1"), TextPiece("c"), TalkDone("stop", 2, len(script))]


def test_cancel(talk_of, engine):
    """Two that are written and one that waits end as cancelled; the next one is answered."""
    talks = [talk_of(script_of("a" * ROOM)) for _ in range(3)]
    for talk in reversed(talks):
        talk.cancel()
    assert [list(talk)[-1].reason for talk in talks] == ["cancelled"] * 3
    assert joined(talk_of(SCRIPT))[:4] == EVENTS


def test_a_seed_decides_what_is_drawn(talk_of):
    """With a temperature, one seed gives one answer, and none gives another answer each time."""
    script = script_of("a" * 30, TOKENS.assistant_end)
    write = lambda seed: joined(talk_of(script, TalkSettings(2.0, max_tokens=30, seed=seed)))
    assert write(7) == write(7) != write(8)
    assert len({str(write(None)) for _ in range(3)}) == 3


def test_however_the_ids_come():
    """Any cut of an answer's ids into batches gives the same events, also where a program was never closed."""
    source = random.Random(3)
    for script in (SCRIPT, SCRIPT[:9], script_of("x", TOKENS.user_end, "y", TOKENS.output_start, "z", TOKENS.user_end)):
        want = None
        for _ in range(20):
            reader, events, left = TokenReader(TOKENS, decode, ("q",)), [], list(script)
            while left:
                size = source.randint(1, 5)
                events += reader.add(left[:size])
                left = left[size:]
            events = joined([*events, *reader.end()])
            want = want or events
            assert events == want
    assert want == [TextPiece("xy"), ToolOutput("z")]


def test_by_openai_s_client(talk_of):
    """The whole way: server, Talker, engine, calculator; streamed, and by three clients on two rows."""
    talk_of(SCRIPT).cancel()
    served, said = serve_in_thread(talk_of.talker, Door(port=0)), []
    try:
        client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)

        def ask():
            stream = client.chat.completions.create(model="scripted", messages=QUESTION, stream=True, temperature=0)
            said.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.01)
        for thread in threads:
            thread.join(20)
        assert said == ["it is  ok"] * 3
    finally:
        served.stop()
