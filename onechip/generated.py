"""Answers that a chat model writes, and their grades: ChatCORE's tasks that no letter answers, through the engine."""

from onechip.answer import TextRequest
from onechip.calculator import calculate
from onechip.chat_tasks import CHAT_CORE, ask_generations, ask_letters, grade_program, load_task
from onechip.conversations import assistant_parts
from onechip.errors import require, say
from onechip.graders import run_checked
from onechip.sandbox import describe_protection, find_walls
from onechip.spelling import spelling_bee
from onechip.talker import text_of
from onechip.tools import ToolRunner

CHAT_LABELS = (*CHAT_CORE, "SpellingBee")  # the six that nanochat's ChatCORE had until July 2026; five are left


def load_chat_tasks(labels, limit=0):
    """The ChatTasks of some of CHAT_LABELS, with at least their first `limit` examples, all if it is 0."""
    return [load_task(label, limit) if label in CHAT_CORE else spelling_bee() for label in labels]


def make_writer(engine, tokens, decode):
    """A function of (prompts: [ids], max_tokens) -> [text]: what a model answers, greedy, with the calculator.

    All prompts share the engine's rows: the next takes the place of one that has ended. A text is what the model says
    itself: neither its prompt, nor the programs it calls, nor what they print. A prompt that leaves no room for an
    answer gets "". tokens: ChatTokens; decode(ids) -> text.
    """
    tool = ToolRunner(tokens, decode, calculate)
    fixed = {"stop": (tokens.assistant_end, tokens.bos), "pause": tool.pause, "hook": tool.hook}

    def write(prompts, max_tokens):
        rooms = [min(max_tokens, engine.length - len(prompt)) for prompt in prompts]
        requests = {
            i: TextRequest(tokens=prompt, max_new_tokens=room, **fixed)
            for i, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
            if room > 0
        }
        if len(requests) < len(prompts):
            count = len(prompts) - len(requests)
            say(f"{count:,} of {len(prompts):,} questions fill all {engine.length:,} tokens: no answer, counted wrong")
        texts = [""] * len(prompts)
        for i, answer in zip(requests, engine.generate_all(list(requests.values())), strict=True):
            if answer.error:
                raise answer.error
            texts[i] = text_of(assistant_parts(tokens, answer.tokens, decode))
        return texts

    return write


def why_not(task):
    """Why a ChatTask cannot be graded on this machine, one line; empty if it can."""
    return describe_protection() if task.grade is grade_program and find_walls()[0] is None else ""


def ask_chat(task, tokens, score, write, limit=0):
    """The Outcome of a ChatTask: by letters, with `score`, or by what write(prompts, max_tokens) -> [text] says.

    Programs run in the sandbox; UserError where there is none.
    """
    if task.grade is None:
        return ask_letters(task, tokens, score, limit)
    reason = why_not(task)
    require(not reason, "tasks", task.label, f"cannot be graded: {reason}")
    return ask_generations(task, tokens, write, run_checked, limit)
