"""Tools in an answer: a model that follows a script writes programs, whose output is forced back."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from configs import quick_compiler  # noqa: F401  (a fixture for every test)
from letters import CONFIG, SCRIPTED, TOKENS, decode, script_of, script_params, train

from onechip.answer import TextRequest
from onechip.calculator import calculate
from onechip.engine import Engine
from onechip.tools import LONGEST_OUTPUT, ToolRunner


@pytest.fixture(scope="module")
def engine():
    return Engine(CONFIG, script_params([]), SCRIPTED, train.attention_parts(CONFIG), rows=2, at_once=6)


def ask(runner, count=60, **fields):
    more = {"stop": (TOKENS.assistant_end,), "pause": runner.pause, "hook": runner.hook}
    return TextRequest(tokens=[TOKENS.bos], max_new_tokens=count, **more | fields)


def test_a_programs_output_is_forced_back(engine):
    """Right after python_end, between its delimiters, with mask 0; twice in one answer; then the model writes on."""
    start, end, end_all = TOKENS.python_start, TOKENS.python_end, TOKENS.assistant_end
    script = script_of("it is ", start, "12*12", end, (5,), " and ", start, "7-10", end, (4,), " ok", end_all)
    runner = ToolRunner(TOKENS, decode, calculate)
    engine.load(script_params(script))
    answer, other = engine.generate_all([ask(runner), ask(runner)])
    output = lambda text: [TOKENS.output_start, *TOKENS.encode(text), TOKENS.output_end]
    first, second = script.index(end) + 1, len(script) - 4 - 4
    want = [*script[:first], *output("144"), *script[first + 5 : second], *output("-3"), *script[second + 4 :]]
    assert answer.tokens == other.tokens == want and answer.reason == "stop"
    assert answer.mask == [
        int(i not in (*range(first, first + 5), *range(second, second + 4))) for i in range(len(want))
    ]


@pytest.mark.parametrize(
    "program, run",
    [("2+", calculate), ("2+2", lambda text: None), ("2+2", lambda text: 1 / 0)],
    ids=["no formula", "nothing", "an error"],
)
def test_where_a_tool_has_no_output_the_model_writes_on(engine, program, run):
    """As in nanochat: nothing is forced."""
    script = script_of(TOKENS.python_start, program, TOKENS.python_end, " so", TOKENS.assistant_end)
    engine.load(script_params(script))
    answer = engine.generate_all([ask(ToolRunner(TOKENS, decode, run))])[0]
    assert answer.tokens == script and answer.mask == [1] * len(script)


def test_only_programs_are_run_and_outputs_have_an_end(engine):
    """A long output is cut, and a python_end with no beginning runs nothing."""
    ran = []
    runner = ToolRunner(TOKENS, decode, lambda text: ran.append(text) or "a" * 1000)
    script = script_of("b", TOKENS.python_end, "c", TOKENS.python_start, "d", TOKENS.python_end, (LONGEST_OUTPUT + 2,))
    script += script_of("e", TOKENS.python_end, TOKENS.assistant_end)
    engine.load(script_params(script))
    answer = engine.generate_all([ask(runner, 390)])[0]
    assert ran == ["d"] and answer.mask.count(0) == LONGEST_OUTPUT + 2 and answer.reason == "stop"


def test_a_slow_tool_holds_its_own_row_alone(engine):
    """In a pool: the neighbour ends while the tool is at work, then the row goes on with the output."""
    release, runs = threading.Event(), []

    def slow(text):
        runs.append(text)
        assert release.wait(20)
        return "9"

    script = script_of(TOKENS.python_start, "4+5", TOKENS.python_end, (3,), "ok", TOKENS.assistant_end)
    plain = TextRequest(tokens=[TOKENS.bos], max_new_tokens=8)
    with ThreadPoolExecutor(1) as pool:
        engine.load(script_params(script))
        held, other = engine.submit(ask(ToolRunner(TOKENS, decode, slow, pool))), engine.submit(plain)
        while engine.runnable():
            engine.step()
        assert other.reason == "length" and held.reason is None and runs == ["4+5"]
        release.set()
        while held.reason is None:
            with engine.changed:
                assert engine.changed.wait_for(engine.runnable, timeout=20)
            engine.step()
    assert held.tokens == [*script[:5], TOKENS.output_start, 9, TOKENS.output_end, *script[8:]]
