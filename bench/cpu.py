"""02 on this machine's CPU: training, start, decoding, tokenizer and loader, as one JSON object.

    uv run bench/cpu.py                            everything, five minutes on two cores
    uv run bench/cpu.py train decode               some of: train, start, decode, tokenizer, loader

Float32, AdamW, full attention, random tokens for `train`, in the two shapes of the table of peers in
docs/benchmarks.md. Each figure is the median of three rounds, with the lowest and highest next to it; the machine's own
matrix product is timed in the same rounds, and the share of it counts the keys that a causal query sees. Other load on
the machine lowers all of them: compare figures of one run.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
train = importlib.import_module("02_train")
tok = train.tok

import jax
import jax.numpy as jnp
import numpy as np

from onechip.loader import PrefetchDataLoader
from onechip.machine import keep_freed_memory

ROUNDS = 3
PLAIN = dict(attn_impl="einsum", dtype="float32", window_pattern="L", head_dim=128, loss_slice=1024)
SHAPES = {
    "small": dict(n_head=2, aspect_ratio=64, vocab_size=8192, seq_len=512, device_batch_size=8, total_batch_size=8),
    "medium": dict(n_head=4, aspect_ratio=64, vocab_size=32768, seq_len=1024, device_batch_size=2, total_batch_size=2),
}


def config_of(shape):
    return train.Config(**PLAIN, **SHAPES[shape])


def summarize(values, digits=0):
    """Median, lowest and highest of some figures."""
    low, middle, high = (round(f(values), digits) for f in (min, statistics.median, max))
    return {"median": middle, "low": low, "high": high}


def rate(action, amount, seconds=4.0):
    """amount per second of action(), called for about `seconds` after one call to warm up."""
    action()
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds or not calls:
        action()
        calls += 1
    return amount * calls / spent


def matmul_rate(n=2048):
    """FLOP/s of JAX's own float32 matrix product."""
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    return rate(lambda: product(a, a).block_until_ready(), 2 * n**3, 2.0)


class Stepper:
    """A training step that is called again and again on the same random tokens."""

    def __init__(self, config):
        self.config, self.mesh = config, train.make_mesh()
        self.step = train.make_train_step(config, self.mesh)
        self.state = train.init_state(config, self.mesh)
        shape = (config.total_batch_size, config.seq_len)
        self.tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)

    def __call__(self):
        self.state, metrics = self.step(self.state, {"x": self.tokens, "y": self.tokens})
        metrics["loss"].block_until_ready()


def bench_train():
    """Training tokens per second by shape, and the share of the matrix product's rate that they are."""
    rounds, rates = {name: [] for name in SHAPES}, []
    steppers = {name: Stepper(config_of(name)) for name in SHAPES}
    for _ in range(ROUNDS):
        rates.append(matmul_rate())
        for name, stepper in steppers.items():
            rounds[name].append(rate(stepper, stepper.tokens.size, 8.0))
    result = {"matmul_gflops": summarize([r / 1e9 for r in rates])}
    for name, values in rounds.items():
        flops = train.flops_per_token(steppers[name].config)
        share = flops * statistics.median(values) / statistics.median(rates)
        result[name] = {"tokens_per_second": summarize(values), "mflop_per_token": round(flops / 1e6, 1)}
        result[name]["share_of_matmul"] = round(share, 3)
    return result


FIRST_STEP = """
import importlib, sys
sys.path.insert(0, {root!r})
bench = importlib.import_module("bench.cpu")
from onechip.machine import prepare
prepare()
bench.Stepper(bench.config_of("small"))()
"""


def bench_start():
    """Seconds from a process's start to the end of its first step: no program compiled yet, and compiled before.

    Python's own bytecode is there in both, as after any first start: where a container forbids to write it
    (PYTHONDONTWRITEBYTECODE), every process parses JAX again, which takes a second.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", FIRST_STEP.format(root=str(ROOT))]
    cold, warm = [], []
    for _ in range(1 + ROUNDS):
        with tempfile.TemporaryDirectory() as home:
            for times in (cold, warm):
                start = time.perf_counter()
                subprocess.run(command, check=True, env=environment | {"ONECHIP_HOME": home})
                times.append(time.perf_counter() - start)
    cold, warm = cold[1:], warm[1:]  # the first pair leaves the bytecode
    return {"cold_seconds": summarize(cold, 2), "warm_seconds": summarize(warm, 2)}


def bench_decode(prompt=64, new=128):
    """Greedy tokens per second at batch 1 with a cache, by shape; the prompt's pass is part of it."""
    result = {}
    for name in SHAPES:
        config = config_of(name)
        params = train.init_params(config, jax.random.key(0))
        sampler = train.make_sampler(config, new)
        ids = list(range(1, prompt + 1))
        decode = functools.partial(train.generate, config, params, ids, new, sampler=sampler)
        result[name] = {"tokens_per_second": summarize([rate(decode, new) for _ in range(ROUNDS)])}
    return result


def offline_tokens(config):
    """(a maker of the stream of batches, the tokenizer, the texts) of the offline corpus."""
    corpus = tok.get_corpus("offline", 0)
    tokenizer = tok.get_tokenizer(corpus, config.vocab_size)
    stream = lambda: train.pretraining_batches(config, corpus, tokenizer)
    return stream, tokenizer, [text for _, text in tok.read_documents(corpus.train)]


def tokens_folder(corpus, tokenizer, folder):
    """The corpus's shards as shards of tokens in a folder, with their tokenizer; returns the Corpus."""
    for path in (*corpus.train, *corpus.val):
        texts = [text for _, text in tok.read_documents([path])]
        ids = itertools.chain.from_iterable(tok.encode_batch(tokenizer, texts))
        tok.write_tokens(Path(folder) / f"{path.stem}.bin", list(ids))
    tok.save_tokenizer(tokenizer, Path(folder) / "tokenizer.json")
    return tok.folder_corpus(folder)


def row_readers(tokenizer, folder, rows=8, length=2049, batches=60):
    """{name: function that reads tokens packed in rows of 2,049 and returns how many}, of text and of tokens.

    The documents that wait to be packed are there before the first call.
    """
    corpus, readers = tok.offline_corpus(), {}
    for name, paths in (("rows", corpus.train), ("rows_from_bin", tokens_folder(corpus, tokenizer, folder).train)):
        packed = tok.packed_rows(tokenizer, paths, rows, length)
        next(packed)
        readers[name] = lambda packed=packed: sum(tokens.size for tokens, _ in itertools.islice(packed, batches))
    return readers


def bench_tokenizer():
    """Seconds to train 8,192 tokens on the offline corpus, on all cores; tokens per second and CPU second: encoded by
    the tokenizer alone, as the stream that training reads, and as rows of 2,049 packed from parquet and from .bin."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_tokens(folder)


def measure_tokens(folder):
    """bench_tokenizer's figures; folder: where the shards of tokens go."""
    stream, tokenizer, texts = offline_tokens(config_of("small"))

    def per_second(action):
        """(tokens per second, tokens per CPU second) of an action that returns how many it made."""
        start, cpu = time.perf_counter(), time.process_time()
        count = action()
        return count / (time.perf_counter() - start), count / (time.process_time() - cpu)

    def timed_training():
        start = time.perf_counter()
        tok.train_tokenizer(iter(texts), 8192)
        return time.perf_counter() - start

    encode = lambda: sum(len(ids) for i in range(0, 640, 32) for ids in tok.encode_batch(tokenizer, texts[i : i + 32]))
    read = lambda: sum(batch["x"].size for batch, _ in itertools.islice(stream(), 250))
    result = {"train_seconds": summarize([timed_training() for _ in range(ROUNDS)], 2)}
    actions = {"encode": encode, "stream": read, **row_readers(tokenizer, folder)}
    rounds = [{name: per_second(action) for name, action in actions.items()} for _ in range(ROUNDS)]
    for name in actions:
        wall, cpu = zip(*(figures[name] for figures in rounds), strict=True)
        result[f"{name}_tokens_per_second"] = summarize(wall)
        result[f"{name}_tokens_per_cpu_second"] = summarize(cpu)
    return result


def bench_loader():
    """Tokens per second of the step without and with a loader, and how long the step waits for a batch."""
    stepper, without, with_loader, waited = Stepper(config_of("small")), [], [], []
    stream, _, _ = offline_tokens(stepper.config)
    for _ in range(ROUNDS):
        without.append(rate(stepper, stepper.tokens.size, 6.0))
        with PrefetchDataLoader(stream()) as loader:

            def step():
                start = time.perf_counter()
                batch, _ = next(loader)
                stepper.tokens = batch["x"]
                waited.append(time.perf_counter() - start)
                stepper()

            with_loader.append(rate(step, stepper.tokens.size, 6.0))
    return {
        "step_without_loader": summarize(without), "step_with_loader": summarize(with_loader),
        "wait_ms_per_step": summarize([1e3 * w for w in waited], 2),
    }  # fmt: skip


BENCHES = {
    "train": bench_train, "start": bench_start, "decode": bench_decode, "tokenizer": bench_tokenizer,
    "loader": bench_loader,
}  # fmt: skip


def measure(name):
    """One part, in a process of its own: how 02 keeps freed memory is for steps, and slows what encodes alone."""
    done = subprocess.run([sys.executable, __file__, "--in-this-process", name], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main(names):
    if names[:1] == ["--in-this-process"]:
        if names[1] != "tokenizer":
            keep_freed_memory()  # as 02 does
        with contextlib.redirect_stdout(sys.stderr):
            result = BENCHES[names[1]]()
    else:
        result = {"jax": jax.__version__, "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
        result |= {name: measure(name) for name in names or BENCHES}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
