"""onechip/generated.py: a model that follows a script is asked GSM8K and HumanEval through the engine, and graded."""

import chat_data
import pytest
from configs import quick_compiler  # noqa: F401  (a fixture for every test)
from letters import CONFIG, LETTERS, SCRIPTED, TOKENS, decode, script_of, script_params, train

from onechip import generated
from onechip.chat_tasks import ChatTask, conversation, grade_number, grade_program, gsm8k_item, humaneval_item
from onechip.conversations import render_prompt
from onechip.engine import Engine
from onechip.errors import UserError
from onechip.generated import ask_chat, load_chat_tasks, make_writer, why_not
from onechip.sandbox import find_walls

SPELLED = str.maketrans({"z": "#", "q": ":", "j": "_"})  # what the script's letters stand for in an answer
CHAT = TOKENS._replace(encode=lambda text: [max(LETTERS.find(letter), 0) for letter in text.lower()])
GSM8K = ChatTask("GSM8K", [gsm8k_item(row) for row in chat_data.GSM8K_ROWS], grade_number, 7)
HUMANEVAL = ChatTask("HumanEval", [humaneval_item(row) for row in chat_data.HUMANEVAL_ROWS], grade_program, 5)
CALL = TOKENS.python_start, "1000+1001", TOKENS.python_end, (6,)  # the six places are the output's


@pytest.fixture(scope="module")
def engine():
    return Engine(CONFIG, script_params([]), SCRIPTED, train.attention_parts(CONFIG), rows=2, at_once=6)


@pytest.fixture
def verdicts(engine):
    """A function (task, *parts of a script, limit) -> the verdicts on answers that follow it."""

    def verdicts(task, *parts, limit=0):
        items = task.items[:limit] if limit else task.items
        [length] = {len(render_prompt(CHAT, item["messages"][:1])) for item in items}
        engine.load(script_params([TOKENS.bos] * (length - 1) + script_of(*parts, TOKENS.assistant_end)))
        write = make_writer(engine, CHAT, lambda ids: decode(ids).translate(SPELLED))
        return ask_chat(task, CHAT, None, write, limit).correct.tolist()

    return verdicts


def test_a_number_is_right_where_it_is_the_answer(verdicts):
    """One answer to seven questions, more than the engine has rows: right for the one whose number it is."""
    assert verdicts(GSM8K, "zzzz 2005") == [i == 2 for i in range(7)]
    assert verdicts(GSM8K, "zzzz 1") == [False] * 7
    assert verdicts(GSM8K, "zzzz 2001", limit=1) == [True]


def test_a_call_is_run_and_its_output_is_not_the_models(verdicts):
    """The output takes the places of what the model would have written; a number that stands in it alone is no
    answer, and neither is one in the call."""
    assert verdicts(GSM8K, "zzzz ", *CALL, "2001", limit=1) == [True]  # not run, the places would be in between
    assert verdicts(GSM8K, "zzzz ", *CALL, limit=1) == [False]
    assert verdicts(GSM8K, TOKENS.python_start, "zzzz 2001", TOKENS.python_end, limit=1) == [False]


def test_only_what_the_model_says_is_graded(verdicts, engine):
    """A number in the question is not in the answer, and what follows an answer's end is none of it."""
    asked = ChatTask("GSM8K", [conversation("zzzz 2001", [{"type": "text", "text": "#### 2001"}])], grade_number, 1)
    assert verdicts(asked, "a") == [False] and verdicts(asked, "zzzz 2001") == [True]
    assert verdicts(asked, TOKENS.assistant_end, "zzzz 2001") == [False]


def test_a_question_without_room_is_wrong(engine, capsys):
    """It is said, and the others are answered."""
    engine.load(script_params([TOKENS.encode("a")[0]] * CONFIG.seq_len))
    texts = make_writer(engine, CHAT, decode)([[1] * CONFIG.seq_len, [TOKENS.bos, 1]], 5)
    assert texts == ["", "aaaaa"]
    assert "1 of 2 questions fill all 400 tokens: no answer, counted wrong" in capsys.readouterr().out


@pytest.mark.skipif(find_walls()[0] is None, reason="no sandbox on this machine")
def test_a_program_is_run(verdicts):
    """Right for the function that it defines, and for no other: each answer runs with its own tests."""
    assert verdicts(HUMANEVAL, "def addj1(x)q return x+1") == [False, True, False, False, False]
    assert verdicts(HUMANEVAL, "def addj0(x)q return x+5", limit=1) == [False]


def test_without_a_sandbox_programs_are_not_graded(monkeypatch):
    """The reason is one line, before anything is written; other tasks have none."""
    monkeypatch.setattr(generated, "find_walls", lambda: (None, "none here"))
    monkeypatch.setattr(generated, "describe_protection", lambda: "refuses to run here")
    assert why_not(HUMANEVAL) == "refuses to run here" and why_not(GSM8K) == ""
    with pytest.raises(UserError, match="^tasks='HumanEval': cannot be graded: refuses to run here$"):
        ask_chat(HUMANEVAL, CHAT, None, None)


def test_spelling_bee_needs_no_network():
    """The sixth task is made by rule: 256 questions, graded by their numbers."""
    [task] = load_chat_tasks(["SpellingBee"], 3)
    assert (task.label, len(task.items), task.total, task.baseline) == ("SpellingBee", 256, 256, 0)
