"""bench/chat_accuracy.py: what it reads of a run, and when the goal is reached."""

import importlib.util
import sys

import pytest
from conftest import ROOT

from onechip.errors import UserError


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_chat_accuracy", ROOT / "bench" / "chat_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_accuracies_are_read_from_the_line_that_says_when(bench):
    """Both lines have the same form, and only the one that is asked for counts; without one there is no result."""
    printed = "x\nbefore: calculator 0.010 +- 0.001, spelling 0.000 +- 0.000 of 300 questions each\n"
    printed += "after: calculator 0.950 +- 0.010, spelling 0.700 +- 0.020 of 300 questions each\n"
    assert bench.read_accuracies(printed, "before") == {"calculator": 0.01, "spelling": 0.0}
    assert bench.read_accuracies(printed, "after") == {"calculator": 0.95, "spelling": 0.7}
    with pytest.raises(UserError, match="no line says what was reached after"):
        bench.read_accuracies(printed.partition("after")[0], "after")


def test_every_task_has_to_reach_its_goal(bench):
    """And none may have been known before."""
    none, enough = dict.fromkeys(bench.GOAL, 0.0), dict(bench.GOAL)
    assert bench.Reached(none, enough, 1.0, 1.0).is_enough
    for task in bench.GOAL:
        assert not bench.Reached(none, enough | {task: enough[task] - 0.01}, 1.0, 1.0).is_enough
        assert not bench.Reached(none | {task: bench.BEFORE}, enough, 1.0, 1.0).is_enough
