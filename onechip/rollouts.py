"""Rollouts: many answers to each question by the engine, tool calls included, and what a training step needs of them.

    roller = Roller(make_engine, tokens, decode, limits)
    answers = roller.answer(params, problems, count, seeds)   # [Rollout], `count` of each problem
    batch = rollout_batch(answers, width, tokens.bos, policy)   # arrays (N, width)

A Rollout's reward is what its problem's grade says of the text after the last call, but 0 for an answer that
- is cut off: one that rambles on would be paid for what it said by chance;
- has a tool's output in it that no tool has written: a model could make up the result that suits it.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from onechip.answer import TextRequest
from onechip.calculator import calculate
from onechip.conversations import assistant_parts, render_prompt
from onechip.errors import require, say_above_bars
from onechip.policy import group_advantages, pass_at_k, token_weights
from onechip.tools import ToolRunner


class AnswerLimits(NamedTuple):
    """How answers are drawn: tokens of a question and of an answer at most; temperature; top_k, 0 for all."""

    question_tokens: int = 64
    answer_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0


class Rollout(NamedTuple):
    """One answer: the prompt's ids; the answer's; mask: 1 where the model chose one, 0 where a tool has written it; the
    log-probability of each, at temperature 1 and among all tokens; its parts, its reward, the number of its problem in
    the call, whether it ended by itself."""

    prompt: list
    tokens: list
    mask: list
    log_probabilities: list
    parts: list
    reward: float
    group: int
    ended: bool


def seed_of(*numbers):
    """A seed, uint32, that follows from some numbers, an answer's say: a resumed run draws the same."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:4], "big")


def said_at_last(parts):
    """The text that an answer ends with, after its last call; empty if it ends with one."""
    return parts[-1]["text"] if parts and parts[-1]["type"] == "text" else ""


def is_forged(tokens, ids, mask):
    """Whether the model itself has written a delimiter of a tool's output."""
    return any(chosen and i in (tokens.output_start, tokens.output_end) for i, chosen in zip(ids, mask, strict=True))


class Roller:
    """Answers to problems, by an engine that is made at the first call and holds no device memory between two.

    make_engine(params) -> an Engine; tokens: ChatTokens; decode(ids) -> text; limits: AnswerLimits; run: the tool.
    """

    def __init__(self, make_engine, tokens, decode, limits, run=calculate):
        self._make_engine, self._engine, self._decode = make_engine, None, decode
        self.tokens, self.limits, self._tool = tokens, limits, ToolRunner(tokens, decode, run)

    def answer(self, params, problems, count, seeds, temperature=None):
        """[Rollout]: `count` answers to each Problem in turn, drawn with seeds (len(problems) * count,)."""
        if self._engine is None:
            self._engine = self._make_engine(params)
        else:
            self._engine.load(params)
        prompts = [self.prompt(problem) for problem in problems]
        fixed = {
            "temperature": self.limits.temperature if temperature is None else temperature, "top_k": self.limits.top_k,
            "max_new_tokens": self.limits.answer_tokens, "stop": (self.tokens.assistant_end, self.tokens.bos),
            "pause": self._tool.pause, "hook": self._tool.hook,
        }  # fmt: skip
        requests = [
            TextRequest(tokens=prompts[i // count], seed=seed, **fixed)
            for i, seed in zip(range(len(problems) * count), seeds, strict=True)
        ]
        answers = self._engine.generate_all(requests)
        self._engine.free()
        return [self._graded(answer, problems[i // count], i // count) for i, answer in enumerate(answers)]

    def prompt(self, problem):
        """A Problem's ids; UserError for one that is too long: cut, it would be another question."""
        ids = render_prompt(self.tokens, [{"role": "user", "content": problem.prompt}], None)
        most = self.limits.question_tokens
        require(len(ids) <= most, "question_tokens", most, f"a question has {len(ids)}: {problem.prompt[:60]!r}")
        return ids

    def _graded(self, answer, problem, group):
        if answer.error:
            raise answer.error
        parts = assistant_parts(self.tokens, answer.tokens, self._decode)
        fair = answer.reason == "stop" and not is_forged(self.tokens, answer.tokens, answer.mask)
        reward = float(problem.grade(said_at_last(parts))) if fair else 0.0
        require(0 <= reward <= 1, "grade", reward, f"must be from 0 to 1, of {problem.prompt[:60]!r}")
        lists = answer.request.tokens, answer.tokens, answer.mask, answer.log_probabilities
        return Rollout(*lists, parts, reward, group, answer.reason == "stop")


def rollout_batch(rollouts, width, fill, policy):
    """{"x", "y", "mask", "old", "advantage", "weight"}, (N, width) each, of N Rollouts of one step.

    mask: 1 where the target y was chosen by the model. old: its log-probability then. weight: token_weights times the
    number of such targets, as a loss that is a mean over them takes it. int32 and float32.
    """
    N = len(rollouts)
    ids, mask = np.full((N, width + 1), fill, np.int32), np.zeros((N, width + 1), np.int32)
    old = np.zeros((N, width + 1), np.float32)
    for i, r in enumerate(rollouts):
        start, end = len(r.prompt), len(r.prompt) + len(r.tokens)
        ids[i, :end], mask[i, start:end], old[i, start:end] = [*r.prompt, *r.tokens], r.mask, r.log_probabilities
    rewards, groups = [r.reward for r in rollouts], [r.group for r in rollouts]
    advantage = np.repeat(group_advantages(policy.algorithm, rewards, groups)[:, None], width, axis=1)
    weight = token_weights(policy, mask[:, 1:]) * max(mask[:, 1:].sum(), 1)
    return {
        "x": ids[:, :-1], "y": ids[:, 1:], "mask": mask[:, 1:], "old": old[:, 1:],
        "advantage": advantage.astype(np.float32), "weight": weight.astype(np.float32),
    }  # fmt: skip


def describe_rollouts(rollouts):
    """{"rollouts/...": number} of one step's answers, for its row in metrics.jsonl.

    same: the share of groups whose answers all got the same reward, which teach nothing; entropy: in nats a token, by
    the log-probabilities of what was drawn.
    """
    groups = {}
    for r in rollouts:
        groups.setdefault(r.group, set()).add(r.reward)
    chosen = [p for r in rollouts for p, own in zip(r.log_probabilities, r.mask, strict=True) if own]
    share = lambda values: float(np.mean([*values]))
    return {
        "rollouts/reward": share(r.reward for r in rollouts),
        "rollouts/tokens": share(len(r.tokens) for r in rollouts),
        "rollouts/tool_calls": share(any(part["type"] == "python" for part in r.parts) for r in rollouts),
        "rollouts/ended": share(r.ended for r in rollouts),
        "rollouts/same": share(len(rewards) == 1 for rewards in groups.values()),
        "rollouts/entropy": -share(chosen) if chosen else 0.0,
    }


class SameRewards:
    """Says once that rewards teach nothing: when `patience` steps in a row had no group with two of them."""

    def __init__(self, patience=5):
        self._left = self._patience = patience

    def look(self, figures):
        """Takes the figures of a step, as describe_rollouts has them."""
        self._left = self._left - 1 if figures["rollouts/same"] == 1 else self._patience
        if self._left == 0:
            reward = figures["rollouts/reward"]
            say_above_bars(
                f"rollouts: for {self._patience} steps all answers to a question got the same reward, {reward:.2f} on "
                "average: nothing is learned; problems are too easy or too hard, or the grade does not look at answers"
            )


def pass_figures(rollouts, count):
    """({"tasks/pass@1": mean, "tasks/pass@k": mean, "reward": mean}, its standard error of pass@1) by problem.

    An answer counts as right with a reward of 1. k: powers of 4 up to `count`, the number of answers of each problem.
    """
    right = {}
    for r in rollouts:
        right[r.group] = right.get(r.group, 0) + (r.reward == 1)
    ks = [k for k in (1, 4, 16, 64) if k <= count]
    figures = {f"tasks/pass@{k}": float(np.mean([pass_at_k(count, c, k) for c in right.values()])) for k in ks}
    shares = [c / count for c in right.values()]
    error = float(np.std(shares, ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else 0.0
    return {**figures, "tasks/reward": float(np.mean([r.reward for r in rollouts]))}, error
