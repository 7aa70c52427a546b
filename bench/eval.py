"""What the whole of CORE costs 02's default model on one v6e, by the compiler's estimate. No TPU is needed or used.

    uv run bench/eval.py                      tokens by the tasks' shapes, estimated; then the seven largest programs
    uv run bench/eval.py tokens               the table of tokens alone
    uv run bench/eval.py BUNDLE TOKENIZER     tokens counted in a bundle, a folder or a zip, with a tokenizer.json
    uv run bench/eval.py tokens BUNDLE TOKENIZER

Batches and padding are the scorer's own: its plan is made for all 91,037 examples, with common prefixes computed once
and without. Times are estimates of the compiler, not measurements (onechip/estimate.py).
"""

import collections
import functools
import importlib
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

import numpy as np

from onechip import core
from onechip.bundle import EXAMPLES, open_bundle
from onechip.chips import CHIPS, GIB, topology_devices
from onechip.estimate import peak_bytes, xla_cycles
from onechip.kernels import block_size, tiles
from onechip.questions import Text
from onechip.weights import weight_shapes

MC, SCHEMA, LM = "multiple_choice", "schema", "language_modeling"
# Until a bundle is here: kind, shots, choices, tokens of a question and of an answer, on average and by estimate, from
# what is known of the data sets, with a vocabulary of 32,768.
TASKS = {
    "hellaswag_zeroshot": (MC, 0, 4, 55, 28), "jeopardy": (LM, 10, 1, 32, 3),
    "bigbench_qa_wikidata": (LM, 10, 1, 10, 3), "arc_easy": (MC, 10, 4, 30, 5), "arc_challenge": (MC, 10, 4, 34, 7),
    "copa": (MC, 0, 2, 10, 7), "commonsense_qa": (MC, 10, 5, 20, 2), "piqa": (MC, 10, 2, 14, 24),
    "openbook_qa": (MC, 0, 4, 14, 5), "lambada_openai": (LM, 0, 1, 90, 2), "hellaswag": (MC, 10, 4, 55, 28),
    "winograd": (SCHEMA, 0, 2, 12, 8), "winogrande": (SCHEMA, 0, 2, 18, 7),
    "bigbench_dyck_languages": (LM, 10, 1, 60, 3), "agi_eval_lsat_ar": (MC, 3, 5, 260, 15),
    "bigbench_cs_algorithms": (LM, 10, 1, 60, 1), "bigbench_operators": (LM, 10, 1, 35, 2),
    "bigbench_repeat_copy_logic": (LM, 10, 1, 30, 12), "squad": (LM, 10, 1, 190, 4), "coqa": (LM, 0, 1, 420, 3),
    "boolq": (MC, 10, 2, 150, 1), "bigbench_language_identification": (MC, 10, 11, 110, 3),
}  # fmt: skip
SPREAD = 0.4  # of the logarithm of a length
PROGRAMS = 7  # that are compiled: those with the most tokens
# Instruction bundles of a head in our forward kernel (onechip/estimate.py): for a block of 512 tokens, for each visited
# tile; and what tiles of smaller blocks cost more, by their area.
BLOCK_BUNDLES, TILE_BUNDLES, SMALLER = 408, 535, {512: 1.0, 256: 1.25, 128: 1.6}


# ----------------------------------------------------------------------------------------------------------------------
# Questions


def estimated_questions(label):
    """Lists of Texts as long as the examples of a task are thought to be, one list for each."""
    kind, shots, choices, question, answer = TASKS[label]
    rng = np.random.default_rng(len(label))
    draw = lambda mean, *shape: np.maximum(1, mean * rng.lognormal(-(SPREAD**2) / 2, SPREAD, shape)).astype(int)
    for _ in range(EXAMPLES[label]):
        before = int(draw(question, shots).sum() + draw(answer, shots).sum()) + 2 * shots + 1
        if kind == SCHEMA:
            contexts, end = draw(question, choices), int(draw(answer))
            yield [Text([0, *[j + 1] * n, *[0] * end], n + 1, n + 1 + end) for j, n in enumerate(contexts.tolist())]
            continue
        before += int(draw(question))
        yield [
            Text([0] * before + [j + 1] * n, before, before + n) for j, n in enumerate(draw(answer, choices).tolist())
        ]


def counted_questions(task, tokenizer):
    """Lists of Texts of the examples of a task."""
    items, bos = core.choose_items(task), tok.opening_id(tokenizer)
    encode = lambda texts: [ids[1:] for ids in tok.encode_batch(tokenizer, texts)]
    for start in range(0, len(items), core.CHUNK):
        numbers = range(start, min(start + core.CHUNK, len(items)))
        for question in core.make_questions(task, items, numbers, encode, bos):
            yield [text for text in question.texts if core.is_scored(text)]


def questions_of(names):
    """{label: a function that yields its questions}, and whether their tokens are counted or estimated."""
    if not names:
        return {label: functools.partial(estimated_questions, label) for label in TASKS}, "estimated"
    bundle, tokenizer = open_bundle(names[0]), tok.load_tokenizer(names[1])
    return {task.label: functools.partial(counted_questions, task, tokenizer) for task in bundle}, "counted"


# ----------------------------------------------------------------------------------------------------------------------
# Plans


def chunks(questions):
    """Lists of as many questions as are scored at a time."""
    return iter(lambda: list(itertools.islice(questions, core.CHUNK)), [])


def plan(answerer, questions):
    """(tokens computed, calls of lm_head's program) for all questions; the answerer counts its batches."""
    tokens = calls = 0
    for chunk in chunks(questions):
        for shape, rows in answerer.plan(chunk):
            tokens += shape.rows * shape.width
            counted = sum(text.end - text.start for row in rows for _, text in row.texts)
            calls += -(-counted // answerer.judged)
    return tokens, calls


def print_tokens(tasks, how, shared, apart):
    """A row for each task; returns the calls of lm_head's program, with sharing and without."""
    print(f"{'task':34}{'texts':>8}{'tokens a text':>15}{'longest':>9}{'M tokens':>10}{'shared':>8}   {how}")
    totals, calls = np.zeros(3), np.zeros(2, int)
    for label, questions in tasks.items():
        lengths = np.array([len(text.tokens) for texts in questions() for text in texts])
        (once, calls_once), (each, calls_each) = plan(shared, questions()), plan(apart, questions())
        totals, calls = totals + [lengths.sum(), each, once], calls + [calls_once, calls_each]
        row = f"{label:34}{len(lengths):8,}{lengths.mean():15.0f}{lengths.max():9,}"
        print(f"{row}{each / 1e6:10.2f}{once / 1e6:8.2f}", flush=True)
    given, each, once = totals / 1e6
    print(f"all: {given:.1f}M tokens; padded {each:.1f}M; with common prefixes computed once, padded, {once:.1f}M")
    return calls


# ----------------------------------------------------------------------------------------------------------------------
# Times


def kernel_cycles(config, shape):
    """Cycles of the attention kernels of a batch."""
    block, bundles = block_size(shape.prefix), 0
    for window in config.long_windows:
        visited = sum(1 for _ in tiles(shape.prefix, window, block))
        bundles += BLOCK_BUNDLES * shape.prefix / 512 + visited * TILE_BUNDLES * (block / 512) ** 2 * SMALLER[block]
    return bundles * shape.rows * config.n_head


def estimate_batch(answerer, params, shape, clock):
    """Seconds of (a batch's hidden states, a call of lm_head's program), by compiling both."""
    start = time.perf_counter()
    states, judge = (lowered.compile() for lowered in answerer.lower(params, shape))
    cycles = xla_cycles(states.as_text()) + kernel_cycles(answerer.config, shape)
    seconds = cycles / clock, xla_cycles(judge.as_text()) / clock
    print(f"  {shape.rows} x ({shape.prefix} + {shape.branches}): {1e3 * seconds[0]:.2f} ms, lm_head "
          f"{1e3 * seconds[1]:.2f} ms a call; {peak_bytes(states, 'tpu') / GIB:.2f} GiB; compiled in "
          f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    return seconds


def tokens_of(answerer):
    """{Shape: tokens that an Answerer has computed, or planned, in batches of it}."""
    return collections.Counter({s: s.rows * s.width * count for s, count in answerer.batches.items()})


def print_times(shared, apart, calls):
    """Compiles the programs with the most tokens for a v6e, and adds up; a token of the others is taken to cost what
    the dearest of these takes, with branches or without."""
    config, device = shared.config, shared.split.mesh.devices.flat[0]
    params, clock = weight_shapes(config, train.GPT.weights(config)), CHIPS[device.device_kind].clock
    most = (tokens_of(shared) + tokens_of(apart)).most_common(PROGRAMS)
    seconds = {shape: estimate_batch(shared, params, shape, clock) for shape, _ in most}
    judge, rates = max(of_call for _, of_call in seconds.values()), {}
    for shape, (of_batch, _) in seconds.items():
        kind = bool(shape.branches)
        rates[kind] = max(rates.get(kind, 0), of_batch / (shape.rows * shape.width))
    for answerer, count, what in ((shared, calls[0], "once"), (apart, calls[1], "for each text")):
        of_batch = lambda s: seconds[s][0] if s in seconds else rates[bool(s.branches)] * s.rows * s.width
        total = sum(of_batch(shape) * batches for shape, batches in answerer.batches.items()) + judge * count
        tokens = tokens_of(answerer)
        known = sum(n for shape, n in tokens.items() if shape in seconds) / tokens.total()
        print(f"CORE, {config.n_layer} layers of {config.n_embd}, common prefixes computed {what}: {total / 60:.1f} "
              f"minutes; {len(tokens)} programs, {known:.0%} of the tokens in those that were compiled")  # fmt: skip


def main(names):
    only_tokens, names = names[:1] == ["tokens"], names[names[:1] == ["tokens"] :]
    mesh, config = train.make_mesh(topology_devices("v6e:1x1")), train.Config()
    shared, apart = (train.make_answerer(config, train.GPT, mesh) for _ in range(2))
    apart.share = False
    calls = print_tokens(*questions_of(names), shared, apart)
    for answerer in (shared, apart):
        print({f"{s.rows} x ({s.prefix} + {s.branches})": n for s, n in sorted(answerer.batches.items())})
    if not only_tokens:
        print_times(shared, apart, calls)


if __name__ == "__main__":
    main(sys.argv[1:])
