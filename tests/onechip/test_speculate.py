"""Speculative decoding writes what the plain engine writes, greedy or drawn, whatever is proposed."""

import dataclasses
import functools
import importlib

import numpy as np
import pytest
from configs import quick_compiler, random_params  # noqa: F401  (a fixture for every test)
from reference import gpt_logits, widen
from writers import DRAWN, GPT, ask, make_engine, params_of, random_prompt

from onechip.errors import UserError
from onechip.speculate import CopyDraft, ModelDraft, copy_forward, propose_copies

train = importlib.import_module("02_train")
# Another model of 31 tokens: of two layers, other heads and windows, and a longer context.
SMALL = dataclasses.replace(GPT, n_head=4, n_kv_head=1, aspect_ratio=28, seq_len=80, window_pattern="S")


def small_model(config=SMALL, params=None, count=4):
    params = params or random_params(config, 9)
    return ModelDraft(config, params, train.GPT, train.attention_parts(config), count)


DRAFTS = {"copy": CopyDraft(count=5, longest=2, shortest=1), "model": small_model()}


def requests():
    """Greedy and drawn ones of many lengths, some with a stop token, past the window of 36 keys."""
    knobs = [
        {},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.8, "stop": (3, 11, 19, 27)},
    ]
    return [ask(random_prompt(GPT, 2 + 5 * n), 41 - 3 * n, seed=n, **knobs[n % 4]) for n in range(9)]


@functools.cache
def plain_answers():
    return make_engine(rows=3, at_once=6).generate_all(requests())


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("kind", DRAFTS)
def test_it_writes_what_the_plain_engine_writes(kind):
    """Token for token, at any temperature: tokens that were taken back have left no trace, in no ring."""
    engine = make_engine(rows=3, at_once=6, draft=DRAFTS[kind])
    answers = engine.generate_all(requests())
    for answer, plain in zip(answers, plain_answers(), strict=True):
        assert answer.tokens == plain.tokens and answer.reason == plain.reason
        np.testing.assert_allclose(answer.log_probabilities, plain.log_probabilities, atol=1e-4)
    assert any(plain.reason == "stop" for plain in plain_answers())
    assert 0.02 < engine.accepted_share < 0.9 and engine.proposed > 100  # both kinds of them were met


@pytest.mark.slow
@pytest.mark.colab
def test_the_model_itself_is_always_right():
    """Its proposals are taken, greedy and drawn, as it draws with the same noise; but for the ends of answers."""
    engine = make_engine(rows=3, draft=small_model(GPT, params_of("gpt")))
    wanted = [request for request in requests() if not request.stop]
    answers = engine.generate_all(wanted)
    plain = [answer for answer in plain_answers() if not answer.request.stop]
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    assert engine.accepted_share > 0.8


@pytest.mark.slow
@pytest.mark.colab
def test_forced_tokens_go_through_a_draft():
    """More of them than proposals: they are written as they are, and are no proposals that count."""
    forced, prompt = [int(i) for i in np.random.default_rng(3).integers(0, 31, 9)], random_prompt(GPT, 7)
    hook = lambda answer, new: answer.force(forced) if len(answer.tokens) == 1 else None
    request = ask(prompt, 30, hook=hook)
    plain = make_engine(rows=1, at_once=6).generate_all([request])[0]
    assert plain.tokens[1:10] == forced and plain.mask == [1] + [0] * 9 + [1] * 20
    for draft in DRAFTS.values():
        engine = make_engine(rows=1, at_once=6, draft=draft)
        answer = engine.generate_all([request])[0]
        assert (answer.tokens, answer.mask) == (plain.tokens, plain.mask)
        assert engine.accepted <= engine.proposed <= 20 * draft.count


@pytest.mark.slow
@pytest.mark.colab
def test_drawn_tokens_are_distributed_as_the_model_says():
    """3,000 seeds: the second token after the commonest first one follows softmax(logits / T), p > 1e-6."""
    params, prompt, temperature = random_params(DRAWN), [13, 4, 8], 1.7
    small = dataclasses.replace(DRAWN, softcap=2.0)
    engine = make_engine(config=DRAWN, params=params, rows=100, draft=small_model(small, random_params(small), count=2))
    answers = engine.generate_all([ask(prompt, 3, temperature=temperature, seed=seed) for seed in range(3000)])
    tokens = np.array([answer.tokens for answer in answers])
    first = int(np.bincount(tokens[:, 0]).argmax())
    drawn = tokens[tokens[:, 0] == first, 1]
    logits = gpt_logits(DRAWN, widen(params), np.array([[*prompt, first]]))[0, -1]
    weights = np.exp(logits / temperature)
    expected = len(drawn) * weights / weights.sum()
    counts = np.bincount(drawn, minlength=DRAWN.vocab_size)
    assert len(drawn) > 100 and ((counts - expected) ** 2 / expected).sum() < 86.7
    assert 0.2 < engine.accepted_share < 0.95


def test_a_copy_is_what_followed_the_last_time():
    """The longest end that came up before, its last place, and into itself where that is near."""
    draft = CopyDraft(count=5, longest=3, shortest=2)
    copy = lambda text: copy_forward(np.int32(text), draft).tolist()
    assert copy([1, 2, 3, 9, 8, 2, 3, 7, 6, 5, 4, 2, 3]) == [7, 6, 5, 4, 2]
    assert copy([1, 2, 3, 9, 8, 2, 3, 7, 6, 5, 4, 1, 2, 3]) == [9, 8, 2, 3, 7]  # three tokens beat two
    assert copy([4, 5, 6, 5, 6]) == [5, 6, 5, 6, 5]
    assert copy([1, 2, 3, 4]) == copy([7]) == [-1] * 5


def test_forced_tokens_are_proposed_first():
    """Then what follows a text that has them; a row that rests has nothing."""
    draft = CopyDraft(count=4, longest=2, shortest=2)
    found = propose_copies([np.int32([1, 2, 3, 4, 1]), None, np.int32([5])], [[2], [], [6, 7, 8, 9, 9]], draft)
    assert found.tolist() == [[2, 3, 4, 1], [-1] * 4, [6, 7, 8, 9]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CopyDraft(count=0), "count=0: "),
        (lambda: CopyDraft(longest=1, shortest=2), "shortest=2: "),
        (lambda: make_engine(draft=small_model(dataclasses.replace(SMALL, vocab_size=30))), "draft: vocab_size=30: "),
        (lambda: make_engine(draft=small_model(dataclasses.replace(SMALL, seq_len=71))), "draft: seq_len=71: "),
    ],
)
def test_drafts_that_do_not_fit_are_refused(make, message):
    """One line, before anything is compiled."""
    with pytest.raises(UserError, match=message):
        make()
