"""rollouts: what is the model's own, what is paid for, log-probabilities next to a float64 forward pass."""

import functools
import importlib

import jax
import numpy as np
import pytest
from configs import quick_compiler, random_params, replace  # noqa: F401  (a fixture for every test)
from letters import CONFIG, SCRIPTED, TOKENS, decode, script_of, script_params
from reference import gpt_logits, widen

from onechip.conversations import render_prompt
from onechip.engine import Engine
from onechip.errors import UserError
from onechip.policy import Policy
from onechip.rollouts import (
    AnswerLimits,
    Roller,
    SameRewards,
    describe_rollouts,
    pass_figures,
    rollout_batch,
    seed_of,
)
from onechip.verifiable import Problem, equals

train = importlib.import_module("02_train")
EACH = 40  # answers to a problem
ASKED = Problem("how many", equals("42"))


@functools.cache
def scripted_engine():
    """One for all scripts: its programs are compiled once."""
    return Engine(CONFIG, script_params([]), SCRIPTED, train.attention_parts(CONFIG), rows=3, length=60)


def load_script(params):
    scripted_engine().load(params)
    return scripted_engine()


def scripted_answer(*parts, limit=40, grade=ASKED.grade):
    """The Rollout of a model that says these parts, whatever it is asked."""
    problem = ASKED._replace(grade=grade)
    limits = AnswerLimits(question_tokens=20, answer_tokens=limit)
    before = len(render_prompt(TOKENS, [{"role": "user", "content": problem.prompt}])) - 1
    script = [TOKENS.bos] * before + script_of(*parts)
    roller = Roller(load_script, TOKENS, decode, limits)
    return roller.answer(script_params(script), [problem], 1, [0], temperature=0)[0]


CALL = (TOKENS.python_start, "7*6", TOKENS.python_end)


def test_a_tools_tokens_are_not_the_models():
    """The calculator's output with its delimiters has mask 0; all else, the end too, has 1; the last text is graded."""
    r = scripted_answer("so ", *CALL, (4,), "42", TOKENS.assistant_end)
    assert [part["type"] for part in r.parts] == ["text", "python", "python_output", "text"]
    assert r.mask == [1] * 8 + [0] * 4 + [1] * 3 and r.ended and r.reward == 1


def test_what_pleases_a_checker_and_is_no_answer_is_not_paid():
    """A tool's output that the model made up itself, and an answer that does not end: 0, although the text is right."""
    forged = scripted_answer(*CALL[:2], TOKENS.output_start, "42", TOKENS.output_end, "42", TOKENS.assistant_end)
    assert forged.parts[-1] == {"type": "text", "text": "42"} and forged.ended and forged.reward == 0
    cut = scripted_answer("42", limit=2)
    assert cut.parts == [{"type": "text", "text": "42"}] and not cut.ended and cut.reward == 0
    assert scripted_answer("42", TOKENS.assistant_end).reward == 1
    only_a_call = scripted_answer(*CALL, (4,), TOKENS.assistant_end)
    assert only_a_call.reward == 0  # it has found 42, and not said so


def test_a_grade_out_of_range_and_a_long_question_are_refused():
    with pytest.raises(UserError, match=r"grade=2\.0: must be from 0 to 1"):
        scripted_answer("42", TOKENS.assistant_end, grade=lambda text: 2)
    with pytest.raises(UserError, match="question_tokens=20: a question has 34"):
        long = Problem("a" * 30, equals("42"))
        Roller(None, TOKENS, decode, AnswerLimits(20, 8)).prompt(long)


@pytest.fixture(scope="module")
def drawn():
    """(config, params, 120 rollouts of three problems) of a random model that calls tools by chance."""
    config = replace(vocab_size=CONFIG.vocab_size, seq_len=64)
    limits = AnswerLimits(question_tokens=20, answer_tokens=40, temperature=4.0)
    engine = lambda params: Engine(config, params, train.GPT, train.attention_parts(config), rows=7, length=60)
    problems = [
        Problem("how many", equals("1")),
        Problem("a", lambda text: 0.25),
        Problem("b c", lambda text: len(text) % 2),
    ]
    say = lambda ids: "".join(map(chr, [65 + i for i in ids]))
    roller = Roller(engine, TOKENS, say, limits, run=lambda code: "12.5")
    return (
        config,
        random_params(config),
        roller.answer(random_params(config), problems, EACH, [seed_of(i) for i in range(3 * EACH)]),
    )


@pytest.mark.slow
def test_log_probabilities_are_the_forward_passs(drawn):
    """In float64, of every token that the model chose, after tools' outputs too; each has its place in a batch."""
    config, params, rollouts = drawn
    assert sum(0 in r.mask for r in rollouts) > 1 and len({len(r.tokens) for r in rollouts}) > 4
    batch = rollout_batch(rollouts, 61, TOKENS.bos, Policy())
    logits = gpt_logits(config, widen(params), batch["x"])
    nats = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    want = np.take_along_axis(nats, batch["y"][..., None], axis=-1)[..., 0]
    assert batch["mask"].sum() == sum(sum(r.mask) for r in rollouts) > 200
    assert np.max(np.abs(want - batch["old"]) * batch["mask"]) < 2e-5


@pytest.mark.slow
def test_a_batch_has_each_answers_advantage_and_the_figures_are_counted(drawn):
    """In groups; the second always gets 0.25 where it ended; a problem's reward is a mean of its own answers."""
    _, _, rollouts = drawn
    batch = rollout_batch(rollouts, 61, TOKENS.bos, Policy("dr-grpo", most=40))
    for i, r in enumerate(rollouts):
        group = [other.reward for other in rollouts if other.group == r.group]
        np.testing.assert_allclose(batch["advantage"][i], r.reward - np.mean(group), atol=1e-7)
        assert batch["x"][i, : len(r.prompt)].tolist() == r.prompt and not batch["mask"][i, : len(r.prompt) - 1].any()
        assert r.reward in ((0, 0.25) if r.group == 1 else (0, 1))
    figures = describe_rollouts(rollouts)
    assert figures["rollouts/tokens"] == pytest.approx(sum(len(r.tokens) for r in rollouts) / len(rollouts))
    assert 0 < figures["rollouts/tool_calls"] < 1 and 0 < figures["rollouts/ended"] < 1
    passes, error = pass_figures(rollouts, EACH)
    shares = [np.mean([r.reward == 1 for r in rollouts if r.group == g]) for g in range(3)]
    assert passes["tasks/pass@1"] == pytest.approx(np.mean(shares)) and set(passes) >= {"tasks/pass@4"}
    assert error == pytest.approx(np.std(shares, ddof=1) / 3**0.5) and shares[2] > 0 == shares[1]


def test_rewards_that_are_all_the_same_are_reported_once(capsys):
    """After five such steps in a row; one that differs begins the count again."""
    same = SameRewards()
    for share in (1, 1, 1, 1, 0.5, 1, 1, 1, 1):
        same.look({"rollouts/same": share, "rollouts/reward": 1.0})
    assert capsys.readouterr().out == ""
    for _ in range(9):
        same.look({"rollouts/same": 1, "rollouts/reward": 1.0})
    assert capsys.readouterr().out.count("got the same reward, 1.00 on average: nothing is learned") == 1


def test_seeds_differ_by_every_number():
    seeds = {seed_of(a, "step", b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**32 for seed in seeds) and jax.numpy.uint32(max(seeds))
