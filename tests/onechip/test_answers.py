"""The scorer against a float64 model, text by text: shared prefixes, padding, windows, long texts, several devices."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from configs import quick_compiler, random_params, replace  # noqa: F401  (a fixture for every test)
from reference import gpt_logits, widen
from reference_05 import nanochat_logits
from reference_core import losses_and_hits
from test_05_model import SMALL
from test_05_model import random_params as random_params_05

from onechip.answer_rows import BatchSizes, Shape
from onechip.answers import judge_places
from onechip.chips import topology_devices
from onechip.questions import Text
from onechip.weights import weight_shapes

TESTS = Path(__file__).resolve().parent.parent
train = importlib.import_module("02_train")
speedrun = importlib.import_module("05_speedrun")

GPT = replace(device_batch_size=4, total_batch_size=4)  # batches of 72 tokens; context 18, an S layer sees 9 keys
NANOCHAT = dataclasses.replace(SMALL, seq_len=134, device_batch_size=3)  # S layers see 129 keys, L layers 135


def draw(rng, size):
    """Random ids, a list."""
    return rng.integers(0, 31, size).tolist()


def branching(rng, prefix, endings, start=None):
    """A question whose texts begin alike: ids of a prefix, then endings of these sizes, different from the first on."""
    head = draw(rng, prefix)
    tails = [[i, *draw(rng, size - 1)] for i, size in enumerate(endings)]
    return [Text(head + tail, start or prefix, prefix + len(tail)) for tail in tails]


def make_questions(scale=1):
    """Questions of every kind: ten and more lengths, two to five texts, shared beginnings, shared ends, none."""
    rng = np.random.default_rng(3)
    questions = [branching(rng, scale * p, e) for p, e in ((30, (3, 5)), (41, (1, 2, 9, 4, 2)), (9, (20, 4, 7)))]
    questions += [branching(rng, scale * 24, (6, 2), start=7)]  # what counts begins within what is shared
    tail = draw(rng, 4)
    heads = [draw(rng, scale * size) for size in (13, 17)]
    questions += [[Text(head + tail, len(head), len(head) + 4) for head in heads]]
    questions += [[Text(ids := draw(rng, scale * size), len(ids) - 3, len(ids))] for size in (7, 16, 17, 50)]
    questions += [[Text(draw(rng, 5), 1, 5)], [Text(draw(rng, 2), 1, 2)], []]
    return questions


def logits_of(config, params):
    """ids (1, T) -> (1, T, V), in float64, of either model."""
    wide = widen(params)
    if isinstance(config, speedrun.Config):
        return lambda tokens: nanochat_logits(wide, tokens, config.seq_len, config.window_pattern)
    return functools.partial(gpt_logits, config, wide)


def assert_scores(config, params, questions, scores):
    """Every Score is the float64 model's: nats to 1e-4, the same hits, some of them and not all."""
    logits, exact = logits_of(config, params), []
    assert list(map(len, scores)) == list(map(len, questions))
    for text, score in zip(sum(questions, []), sum(scores, []), strict=True):
        want = losses_and_hits(logits, *text)
        assert score.nats == pytest.approx(sum(nats for nats, _ in want), abs=1e-4), text
        assert (score.count, score.exact) == (len(want), all(hit for _, hit in want))
        exact.append(score.exact)
    assert 0 < sum(exact) < len(exact)


def with_likeliest(config, params, questions):
    """The questions, and some whose ends are what the model finds likeliest."""
    logits, more = logits_of(config, params), []
    for text in sum(questions[:3], []):
        ids = list(text.tokens)
        for place in range(text.start, text.end):
            ids[place] = int(np.argmax(logits(np.array([ids[:place]]))[0, -1]))
        more.append([Text(ids, text.start, text.end)])
    return questions + more


def one_device():
    return train.make_mesh(jax.devices()[:1])


@functools.cache
def gpt_case():
    params = random_params(GPT)
    return params, with_likeliest(GPT, params, make_questions())


@pytest.mark.parametrize("share", [True, False])
def test_scores_are_those_of_a_float64_gpt(share):
    """Grouped heads, windows, texts of nearly three contexts; with shared prefixes and without."""
    params, questions = gpt_case()
    answerer = train.make_answerer(GPT, train.GPT, one_device())
    answerer.share = share
    assert_scores(GPT, params, questions, answerer(params)(questions))
    assert any(shape.branches for shape in answerer.batches) == share


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scores_are_those_of_a_float64_nanochat(share):
    """Value embeddings, smear across the border, backout; texts beyond the context, whose last layer sees one key more
    than in training."""
    params = random_params_05(NANOCHAT)
    questions = with_likeliest(NANOCHAT, params, make_questions(4))
    answerer = train.make_answerer(NANOCHAT, speedrun.NANOCHAT, one_device())
    answerer.share = share
    assert_scores(NANOCHAT, params, questions, answerer(params)(questions))


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_scores_do_not_depend_on_padding_or_on_what_else_is_asked():
    """Lengths in other steps and batches of other sizes, with fewer questions at a time: the same to 1e-5."""
    params, questions = gpt_case()
    flat = lambda found: [score.nats for scores in found for score in scores]
    answerers = [train.make_answerer(GPT, train.GPT, one_device()) for _ in range(2)]
    answerers[1].sizes = BatchSizes(24, 100, 3000)
    one, two = (answerer(params) for answerer in answerers)
    want = flat(one(questions))
    assert flat(two(questions)) == pytest.approx(want, abs=1e-5)
    assert flat(two([question])[0] for question in questions) == pytest.approx(want, abs=1e-5)


def test_a_program_is_compiled_once_padding_has_cost_as_much():
    """Short rows go into a known program of long ones, twenty tokens of padding at a time, until it is a hundred."""
    answerer = train.make_answerer(GPT, train.GPT, one_device())
    answerer.sizes = BatchSizes(8, 40, 100)
    ask = lambda length: answerer.plan([[Text([0] * length, 1, length)]])[0][0]
    long, short = Shape(1, 24, 0), Shape(2, 16, 0)
    assert ask(22) == long
    shapes = [ask(15) for _ in range(14)]
    assert shapes == [long] * 12 + [short] * 2
    assert answerer.batches == {long: 13, short: 2} and ask(23) == long


def test_the_first_of_equal_logits_is_the_likeliest():
    """As torch.argmax: of two equal columns of lm_head the second never is."""
    hidden = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    head = np.zeros((4, 6), np.float32)
    head[:, 2] = head[:, 4] = np.abs(hidden[1, 1]) * np.sign(hidden[1, 1])
    for target in (2, 4):
        nats, hit = judge_places(15.0, head, hidden, np.array([4]), np.array([target]))
        z = 15 * np.tanh(hidden[1, 1].astype(np.float64) @ head / 15)
        assert float(nats[0]) == pytest.approx(np.log(np.exp(z).sum()) - z[target], abs=1e-5)
        assert bool(hit[0]) == (target == 2)


# ----------------------------------------------------------------------------------------------------------------------
# Other attentions, bfloat16, several devices, a chip


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["jax", "splash", "pallas"])
def test_every_attention_gives_the_same_scores(impl):
    """The kernels, interpreted, at lengths that are multiples of their blocks; beyond what one holds, the other's."""
    config = replace(
        head_dim=128, aspect_ratio=768, n_head=6, n_kv_head=2, seq_len=128, attn_impl=impl, window_pattern="L"
    )
    params, rng = random_params(config), np.random.default_rng(1)
    questions = [branching(rng, 150, (3, 5)), [Text(draw(rng, 60), 50, 60)]]
    other = dataclasses.replace(config, attn_impl="einsum")
    found, want = (train.make_answerer(c, train.GPT, one_device())(params)(questions) for c in (config, other))
    for one, two in zip(sum(found, []), sum(want, []), strict=True):
        assert one.nats == pytest.approx(two.nats, rel=1e-4) and one.exact == two.exact


def test_a_text_too_long_for_the_kernel_goes_to_splash():
    """`pallas` holds a head whole: 4,096 tokens of 128 channels."""
    config = train.Config()
    assert [train.attention_for(config, n) for n in (4096, 4224)] == [train.attention_pallas, train.attention_splash]


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    """Rounded to 8 bits: within 0.2 nats a token, and of another verdict only in few."""
    params, questions = gpt_case()
    exact, rounded = (
        sum(train.make_answerer(replace(dtype=dtype), train.GPT, one_device())(params)(questions), [])
        for dtype in ("float32", "bfloat16")
    )
    nats = lambda scores: np.array([score.nats / score.count for score in scores])
    assert 1e-4 < np.abs(nats(rounded) - nats(exact)).max() < 0.2
    assert sum(a.exact != b.exact for a, b in zip(exact, rounded, strict=True)) <= 3 < len(exact) / 8


def report_devices():
    """Prints one line of JSON: nats and hits of the questions on 1 and on 4 devices, and how many batches each took."""
    params, questions = gpt_case()
    report = {"devices": jax.device_count()}
    for count in (1, 4):
        answerer = train.make_answerer(GPT, train.GPT, train.make_mesh(jax.devices()[:count]))
        scores = sum(answerer(params)(questions), [])
        report[str(count)] = [[score.nats for score in scores], [score.exact for score in scores]]
        report[f"batches {count}"] = sum(answerer.batches.values())
    print(json.dumps(report))


@pytest.mark.slow
def test_four_devices_share_the_rows():
    """The same scores to 1e-5, in fewer batches."""
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "support"), str(TESTS / "onechip")]
    code = f"import sys; sys.path[:0] = {paths}; import test_answers; test_answers.report_devices()"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["devices"] == 4 and report["batches 4"] < report["batches 1"]
    assert report["4"][0] == pytest.approx(report["1"][0], abs=1e-5) and report["4"][1] == report["1"][1]


@pytest.mark.slow
def test_programs_for_a_v6e_have_their_kernels_and_no_logits_of_a_batch():
    """Two layers, two kernels, with branches; what lm_head's program holds is a slice of logits, not a batch's."""
    pytest.importorskip("libtpu", reason="compiling for v6e needs libtpu: jax[tpu]")
    config = train.Config(n_head=2, n_kv_head=1, aspect_ratio=128, vocab_size=8192, seq_len=512, device_batch_size=8)
    answerer = train.make_answerer(config, train.GPT, train.make_mesh(topology_devices("v6e:1x1")))
    params = weight_shapes(config, train.GPT.weights(config))
    shape = answerer.shape_of(1000, 100)
    assert shape == Shape(3, 1024, 128)
    states, heads = (lowered.compile() for lowered in answerer.lower(params, shape))
    assert states.as_text().count('custom_call_target="tpu_custom_call"') == config.n_layer == 2
    logits = 4 * answerer.judged * config.vocab_size
    assert heads.memory_analysis().temp_size_in_bytes < 2 * logits < 4 * 3 * 1152 * config.vocab_size
