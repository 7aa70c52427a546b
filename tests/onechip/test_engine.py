"""The engine against 02's `generate`, token for token, for three notebooks' models; its rows, requests, devices.

Texts are longer than the windows, so rings wrap; rows have different lengths and serve one request after another.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from configs import quick_compiler, random_params  # noqa: F401  (a fixture for every test)
from jax.sharding import NamedSharding, PartitionSpec
from reference import gpt_logits, widen
from writers import DRAWN, GPT, MODELS, Compilations, ask, make_engine, params_of, random_prompt, written

from onechip.answer import MOST_STOPS
from onechip.errors import UserError
from onechip.mesh import build_mesh

train = importlib.import_module("02_train")
TESTS = Path(__file__).parent.parent
# Prompts and new tokens: short and long ones, past a window of 36 (gpt) and 34 (swiglu), one up to the context's end.
CASES = [(1, 40), (5, 33), (16, 40), (2, 7), (9, 1), (31, 37), (12, 22)]
LONG = [(141, 29), (130, 40), (3, 40), (125, 9)]  # across nanochat's window of 129


@functools.cache
def engine_of(name, **settings):
    """One engine for several tests: its programs are compiled once."""
    return make_engine(name, rows=3, at_once=5, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# Greedy, token for token


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
@pytest.mark.colab
def test_greedy_is_what_generate_writes(name):
    """Every answer is 02's, whatever shares the batch: rows of all lengths, taken again in the middle of others."""
    config, _ = MODELS[name]
    cases = [c for c in CASES if sum(c) <= config.seq_len] + (LONG if name == "nanochat" else [])
    prompts = [random_prompt(config, length) for length, _ in cases]
    requests = [ask(prompt, new) for prompt, (_, new) in zip(prompts, cases, strict=True)]
    answers = engine_of(name).generate_all(requests)
    for answer, prompt, (_, new) in zip(answers, prompts, cases, strict=True):
        assert answer.tokens == written(name, prompt, new)
        assert answer.reason == "length" and answer.mask == [1] * new
    assert len({token for answer in answers for token in answer.tokens}) > 12  # no model that is stuck on one


def test_a_ring_keeps_only_its_window():
    """A layer that sees 36 keys keeps 36 positions of a text of 72, with its key/value heads alone."""
    rings = engine_of("gpt").programs._rings[0]
    assert [keys.shape for keys, _ in rings] == [(3, 2, 36, 14), (3, 2, 36, 14), (3, 2, 72, 14)]
    assert [values.shape for _, values in rings] == [(3, 2, 14, 36), (3, 2, 14, 36), (3, 2, 14, 72)]


def test_a_row_is_taken_again_without_a_new_program():
    """TextRequests of other lengths, knobs, stops and forced tokens run what the first ones compiled."""
    engine = make_engine(rows=2, at_once=4)
    engine.generate_all([ask([3, 4, 5], 9), ask(random_prompt(GPT, 30), 9), ask([1], 9)])
    count = engine.programs.compiled
    assert count == 3  # prompts of 32, one or two of them; tokens
    with Compilations() as compilations:
        lengths = (7, 30, 2, 19, 11)
        answers = engine.generate_all(
            [
                ask(random_prompt(GPT, n), 2 + n, temperature=n % 3, top_k=n, top_p=0.9, seed=n, stop=(n,))
                for n in lengths
            ]
        )
        assert all(answer.reason for answer in answers)
    assert engine.programs.compiled == count and compilations.count == 0


@pytest.mark.slow
@pytest.mark.colab
def test_a_warm_engine_compiles_nothing_more(monkeypatch):
    """Texts that grow through spans of 16, 32, 64 and 72 slots, of prompts of all sizes: written as ever."""
    monkeypatch.setattr("onechip.engine.SHORTEST_SPAN", 16)
    engine = make_engine(rows=1, at_once=5)
    engine.warm_up()
    assert engine.spans == [16, 32, 64, 72] and engine.prompt_sizes == [32, 64, 72]
    prompts = [random_prompt(GPT, n) for n in (3, 40, 70)]
    want = [written("gpt", prompt, n) for prompt, n in zip(prompts, (40, 32, 2), strict=True)]
    with Compilations() as compilations:
        requests = [ask(prompt, n) for prompt, n in zip(prompts, (40, 32, 2), strict=True)]
        assert [answer.tokens for answer in engine.generate_all(requests)] == want
    assert compilations.count == 0


def test_other_parameters_are_taken_without_a_new_program():
    """`load` is what a policy in training needs: the next tokens are the new parameters', programs stay."""
    engine, other = make_engine(rows=2, at_once=4), random_params(GPT, 5)
    prompt = random_prompt(GPT, 6)
    before = engine.generate_all([ask(prompt, 12)])[0].tokens
    count = engine.programs.compiled
    engine.load(other)
    after = engine.generate_all([ask(prompt, 12)])[0].tokens
    assert before == written("gpt", prompt, 12) and after == written("gpt", prompt, 12, other) != before
    assert engine.programs.compiled == count


def test_log_probabilities_are_the_models():
    """Of each chosen token, at temperature 1 and among all tokens, whatever it was drawn with: to 1e-5 in float64."""
    prompt = random_prompt(DRAWN, 8)
    engine = make_engine(config=DRAWN, params=random_params(DRAWN), rows=2, at_once=5)
    answers = engine.generate_all([ask(prompt, 12), ask(prompt, 12, temperature=0.7, top_k=4, top_p=0.8, seed=3)])
    for answer in answers:
        logits = gpt_logits(DRAWN, widen(random_params(DRAWN)), np.array([prompt + answer.tokens]))[0, 7:-1]
        nats = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        want = nats[np.arange(12), answer.tokens]
        np.testing.assert_allclose(answer.log_probabilities, want, atol=1e-5)
    assert answers[0].tokens != answers[1].tokens


# ----------------------------------------------------------------------------------------------------------------------
# Drawn


def test_a_row_draws_the_same_alone_and_among_others():
    """Its stream depends on its seed and position alone: not on neighbours, the row it got, or when it came."""
    engine = engine_of("gpt")
    requests = [ask(random_prompt(GPT, 4 + n), 30, temperature=0.5 + n / 4, seed=n, top_p=1 - n / 20) for n in range(6)]
    together = engine.generate_all(requests)
    for request, answer in zip(requests[::-1], together[::-1], strict=True):
        alone = engine.generate_all([ask([2], 3, temperature=1.0), request])[1]
        assert alone.tokens == answer.tokens and alone.log_probabilities == answer.log_probabilities
    again = engine.generate_all([ask(requests[2].tokens, 30, temperature=1.0, seed=s) for s in (2, 2, 3)])
    assert again[0].tokens == again[1].tokens != again[2].tokens


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("top_k", [0, 5])
def test_drawn_tokens_follow_the_softmax_of_the_top_k(top_k):
    """4,000 seeds, two tokens each: both are as frequent as softmax(logits / temperature) says (p > 1e-6)."""
    temperature, prompt, params = 1.7, [13, 4, 8], random_params(DRAWN)
    engine = make_engine(config=DRAWN, params=params, rows=100, at_once=2)
    answers = engine.generate_all(
        [ask(prompt, 2, temperature=temperature, top_k=top_k, seed=seed) for seed in range(4000)]
    )
    tokens = np.array([answer.tokens for answer in answers])
    first = int(np.bincount(tokens[:, 0]).argmax())
    for prefix, drawn in ((prompt, tokens[:, 0]), ([*prompt, first], tokens[tokens[:, 0] == first, 1])):
        logits = gpt_logits(DRAWN, widen(params), np.array([prefix]))[0, -1]
        likely = np.argsort(-logits)[: top_k or None]
        assert set(drawn.tolist()) <= set(likely.tolist())
        weights = np.exp(logits[likely] / temperature)
        expected = len(drawn) * weights / weights.sum()
        counts = np.bincount(drawn, minlength=DRAWN.vocab_size)[likely]
        limit = {5: 33.4, 31: 86.7}[len(likely)]  # chi-square with one degree of freedom fewer, p = 1e-6
        assert len(drawn) > 100 and ((counts - expected) ** 2 / expected).sum() < limit


# ----------------------------------------------------------------------------------------------------------------------
# Stops, forced tokens, hooks


def test_a_stop_token_ends_an_answer_which_has_it():
    """The first token of the stop set is the last one; a neighbour writes on."""
    prompt = random_prompt(GPT, 5)
    whole = written("gpt", prompt, 30)
    stop = next(token for at, token in enumerate(whole) if at > 6 and whole.index(token) == at)
    other = next(token for token in range(31) if token not in whole)
    one, two = engine_of("gpt").generate_all([ask(prompt, 30, stop=(other, stop)), ask(prompt, 30, stop=(other,))])
    assert one.reason == "stop" and one.tokens == whole[: whole.index(stop) + 1]
    assert two.reason == "length" and two.tokens == whole


def test_forced_tokens_are_written_as_they_are():
    """After 3 tokens a hook forces 12, more than a dispatch: their mask is 0, and what follows is a text with them.

    One that is a stop token does not end the answer.
    """
    prompt, forced = random_prompt(GPT, 7), [int(i) for i in np.random.default_rng(3).integers(0, 31, 12)]
    stop = next(token for token in forced if token not in written("gpt", prompt, 3))

    def hook(answer, new):
        if len(answer.tokens) - len(new) < 3 <= len(answer.tokens):
            answer.force(forced)

    request = ask(prompt, 40, hook=hook, pause=(written("gpt", prompt, 3)[-1],), stop=(stop,))
    answer, other = engine_of("gpt").generate_all([request, ask(prompt, 40)])
    at = answer.mask.index(0)
    assert answer.tokens[:at] == written("gpt", prompt, at) and answer.tokens[at : at + 12] == forced
    assert answer.mask == [1] * at + [0] * 12 + [1] * (len(answer.tokens) - at - 12)
    rest = written("gpt", prompt + answer.tokens[: at + 12], len(answer.tokens) - at - 12)
    rest = rest[: rest.index(stop) + 1] if stop in rest else rest
    assert answer.tokens[at + 12 :] == rest and other.tokens == written("gpt", prompt, 40)


def test_nothing_is_written_after_a_pause_until_the_hook_has_seen_it():
    """A pause token is the last of its dispatch; without forced tokens the text goes on as if there were none."""
    prompt, seen = random_prompt(GPT, 6), []
    whole = written("gpt", prompt, 20)
    request = ask(prompt, 20, pause=(whole[4],), hook=lambda answer, new: seen.append(list(new)))
    (answer,) = engine_of("gpt").generate_all([request])
    assert answer.tokens == whole and sum(seen, []) == whole
    assert all(token != whole[4] for new in seen for token in new[:-1]) and any(new[-1] == whole[4] for new in seen)


@pytest.mark.usefixtures("in_time")
def test_a_row_that_is_held_waits_while_others_are_written():
    """Its tokens come when another thread forces some; where all rows are held, the engine waits without spinning."""
    prompt, engine = random_prompt(GPT, 6), engine_of("gpt")
    held, other = None, engine.submit(ask(prompt, 24))

    def hook(answer, new):
        if len(answer.tokens) == len(new):
            answer.hold()

    held = engine.submit(ask(prompt, 10, hook=hook))
    while engine.runnable():
        engine.step()
    assert other.reason == "length" and held.reason is None and len(held.tokens) == 1
    threading.Timer(0.05, held.force, [[5, 6]]).start()
    engine.generate_all([])
    while held.reason is None:
        with engine.changed:
            engine.changed.wait_for(engine.runnable)
        engine.step()
    assert held.tokens[1:3] == [5, 6] and len(held.tokens) == 10 and held.mask[:4] == [1, 0, 0, 1]


def test_a_hook_may_stop_and_an_error_of_its_own_ends_one_answer():
    """Neighbours get what they get alone."""

    def stop(answer, new):
        if len(answer.tokens) > 6:
            answer.stop()

    def fail(answer, new):
        raise RuntimeError("a hook's own")

    prompt = random_prompt(GPT, 3)
    told = []
    tell = lambda answer, new: told.append((list(new), answer.reason))
    stopped, failed, whole = engine_of("gpt").generate_all(
        [ask(prompt, 30, hook=stop, on_tokens=tell), ask(prompt, 30, hook=fail), ask(prompt, 30)]
    )
    assert stopped.reason == "stop" and 6 < len(stopped.tokens) <= 6 + 5
    assert sum((new for new, _ in told), []) == stopped.tokens
    assert [reason for _, reason in told] == [None] * (len(told) - 1) + ["stop"]
    assert failed.reason == "error" and str(failed.error) == "a hook's own" and len(failed.tokens) == 1
    assert whole.tokens == written("gpt", prompt, 30)


def test_a_cancelled_answer_frees_its_row():
    """Waiting or running, it ends as "cancelled", once; the next request is written as usual."""
    engine, prompt = make_engine(rows=1, at_once=2), random_prompt(GPT, 5)
    running, waiting, last = (engine.submit(ask(prompt, 20)) for _ in range(3))
    engine.step()
    running.cancel(), waiting.cancel()
    while engine.step():
        pass
    assert (running.reason, waiting.reason, last.reason) == ("cancelled", "cancelled", "length")
    assert 0 < len(running.tokens) < 20 and waiting.tokens == [] and last.tokens == written("gpt", prompt, 20)
    assert running.wait(0) and waiting.wait(0)


# ----------------------------------------------------------------------------------------------------------------------
# Devices


def report_devices():
    """Prints, as JSON, what engines on one and on four devices write, and how many rows each of the four has."""
    requests = [ask(random_prompt(GPT, 3 + n), 9 + 2 * n, temperature=n % 2, seed=n) for n in range(11)]
    found = {"devices": jax.device_count()}
    for count in (1, 4):
        engine = make_engine(rows=8, at_once=4, mesh=build_mesh(jax.devices()[:count]))
        found[str(count)] = [answer.tokens for answer in engine.generate_all(requests)]
    found["rows"] = [shard.data.shape[0] for shard in engine.programs._rings[0][0][0].addressable_shards]
    training = NamedSharding(build_mesh(jax.devices()[::-1], "data=2,fsdp=2"), PartitionSpec())
    engine.load(jax.device_put(params_of("gpt"), training))
    found["from another mesh"] = [answer.tokens for answer in engine.generate_all(requests[:2])]
    print(json.dumps(found))


@pytest.mark.slow
@pytest.mark.colab
def test_rows_are_split_over_devices():
    """On four devices each has two of eight rows, and every answer is that of one device."""
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "support"), str(TESTS / "onechip")]
    code = f"import sys; sys.path[:0] = {paths}; import test_engine; test_engine.report_devices()"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["rows"] == [2, 2, 2, 2]
    assert found["1"] == found["4"] and len(found["4"]) == 11
    assert found["from another mesh"] == found["4"][:2]


# ----------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(tokens=[]), "tokens=[]: "),
        (dict(tokens=[31]), "tokens=[31]: "),
        (dict(tokens=[0] * 72), "tokens=72: "),
        (dict(max_new_tokens=0), "max_new_tokens=0: "),
        (dict(max_new_tokens=70), "max_new_tokens=70: "),
        (dict(temperature=-1.0), "temperature=-1.0: "),
        (dict(temperature=float("nan")), "temperature=nan: "),
        (dict(top_k=32), "top_k=32: "),
        (dict(top_p=0.0), "top_p=0.0: "),
        (dict(seed=-1), "seed=-1: "),
        (dict(stop=(-1,)), "stop=[-1]: "),
        (dict(stop=(1,) * (MOST_STOPS + 1)), "stop=(1, 1, 1, 1, 1, 1, 1, 1, 1): "),
    ],
)
def test_bad_requests_are_refused(fields, message):
    """One line with the field and its value, before the request gets a row."""
    request = ask(**{"tokens": [1, 2, 3], **fields})
    with pytest.raises(UserError) as refusal:
        engine_of("gpt").submit(request)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("settings, message", [(dict(rows=0), "rows=0: "), (dict(length=73), "length=73: ")])
def test_bad_engines_are_refused(settings, message):
    """Sizes that cannot work, before anything is compiled."""
    with pytest.raises(UserError, match=message):
        make_engine(**settings)


def test_params_are_as_they_were():
    """An engine keeps its own copy: what it was given can still be trained."""
    params = jax.tree.map(jax.numpy.asarray, params_of("gpt"))
    make_engine(params=params, rows=1, at_once=2).generate_all([ask([1, 2], 5)])
    jax.tree.map(np.testing.assert_array_equal, params, params_of("gpt"))
