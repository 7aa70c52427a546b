"""02_train's way from documents to a trained model: stream, loader, evaluation, loop, resume, profile, command line."""

import dataclasses
import errno
import functools
import gc
import glob
import importlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from conftest import ROOT
from safetensors import SafetensorError
from safetensors.numpy import load_file

from onechip.checkpoints import newest_checkpoint, write_checkpoint
from onechip.errors import UserError
from onechip.profile import ProfileWindow
from onechip.runlog import RunLog
from onechip.settings import Run, choose

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
pytestmark = pytest.mark.usefixtures("compiled_once")

VOCAB = 300
ROWS = 7  # of held-out tokens: no batch size but 1 and 7 divides it
TINY = {
    "n_head": 2,
    "n_kv_head": 1,
    "head_dim": 8,
    "aspect_ratio": 8,
    "vocab_size": VOCAB,
    "seq_len": 24,
    "attn_impl": "einsum",
    "dtype": "float32",
    "device_batch_size": 2,
    "total_batch_size": 6,
    "num_iterations": 26,
    "learning_rate": 1e-2,
    "eval_every": 8,
    "eval_tokens": ROWS * 24,
    "sample_every": 0,
    "keep": 99,
    "save_every": 6,
}


def tiny(**changes):
    return train.Config(**{**TINY, **changes})


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C works before and after each test, also where pytest was started in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler, "a handler was left behind"


# ---------------------------------------------------------------------------------------------------------------
# A corpus small enough to pass through several times: 3 training shards of 2 to 3 row groups, about 20 batches

WORDS = "the of and energy light measure water plant number import return self value naïve 数据 <|bos|> 1024".split()


def write_documents(count, seed, longest):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + ".\n" for _ in range(count)]
    texts[count // 2] = ""  # left out by the reader, and no reason to lose count
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder corpus: shards of 17, 11 and 23 documents in row groups of 7, 5 and 23, and 40 short ones held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for i, (count, group, longest) in enumerate([(17, 7, 30), (11, 5, 30), (23, 23, 30), (40, 4, 9)]):
        table = pa.table({"text": write_documents(count, i, longest)})
        pq.write_table(table, folder / f"shard_{i:05d}.parquet", row_group_size=group)
    return tok.folder_corpus(folder)


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return tok.train_tokenizer((text for _, text in tok.read_documents(corpus.train)), VOCAB)


def texts_of(paths):
    """All documents, read without the code under test."""
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist() if text]


def pack(tokenizer, paths, epochs=1):
    """The token stream made independently: <|bos|> and the ids of each document, end to end."""
    bos = tokenizer.token_to_id("<|bos|>")
    once = [i for text in texts_of(paths) for i in [bos, *tokenizer.encode(text).ids]]
    return np.array(once * epochs)


# ---------------------------------------------------------------------------------------------------------------
# Token stream

BATCH = 144


@pytest.mark.parametrize("docs_per_call", [1, 5, 32, 1000])
def test_stream_is_every_document_once_per_epoch_in_order(corpus, tokenizer, docs_per_call):
    """Batch i is tokens i*n to i*n+n inclusive of the packed text, across shards, row groups and the epoch's end."""
    packed = pack(tokenizer, corpus.train, epochs=3)
    stream = train.token_stream(tokenizer, corpus.train, BATCH, docs_per_call=docs_per_call)
    count = (len(packed) - 1) // BATCH
    assert count > 40 and len(packed) // 3 % BATCH, "the epoch's end should fall inside a batch"
    for i in range(count):
        tokens, state = next(stream)
        assert tokens.dtype == np.int32 and tokens.shape == (BATCH + 1,)
        np.testing.assert_array_equal(tokens, packed[i * BATCH : (i + 1) * BATCH + 1], err_msg=f"batch {i}")
        assert state["tokens"].dtype == np.int32 and state["tokens"][0] == tokens[-1]


def test_a_document_that_spells_a_special_token_does_not_end(corpus, tokenizer):
    """ "<|bos|>" in a document is text: the only bos ids in the stream are those that open documents."""
    assert any("<|bos|>" in text for text in texts_of(corpus.train))
    stream = train.token_stream(tokenizer, corpus.train, len(pack(tokenizer, corpus.train)) - 1)
    tokens, _ = next(stream)
    assert (tokens == tokenizer.token_to_id("<|bos|>")).sum() == len(texts_of(corpus.train))


@pytest.mark.parametrize("docs_per_call", [3, 32])
def test_stream_goes_on_exactly_from_the_state_of_every_batch(corpus, tokenizer, docs_per_call):
    """From the state behind any batch of two epochs, JSON in between, a new stream gives the very same batches.

    Its own states may cut the stream elsewhere: documents are read in groups, counted from where it began.
    """
    make = functools.partial(train.token_stream, tokenizer, corpus.train, BATCH, docs_per_call=docs_per_call)
    straight = list(itertools.islice(make(), 2 * len(pack(tokenizer, corpus.train)) // BATCH))
    places = set()
    for i, (_, state) in enumerate(straight[:-1]):
        position = json.loads(json.dumps({k: v for k, v in state.items() if k != "tokens"}))
        places.add(tuple(position.values()))
        left = state["tokens"].tolist()
        resumed = make({**position, "tokens": np.array(left, np.int32)})
        for (tokens, _), (same, _) in zip(straight[i + 1 :], resumed, strict=False):
            np.testing.assert_array_equal(tokens, same, err_msg=f"after batch {i}")
    epochs = {place[0] for place in places}
    assert epochs == {0, 1} and (docs_per_call == 32 or len({place[1:3] for place in places}) > 5)


def test_batches_are_rows_and_y_is_x_one_token_later(corpus, tokenizer):
    """x and y are int32 (total_batch_size, T); y continues x within a row, and the next row continues it again."""
    config = tiny()
    n = config.total_batch_size * config.seq_len
    packed = pack(tokenizer, corpus.train, epochs=2)
    batches = train.batches_from(train.token_stream(tokenizer, corpus.train, n), config)
    for i, ((x, y), state) in enumerate(itertools.islice(batches, 30)):
        for a, start in ((x, i * n), (y, i * n + 1)):
            assert a.dtype == np.int32 and a.shape == (6, 24)
            np.testing.assert_array_equal(a.ravel(), packed[start : start + n])
        assert set(state) == {"epoch", "shard", "row_group", "document", "tokens"}


def test_a_corpus_of_too_few_tokens_is_one_line(corpus, tokenizer):
    """A corpus shorter than one batch is refused at the first batch and not trained on over and over."""
    total = len(pack(tokenizer, corpus.train))
    with pytest.raises(UserError, match=f"{total:,} tokens") as caught:
        next(train.token_stream(tokenizer, corpus.train, total))
    assert "\n" not in str(caught.value) and f"{total:,}" in str(caught.value)
    assert len(next(train.token_stream(tokenizer, corpus.train, total - 1))[0]) == total


def test_an_empty_corpus_does_not_spin(tmp_path, tokenizer):
    """Shards without documents end in a UserError and not in an endless loop over epochs."""
    for i in range(2):
        pq.write_table(pa.table({"text": pa.array(["", ""], pa.string())}), tmp_path / f"shard_{i}.parquet")
    with pytest.raises(UserError, match="too few"):
        next(train.token_stream(tokenizer, tuple(tmp_path.glob("*.parquet")), BATCH))


# ---------------------------------------------------------------------------------------------------------------
# Loader


def wait_until(condition, seconds=10.0):
    """Polls; a loaded machine gets its time, a quick one does not wait."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.fixture
def nothing_left():
    """Afterwards there is no loader thread and no device buffer that was not there before."""
    gc.collect()
    before = len(jax.live_arrays())
    yield
    assert loader_threads() == []
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_loader_keeps_the_order_and_ends_with_its_source(nothing_left):
    """Every item comes once, placed, beside its own state; then StopIteration, again and again."""
    loader = train.PrefetchDataLoader(((i, f"state {i}") for i in range(50)), place=lambda i: 10 * i)
    assert list(loader) == [(10 * i, f"state {i}") for i in range(50)]
    assert next(loader, None) is None and next(loader, None) is None
    loader.close()
    with train.PrefetchDataLoader(iter([(1, 2)])) as loader:  # an iterator without close()
        assert list(loader) == [(1, 2)]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_loader_works_ahead_as_far_as_its_depth(depth, nothing_left):
    """Before the first batch is asked for, `depth` wait and one more is made, placed too, and no further one."""
    placed = []
    with train.PrefetchDataLoader(((i, i) for i in itertools.count()), place=placed.append, depth=depth) as loader:
        wait_until(lambda: len(placed) == depth + 1)
        time.sleep(0.2)
        assert len(placed) == depth + 1
        next(loader)
        wait_until(lambda: len(placed) == depth + 2)
        time.sleep(0.2)
        assert len(placed) == depth + 2


def fail_deep_inside(i):
    raise LookupError(f"item {i} is broken")


def test_loader_raises_its_threads_error_at_once_and_with_its_traceback(nothing_left):
    """An error goes before the batches that wait, names the function that failed, and is not lost the second time."""

    def items():
        for i in range(2):
            yield jnp.full(3, i), i
        fail_deep_inside(2)

    loader = train.PrefetchDataLoader(items(), depth=2)
    wait_until(lambda: not loader_threads())
    for _ in range(2):
        with pytest.raises(LookupError, match="item 2 is broken") as caught:
            next(loader)
        assert "fail_deep_inside" in {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}
    loader.close()
    del loader, caught


def test_loader_raises_an_error_that_comes_while_it_is_waited_for(nothing_left):
    """A next() that waits is woken by an error in `place`, not left hanging."""

    def place(item):
        time.sleep(0.2)
        fail_deep_inside(item)

    with train.PrefetchDataLoader(((i, i) for i in itertools.count()), place) as loader:
        with pytest.raises(LookupError, match="item 0"):
            next(loader)


@pytest.mark.parametrize("depth", [1, 3])
def test_loader_closed_with_a_full_queue_leaves_nothing(depth, nothing_left):
    """close() frees the batches that wait and the one in the worker's hands, ends the thread and the generator."""
    gc.collect()
    before, ended, made = len(jax.live_arrays()), [], []

    def items():
        try:
            for i in itertools.count():
                made.append(i)
                yield np.full(5, i), i
        finally:
            ended.append(threading.current_thread().name)

    loader = train.PrefetchDataLoader(items(), jax.device_put, depth=depth)
    wait_until(lambda: len(made) == depth + 1)
    wait_until(lambda: len(jax.live_arrays()) == before + depth + 1)
    loader.close()
    assert ended == ["loader"] and loader_threads() == []
    assert len(jax.live_arrays()) == before, "the closed loader itself holds on to a batch"
    assert next(loader, "end") == "end"
    loader.close()  # a second time does no harm


def test_loader_closed_while_the_worker_is_busy_leaves_nothing(nothing_left):
    """Leaving the `with` block by an error, while a batch is in the making, waits for it and drops it."""
    busy, made = threading.Event(), []

    def place(item):
        busy.set()
        time.sleep(0.3)
        made.append(item)
        return jax.device_put(item)

    with pytest.raises(ZeroDivisionError):
        with train.PrefetchDataLoader(((np.ones(4), i) for i in itertools.count()), place):
            busy.wait(10)
            raise ZeroDivisionError
    assert len(made) == 1 and loader_threads() == []


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def byte_lengths(tokenizer):
    """Bytes per token id by GPT-2's published table (visible bytes stand for themselves, others for 256 and up)."""
    visible = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    characters = {chr(b) for b in visible} | {chr(256 + i) for i in range(256 - len(visible))}
    tokens = [tokenizer.id_to_token(i) for i in range(VOCAB)]
    assert all(set(token) <= characters for token in tokens if not re.fullmatch(r"<\|\w+\|>", token))
    return np.array([0 if re.fullmatch(r"<\|\w+\|>", token) else len(token) for token in tokens])


@pytest.fixture(scope="module")
def random_params():
    """Weights at which every token's loss is its own: at their initial values all logits are 0."""
    params = train.init_params(tiny(), jax.random.key(1))
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        shape, [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def reference_score(corpus, tokenizer, random_params):
    """(nats per token, bits per byte) in float64 NumPy from forward's logits."""
    tokens = pack(tokenizer, corpus.val)[: ROWS * 24 + 1]
    y, sizes = tokens[1:], byte_lengths(tokenizer)
    forward = jax.jit(functools.partial(train.forward, tiny()))
    logits = np.asarray(forward(random_params, tokens[:-1].reshape(ROWS, 24).astype(np.int32)), np.float64)
    logits = logits.reshape(-1, VOCAB)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]
    assert (sizes[y] == 0).sum() > 3, "special tokens should be among the targets"
    return losses.mean(), losses[sizes[y] > 0].sum() / math.log(2) / sizes[y].sum()


@pytest.mark.parametrize("device_batch_size", [1, 3, 4, 16])
def test_score_is_the_same_whatever_the_batch_size(
    corpus, tokenizer, random_params, reference_score, device_batch_size
):
    """Loss and bits per byte equal a float64 reference over the same fixed tokens, padding rows counting nothing."""
    config = tiny(device_batch_size=device_batch_size, total_batch_size=device_batch_size * len(jax.devices()))
    held_out = train.load_held_out(tokenizer, corpus, config)
    evaluate = train.make_evaluator(config, train.make_mesh(), held_out, tok.token_byte_lengths(tokenizer))
    score = evaluate(*train.split_trainable(random_params))
    np.testing.assert_allclose(score, reference_score, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_held_out_rows_and_their_gzip_figure(corpus, tokenizer, rows):
    """The first eval_tokens held-out tokens, and gzip -9 of each document's bytes, the last one cut as they are."""
    config = tiny(eval_tokens=rows * 24 + 23)  # what does not fill a row is left out
    held_out = train.load_held_out(tokenizer, corpus, config)
    n = rows * 24
    packed = pack(tokenizer, corpus.val)
    for a, start in ((held_out.x, 0), (held_out.y, 1)):
        assert a.dtype == np.int32 and a.shape == (rows, 24)
        np.testing.assert_array_equal(a.ravel(), packed[start : start + n])
    compressed = raw = 0
    size_left = int(byte_lengths(tokenizer)[packed[: n + 1]].sum())
    for text in texts_of(corpus.val):
        document = text.encode()[:size_left]
        size_left -= len(document)
        if document:
            gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
            compressed += len(gzip.compress(document) + gzip.flush())
            raw += len(document)
    assert held_out.gzip_bpb == pytest.approx(8 * compressed / raw, rel=1e-12)


def test_more_eval_tokens_than_there_are_is_one_line(corpus, tokenizer):
    """Too large an eval_tokens is refused with the field, its value and how many tokens there are; one less works."""
    total = len(pack(tokenizer, corpus.val))
    most = (total - 1) // 24 * 24
    assert len(train.load_held_out(tokenizer, corpus, tiny(eval_tokens=most)).x) == most // 24
    with pytest.raises(UserError, match="eval_tokens=") as caught:
        train.load_held_out(tokenizer, corpus, tiny(eval_tokens=most + 24))
    assert f"{total:,}" in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# The loop: one straight run that most tests below look at

PROMPTS = ("the", "import self", "water")


def without_times(rows):
    """Rows of metrics but for what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second", "mfu")} for row in rows]


def read_rows(path):
    return without_times(map(json.loads, (Path(path) / "metrics.jsonl").read_text().splitlines()))


def newest_checkpoint(run_dir):
    return newest_checkpoint(Path(run_dir) / "checkpoints")


@pytest.fixture(scope="module")
def straight(corpus, tokenizer, tmp_path_factory):
    """(result, rows that on_log got) of 26 steps with nothing in between, over an epoch's end."""
    rows = []
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "git_commit", lambda: "a commit")
        result = train.train(tiny(), corpus, tokenizer, run_dir, prompts=PROMPTS, on_log=rows.append)
    return result, without_times(rows)


def last_arrays(run_dir):
    """Every array of a run's last checkpoint by name, as bytes."""
    checkpoint = newest_checkpoint(run_dir)
    files = ("params", "mu", "nu", "stream")
    arrays = {
        f"{file}.{name}": a for file in files for name, a in load_file(checkpoint / f"{file}.safetensors").items()
    }
    return {name: array.tobytes() for name, array in arrays.items()}


def last_notes(run_dir):
    """What a run's last checkpoint notes, but for the commit, jax and device it was made with."""
    return {**json.loads((newest_checkpoint(run_dir) / "state.json").read_text()), "made_from": None}


def position_of(run_dir):
    """The stream's state in a run's last checkpoint."""
    tokens = load_file(newest_checkpoint(run_dir) / "stream.safetensors")["tokens"]
    return {**last_notes(run_dir)["stream"], "tokens": tokens}


def assert_same_end(run_dir, straight_dir):
    """The same metrics, step, parameters, moments and best score, bit for bit. (Where the stream is cut may differ.)"""
    assert read_rows(run_dir) == read_rows(straight_dir)
    ours, theirs = last_arrays(run_dir), last_arrays(straight_dir)
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name] and name != "stream.tokens"] == []
    assert {**last_notes(run_dir), "stream": None} == {**last_notes(straight_dir), "stream": None}


def test_metrics_are_one_row_per_step_and_one_per_evaluation(straight):
    """Every step in order, with finite loss, grad_norm and lr; evaluations where they are due; on_log got the same."""
    result, logged = straight
    rows = read_rows(result.run_dir)
    assert rows == logged
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 27))
    assert all(set(row) == {"step", "loss", "grad_norm", "lr"} for row in steps)
    assert all(math.isfinite(value) and value > 0 for row in steps for value in row.values() if value is not row["lr"])
    rates = [float(train.learning_rate_at(tiny(), i)) for i in range(26)]
    np.testing.assert_allclose([row["lr"] for row in steps], rates, rtol=1e-6)
    evals = [row for row in rows if "val_bpb" in row]
    assert [row["step"] for row in evals] == [8, 16, 24, 26]
    assert all(set(row) == {"step", "val_loss", "val_bpb"} for row in evals)
    order = [(row["step"], "val_bpb" in row) for row in rows]
    assert order == sorted(order), "an evaluation's row stands behind its step's"


def test_the_loss_begins_at_log_v_and_falls(straight):
    """At the start every token is as likely as any other; after 26 steps on twenty words it must be far below."""
    rows = [row for row in straight[1] if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.8


def test_the_result_is_what_the_run_reached(straight, corpus, tokenizer):
    """Result holds the last evaluation, the step, gzip's figure, the folder, and parameters that give that score."""
    result, rows = straight
    assert result.step == 26 and {"step": 26, "val_loss": result.val_loss, "val_bpb": result.val_bpb} == rows[-1]
    held_out = train.load_held_out(tokenizer, corpus, tiny())
    assert result.gzip_bpb == held_out.gzip_bpb
    evaluate = train.make_evaluator(tiny(), train.make_mesh(), held_out, tok.token_byte_lengths(tokenizer))
    np.testing.assert_allclose(evaluate(*train.split_trainable(result.params)), result[2:4], rtol=1e-6)


def test_the_last_checkpoint_holds_the_trained_parameters(straight):
    """params.safetensors, read by the library itself, is result.params name by name and bit for bit."""
    result, _ = straight
    names = sorted(path.name for path in (result.run_dir / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in (6, 8, 12, 16, 18, 24, 26)]
    arrays = load_file(result.run_dir / "checkpoints" / names[-1] / "params.safetensors")
    expected = {name: result.params[name] for name in ("wte", "lm_head", "resid_lambdas", "x0_lambdas")}
    for i, layer in enumerate(result.params["layers"]):
        expected |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    assert set(arrays) == set(expected)
    for name, value in expected.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], np.asarray(value), err_msg=name)
    rest = {
        file: load_file(result.run_dir / "checkpoints" / names[-1] / f"{file}.safetensors") for file in ("mu", "nu")
    }
    assert set(rest["mu"]) == set(rest["nu"]) == set(expected) and last_notes(result.run_dir)["step"] == 26


def test_config_json_says_what_produced_the_run(straight, corpus, tokenizer):
    """Config, data and its revision, the tokenizer, commit, jax version and device; nothing of the user's folders."""
    result, _ = straight
    text = (result.run_dir / "config.json").read_text()
    said = json.loads(text)
    assert train.Config(**said["config"]) == tiny()
    assert said["data"] == {"name": corpus.name, "revision": corpus.revision, "shards": 3}
    assert said["jax"] == jax.__version__ and said["commit"] == "a commit"
    assert said["device"] == f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    assert said["tokenizer_sha256"] == tok.tokenizer_hash(tokenizer)
    assert str(Path.home()) not in text and str(corpus.train[0].parent) not in text


def test_loss_png_is_a_picture(straight):
    """loss.png opens as an image of a useful size and is not one flat colour."""
    picture = matplotlib.image.imread(straight[0].run_dir / "loss.png")
    assert picture.shape == (600, 960, 4) and picture[..., :3].std() > 0.05


def test_samples_go_on_from_their_prompts(straight, tokenizer):
    """One (prompt, text) for each prompt, drawn at 0.8 among 50 with the prompt's own seed, up to a <|bos|>."""
    result, _ = straight
    assert [prompt for prompt, _ in result.samples] == list(PROMPTS)
    bos = tokenizer.token_to_id("<|bos|>")
    for seed, (prompt, text) in enumerate(result.samples):
        ids = [bos, *tokenizer.encode(prompt).ids]
        new = train.generate(tiny(), result.params, ids, 12, temperature=0.8, top_k=50, seed=seed)
        new = new[: new.index(bos)] if bos in new else new
        assert text == tokenizer.decode(new)


def test_a_sample_ends_at_the_next_document(tokenizer, monkeypatch):
    """What the model writes after a <|bos|> is another document and is not shown."""
    the, water = (tokenizer.encode(word).ids for word in ("the", " water"))
    made = [*the, *water, tokenizer.token_to_id("<|bos|>"), *the, tokenizer.token_to_id("<|bos|>")]
    monkeypatch.setattr(train, "generate", lambda *args, **kwargs: made)
    assert train.make_sample_writer(tiny(), tokenizer, ["x"])({}) == [("x", "the water")]


def test_the_same_seed_gives_the_same_losses_bit_for_bit(straight, corpus, tokenizer, tmp_path):
    """Twice in one process and once in another: metrics, parameters and moments agree to the last bit."""
    result, _ = straight
    again = train.train(tiny(), corpus, tokenizer, tmp_path / "again")
    assert_same_end(again.run_dir, result.run_dir)
    tok.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    code = (
        "import sys, json, importlib, pathlib\n"
        "train, tok = (importlib.import_module(name) for name in ('02_train', '01_tokenizer'))\n"
        "folder, data = map(pathlib.Path, sys.argv[1:3])\n"
        "config = train.Config(**json.loads(sys.argv[3]))\n"
        "tokenizer = tok.load_tokenizer(folder / 'tokenizer.json')\n"
        "train.train(config, tok.folder_corpus(data), tokenizer, folder / 'other')\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path), str(corpus.train[0].parent), json.dumps(TINY)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert_same_end(tmp_path / "other", result.run_dir)


def test_training_begins_at_the_weights_of_its_seed(corpus, tokenizer, tmp_path, monkeypatch):
    """With a step that changes nothing, the result is init_params of param_seed."""
    quick_step(monkeypatch)
    quick_score(monkeypatch)
    result = train.train(tiny(param_seed=43, num_iterations=1), corpus, tokenizer, tmp_path)
    expected = jax.jit(functools.partial(train.init_params, tiny()))(jax.random.key(43))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ---------------------------------------------------------------------------------------------------------------
# Interrupted and resumed


def interrupt_at(monkeypatch, step, raise_now=None):
    """Makes the `step`-th call of every train step (counted from 1) send SIGINT, or raise `raise_now`, behind it."""
    real = train.make_train_step

    def make(*args):
        train_step, calls = real(*args), itertools.count(1)

        def call(*args):
            result = train_step(*args)
            if next(calls) == step:
                if raise_now:
                    raise raise_now
                signal.raise_signal(signal.SIGINT)
            return result

        return call

    monkeypatch.setattr(train, "make_train_step", make)


@pytest.mark.parametrize("k", [1, 5, 16, 23])
def test_interrupted_and_resumed_is_the_same_run(straight, corpus, tokenizer, tmp_path, monkeypatch, k):
    """Ctrl-C behind step k keeps step k; the next call goes on to the very same metrics, parameters and moments.

    k = 16 is a step whose evaluation is still to be made; 23 is in the second epoch. Steps accumulate 3 x 2.
    """
    with monkeypatch.context() as patch:
        interrupt_at(patch, k)
        cut = train.train(tiny(), corpus, tokenizer, tmp_path, prompts=PROMPTS)
    assert cut.step == k
    assert newest_checkpoint(tmp_path).name == f"step_{k:08d}"
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, k + 1))
    assert position_of(tmp_path)["epoch"] == (1 if k == 23 else 0)
    saved = load_file(newest_checkpoint(tmp_path) / "params.safetensors")
    np.testing.assert_array_equal(saved["wte"], np.asarray(cut.params["wte"]))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and loader_threads() == []

    logged = []
    result = train.train(tiny(), corpus, tokenizer, tmp_path, prompts=PROMPTS, on_log=logged.append)
    assert logged[0]["step"] in (k, k + 1), "steps that are done are not done again"
    assert result.step == 26 and position_of(tmp_path)["epoch"] == 1
    assert_same_end(tmp_path, straight[0].run_dir)
    n = tiny().total_batch_size * tiny().seq_len
    ends = [train.token_stream(tokenizer, corpus.train, n, position_of(d)) for d in (tmp_path, straight[0].run_dir)]
    for (tokens, _), (same, _) in itertools.islice(zip(*ends, strict=True), 30):
        np.testing.assert_array_equal(tokens, same, err_msg="the two would not go on with the same data")
    assert result[1:6] == straight[0][1:6], "step, scores and samples are those of the straight run"


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(straight, corpus, tokenizer, tmp_path, monkeypatch):
    """An error behind step 22 leaves the checkpoint of step 16; rows behind it are made again, once and the same."""
    config = tiny(save_every=13)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        interrupt_at(patch, 22, raise_now=ConnectionError("the runtime is gone"))
        train.train(config, corpus, tokenizer, tmp_path)
    assert newest_checkpoint(tmp_path).name == "step_00000016" and loader_threads() == []
    logged = []
    train.train(config, corpus, tokenizer, tmp_path, on_log=logged.append)
    assert [row["step"] for row in logged[:2]] == [16, 17] and "val_bpb" in logged[0]
    assert_same_end(tmp_path, straight[0].run_dir)


@pytest.mark.parametrize("row", [4, 12])
def test_a_listener_that_interrupts_loses_no_row(straight, corpus, tokenizer, tmp_path, row):
    """KeyboardInterrupt raised by on_log, as a notebook's own code may, keeps every row; resumed, the run is the same.

    Rows are written ten at a time: those behind the one whose listener raised must not be dropped.
    """

    def listen(logged):
        if logged["step"] == row:
            raise KeyboardInterrupt

    cut = train.train(tiny(), corpus, tokenizer, tmp_path, on_log=listen)
    assert row <= cut.step < 26
    assert [r["step"] for r in read_rows(tmp_path) if "loss" in r] == list(range(1, cut.step + 1))
    train.train(tiny(), corpus, tokenizer, tmp_path)
    assert_same_end(tmp_path, straight[0].run_dir)


def interrupted(call):
    """Makes the call; True if it ended as an interrupted one may: with a KeyboardInterrupt or a Result."""
    try:
        return isinstance(call(), train.Result)
    except KeyboardInterrupt:
        return True


def test_an_interrupt_in_the_middle_of_a_step_leaves_a_run_that_goes_on(
    straight, corpus, tokenizer, tmp_path, monkeypatch
):
    """A second Ctrl-C can strike when the old state is donated and the new one not yet kept: nothing of it is saved."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 19, raise_now=KeyboardInterrupt())
        assert interrupted(lambda: train.train(tiny(), corpus, tokenizer, tmp_path))
    assert newest_checkpoint(tmp_path).name == "step_00000018"
    train.train(tiny(), corpus, tokenizer, tmp_path)
    assert_same_end(tmp_path, straight[0].run_dir)


def test_an_interrupt_before_the_first_step_leaves_nothing_behind(corpus, tokenizer, tmp_path, monkeypatch):
    """Two Ctrl-C while the first batch is still being made: no checkpoint of a run that has not begun, no thread."""

    def raise_interrupt(loader):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.PrefetchDataLoader, "__next__", raise_interrupt)
    assert interrupted(lambda: train.train(tiny(), corpus, tokenizer, tmp_path))
    assert loader_threads() == [] and newest_checkpoint(tmp_path) is None


def test_a_second_interrupt_breaks_off_at_once(corpus, tokenizer, tmp_path, monkeypatch):
    """Two Ctrl-C in an evaluation end it there, with the step's checkpoint kept and loader and profile closed."""
    seen = []

    def evaluate(*args):
        seen.append("began")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        seen.append("went on")

    quick_step(monkeypatch)
    monkeypatch.setattr(train, "make_evaluator", lambda *args: evaluate)
    config = tiny(num_iterations=8, eval_every=4, save_every=4)
    assert interrupted(lambda: train.train(config, corpus, tokenizer, tmp_path))
    assert seen == ["began"] and newest_checkpoint(tmp_path).name == "step_00000004"
    assert loader_threads() == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    jax.profiler.start_trace(tmp_path / "trace")  # raises if the last one were still on
    jax.profiler.stop_trace()


def test_a_finished_run_does_no_step_and_is_scored_again(straight, corpus, tokenizer, tmp_path, monkeypatch):
    """Running a finished run again trains nothing, gives the same scores and samples, and leaves its files alone."""
    first, _ = straight
    kept = lambda: {path: path.read_bytes() for path in [*first.run_dir.glob("*.jsonl"), *first.run_dir.glob("c*/*/*")]}
    before = kept()
    logged, plotted = [], []
    monkeypatch.setattr(common, "plot_losses", lambda rows, *args: plotted.append([dict(row) for row in rows]))
    again = train.train(tiny(), corpus, tokenizer, first.run_dir, prompts=PROMPTS, on_log=logged.append)
    assert [row["step"] for row in logged] == [26] and "val_bpb" in logged[0]
    assert again[1:6] == first[1:6]
    assert kept() == before and len(before) > 20
    assert without_times(plotted[-1]) == read_rows(first.run_dir), "the curve lost what was before"


def test_the_curve_of_a_resumed_run_shows_all_of_it(corpus, tokenizer, tmp_path, monkeypatch):
    """loss.png is drawn from every row since the first step, not from this process's own."""
    config = tiny(num_iterations=6, eval_every=0, save_every=0)
    quick_step(monkeypatch)
    quick_score(monkeypatch)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        train.train(config, corpus, tokenizer, tmp_path)
    plotted = []
    monkeypatch.setattr(common, "plot_losses", lambda rows, *args: plotted.append([row["step"] for row in rows]))
    train.train(config, corpus, tokenizer, tmp_path)
    assert plotted == [[1, 2, 3, 4, 5, 6, 6]]


# ---------------------------------------------------------------------------------------------------------------
# What goes wrong


def quick_step(monkeypatch, metrics_of=lambda step: {}):
    """Replaces the jitted step by one that only counts, with `metrics_of(step)` in its metrics: no compilation."""

    def make(*args):
        def step(state, constants, x, y):
            done = int(state["step"]) + 1
            metrics = {"loss": 1.0 / done, "grad_norm": 1.0, "lr": 0.1, **metrics_of(done)}
            return {**state, "step": np.int32(done)}, metrics

        return step

    monkeypatch.setattr(train, "make_train_step", make)


def quick_score(monkeypatch, evaluate=lambda trainable, constants: (1.0, 2.0)):
    monkeypatch.setattr(train, "make_evaluator", lambda *args: evaluate)
    monkeypatch.setattr(common, "plot_losses", lambda *args: None)
    monkeypatch.setattr(common, "ProfileWindow", lambda *args: NoProfile())


class NoProfile:
    before = staticmethod(lambda step: common.contextlib.nullcontext())
    after = staticmethod(lambda step, result: None)
    close = staticmethod(lambda: None)


def test_a_step_is_saved_before_it_is_evaluated(corpus, tokenizer, tmp_path, monkeypatch):
    """An evaluation that runs out of memory finds its step saved, whether a save was due there or not."""
    quick_step(monkeypatch)
    due, not_due, end = tiny(num_iterations=12, save_every=8), tiny(num_iterations=12), tiny(num_iterations=5)
    for run, config, kept in (("due", due, 8), ("not due", not_due, 8), ("end", end, 5)):
        quick_score(monkeypatch, lambda *args: (_ for _ in ()).throw(MemoryError("RESOURCE_EXHAUSTED")))
        with pytest.raises(MemoryError):
            train.train(config, corpus, tokenizer, tmp_path / run)
        assert newest_checkpoint(tmp_path / run).name == f"step_{kept:08d}"


def test_an_evaluation_that_failed_is_made_up_for(corpus, tokenizer, tmp_path, monkeypatch):
    """A run that died between checkpoint and evaluation of step 8 has the evaluation of step 8 after it resumed."""
    quick_step(monkeypatch)
    quick_score(monkeypatch, lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        train.train(tiny(num_iterations=12, save_every=8), corpus, tokenizer, tmp_path)
    quick_score(monkeypatch)
    train.train(tiny(num_iterations=12, save_every=8), corpus, tokenizer, tmp_path)
    assert [row["step"] for row in read_rows(tmp_path) if "val_bpb" in row] == [8, 12]


def test_a_step_is_saved_before_it_is_sampled(corpus, tokenizer, tmp_path, monkeypatch):
    """Sampling that fails finds its step's checkpoint written, though no save was due there."""
    quick_step(monkeypatch)
    quick_score(monkeypatch)
    monkeypatch.setattr(train, "generate", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError))
    config = tiny(num_iterations=8, sample_every=4, save_every=0, eval_every=0)
    with pytest.raises(MemoryError):
        train.train(config, corpus, tokenizer, tmp_path, prompts=PROMPTS)
    assert newest_checkpoint(tmp_path).name == "step_00000004"


def test_samples_are_shown_where_they_are_due(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    """Every sample_every steps each prompt's continuation is printed, and those at the end are returned."""
    quick_step(monkeypatch)
    quick_score(monkeypatch)
    seen = []
    monkeypatch.setattr(train, "generate", lambda *args, **kwargs: seen.append(kwargs["seed"]) or [40, 41])
    config = tiny(num_iterations=9, sample_every=4, save_every=0, eval_every=0)
    result = train.train(config, corpus, tokenizer, tmp_path, prompts=PROMPTS)
    assert seen == [0, 1, 2] * 3 and len(result.samples) == 3
    shown = capsys.readouterr().out
    assert all(shown.count(f"step {step}: {prompt!r}") == 1 for step in (4, 8) for prompt in PROMPTS)


def test_a_prompt_too_long_for_the_context_does_not_cost_the_run(corpus, tokenizer, tmp_path, monkeypatch):
    """A prompt that leaves no room is refused before the first step, or shortened, never an error after the last."""
    quick_step(monkeypatch)
    quick_score(monkeypatch)
    try:
        result = train.train(tiny(num_iterations=2), corpus, tokenizer, tmp_path / "run", prompts=["water " * 30])
    except UserError:
        assert not (tmp_path / "run").exists()
    else:
        assert len(result.samples) == 1


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(corpus, tokenizer, tmp_path, monkeypatch, name, value):
    """One line with the step; the good checkpoint before stays newest and no bad state is saved or logged.

    A finite loss with a gradient that is not leaves parameters of NaN behind: step 8's would be saved as good.
    """
    quick_step(monkeypatch, lambda step: {name: value} if step >= 8 else {})
    quick_score(monkeypatch)
    with pytest.raises(UserError, match=r"\b8\b") as caught:
        train.train(tiny(save_every=4), corpus, tokenizer, tmp_path)
    assert "\n" not in str(caught.value) and "learning_rate" in str(caught.value)
    assert newest_checkpoint(tmp_path).name == "step_00000004"
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, 8))
    assert loader_threads() == []


@pytest.mark.parametrize("learning_rate, weight_decay, kept", [(1e30, 0.0, 1), (1e38, 1e3, 0)])
def test_a_learning_rate_far_too_high_is_told(corpus, tokenizer, tmp_path, learning_rate, weight_decay, kept):
    """The real step driven beyond float32 stops with the remedy, and what was saved before is finite.

    In the second case step 1 has a finite loss and gradient, and leaves infinite parameters: not to be kept.
    """
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_ratio": 0.0, "grad_clip": 0.0}
    with pytest.raises(UserError, match="learning_rate"):
        train.train(tiny(**rates, save_every=1, eval_every=0), corpus, tokenizer, tmp_path)
    checkpoint = newest_checkpoint(tmp_path)
    assert (checkpoint and checkpoint.name) == (f"step_{kept:08d}" if kept else None)
    for name, array in (load_file(checkpoint / "params.safetensors") if kept else {}).items():
        assert np.isfinite(array).all(), f"{checkpoint.name}: {name}"


def test_bad_input_is_refused_before_anything_is_written(corpus, tokenizer, tmp_path):
    """Vocabulary, eval_tokens and batch sizes that do not fit leave no folder behind, and name the field."""
    wrong = {
        "vocab_size": tiny(vocab_size=301),
        "eval_tokens": tiny(eval_tokens=10**6),
        "total_batch_size": None,
    }
    for field, config in wrong.items():
        mesh = None
        if config is None:  # three devices do not divide a batch of four
            config, mesh = tiny(total_batch_size=4), type("Mesh", (), {"size": 3})()
        with pytest.raises(UserError, match=f"^{field}=") as caught:
            train.train(config, corpus, tokenizer, tmp_path / "run", mesh=mesh)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_too_few_tokens_for_a_batch_is_told_by_the_loop(corpus, tokenizer, tmp_path):
    """The loader's UserError arrives in train() as it is: one line, no checkpoint, no thread left."""
    config = tiny(total_batch_size=600)
    with pytest.raises(UserError, match="too few"):
        train.train(config, corpus, tokenizer, tmp_path)
    assert newest_checkpoint(tmp_path) is None and loader_threads() == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # what safetensors 0.8 really raises, seen on a full tmpfs: no OSError, no errno
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(corpus, tokenizer, tmp_path, monkeypatch, error):
    """A save that finds the disk full is a UserError; no half folder is left and the checkpoint before is whole."""
    quick_step(monkeypatch)
    quick_score(monkeypatch)
    real, saved = safetensors.numpy.save_file, []

    def save_file(arrays, path, *args, **kwargs):
        saved.append(path)
        if len(saved) > 5:  # four arrays' files a checkpoint: the second checkpoint's second
            Path(path).write_bytes(b"half")
            raise error
        return real(arrays, path, *args, **kwargs)

    monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
    with pytest.raises(UserError, match="disk is full") as caught:
        train.train(tiny(save_every=4), corpus, tokenizer, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    state, stream, _ = train.load_checkpoint(tmp_path / "checkpoints" / "step_00000004", tiny(), train.make_mesh())
    assert int(state["step"]) == 4 and loader_threads() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's always-full device")
def test_a_full_disk_while_logging_is_one_line(corpus, tokenizer, tmp_path, monkeypatch):
    """metrics.jsonl that cannot grow any more is told like a checkpoint that cannot be written."""
    quick_step(monkeypatch)
    quick_score(monkeypatch)
    monkeypatch.setattr(common, "open", lambda path, *args, **kwargs: open("/dev/full", "w"), raising=False)
    with pytest.raises(UserError, match="disk is full"):
        train.train(tiny(), corpus, tokenizer, tmp_path)
    assert loader_threads() == []


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_brings_everything_back_bit_for_bit(tmp_path):
    """Parameters, moments, step, stream position, left-over tokens and notes survive, odd values included."""
    config, mesh = tiny(), train.make_mesh()
    state, _ = train.init_state(config, mesh)
    odd = np.array([-0.0, 1e-45, 3.4e38, np.nan, np.inf, 1 / 3], np.float32)
    fill = lambda a: jnp.asarray(np.resize(odd, a.shape)) if a.ndim else a + 7
    state = jax.tree.map(fill, state)
    stream = {"epoch": 3, "shard": 1, "row_group": 4, "document": 1, "tokens": np.array([5, 9, 299], np.int32)}
    notes = {"best_val_bpb": 2.125}
    path = train.save_checkpoint(tmp_path, config, state, stream, notes)
    assert path == newest_checkpoint(tmp_path) and path.name == "step_00000007"
    assert not list(path.rglob("*.p*kl*")) and {file.suffix for file in path.iterdir()} == {
        ".safetensors",
        ".json",
        ".jsonl",
    }
    back, back_stream, back_notes = train.load_checkpoint(path, config, mesh)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert b.sharding.is_equivalent_to(
            jax.NamedSharding(mesh, jax.P()) if hasattr(jax, "P") else b.sharding, b.ndim
        )
    assert back_stream.pop("tokens").tolist() == [5, 9, 299] and stream.pop("tokens").any()
    assert back_stream == stream and back_notes == notes


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    """Loading into another shape names the array and both shapes; into more layers, the array that is missing."""
    mesh = train.make_mesh()
    state, _ = train.init_state(tiny(), mesh)
    stream = {"epoch": 0, "shard": 0, "row_group": 0, "document": 0, "tokens": np.zeros(0, np.int32)}
    path = train.save_checkpoint(tmp_path, tiny(), state, stream, {})
    for other, said in ((tiny(n_kv_head=2), "c_k"), (tiny(aspect_ratio=4), r"layers\.2.*missing")):
        with pytest.raises(UserError, match=said) as caught:
            train.load_checkpoint(path, other, mesh)
        assert "\n" not in str(caught.value)


def test_the_newest_checkpoint_is_the_furthest_and_never_half_a_one(tmp_path):
    """By step number and not by date; what was left half-written is not looked at."""
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 2):
        write_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", {"a": b"a"})
    (tmp_path / "checkpoints" / ".step_00000011.part").mkdir()
    assert newest_checkpoint(tmp_path).name == "step_00000010"


# ---------------------------------------------------------------------------------------------------------------
# The progress bar


def test_the_bar_shows_speed_without_the_pauses(tmp_path, monkeypatch, request):
    """tok/s and MFU are of the steps fetched since the last look; what a pause took does not count."""
    now = [100.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    (tmp_path / "metrics.jsonl").write_text("")
    log = RunLog(tmp_path / "metrics.jsonl", 60, 0, tokens_per_step=1000, peak_rate=5000.0)
    request.addfinalizer(log.close)
    shown = []

    def advance(first, count, seconds):
        for step in range(first, first + count):
            now[0] += seconds
            log.add(step, {"loss": 2.0, "lr": 0.125, "grad_norm": 1.0})
        shown.append(dict(part.split("=") for part in (log._bar.postfix or "").split(", ")))

    advance(1, 11, 7.0)  # compilation is in these: not shown
    assert "tok/s" not in shown[-1] and shown[-1] == {"loss": "2.000", "lr": "1.2e-01"}
    advance(12, 10, 0.5)
    assert shown[-1]["tok/s"] == "2,000" and shown[-1]["MFU"] == "40.0%"
    now[0] += 0.5
    with log.pause():
        now[0] += 1000.0
        log.show(val="3 bpb")
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(1, 22))
    advance(22, 11, 0.25)
    assert shown[-1]["tok/s"] == f"{10 * 1000 / (11 * 0.25):,.0f}" and shown[-1]["val"] == "3 bpb"
    assert log._bar.n == 31 and log._bar.total == 60


def test_mfu_is_shown_where_the_devices_peak_is_known():
    """The peak of all devices over the model's FLOPs per token; None on a device that is not in the table."""
    mesh = lambda kind: SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * 4), size=4)
    expected = 4 * 918e12 / train.flops_per_token(tiny())
    assert train.peak_rate(tiny(), mesh("TPU v6 lite")) == pytest.approx(expected)
    assert train.peak_rate(tiny(), mesh("cpu")) is None


# ---------------------------------------------------------------------------------------------------------------
# No host synchronisation but for logging


class Watched:
    """A scalar on the device that notes, with the steps dispatched by then, when the host asks for its value."""

    dispatched, reads = 0, []

    def __init__(self, step, value):
        self.step, self.value = step, value

    def read(self, *args, **kwargs):
        Watched.reads.append((self.step, Watched.dispatched))
        return np.asarray(self.value)

    __array__ = read
    __float__ = lambda self: float(self.read())
    __int__ = __index__ = lambda self: int(self.read())
    __bool__ = lambda self: bool(self.read())
    block_until_ready = item = read


def test_the_host_waits_for_no_step_but_to_log(corpus, tokenizer, tmp_path, monkeypatch):
    """45 steps: values are fetched in groups of ten or more, and only once the step after them is dispatched.

    Saving, evaluating and the end of the run may wait; nothing else may, not even for the step counter.
    """
    Watched.dispatched, Watched.reads = 0, []

    def make(*args):
        def step(state, constants, x, y):
            Watched.dispatched += 1
            done = Watched.dispatched
            return {**state, "step": Watched(done, done)}, {
                name: Watched(done, 1.0) for name in ("loss", "grad_norm", "lr")
            }

        return step

    quick_score(monkeypatch)
    monkeypatch.setattr(train, "make_train_step", make)
    config = tiny(num_iterations=45, eval_every=0, save_every=0)
    train.train(config, corpus, tokenizer, tmp_path)
    during = [(step, dispatched) for step, dispatched in Watched.reads if dispatched < 45]
    assert {step for step, _ in during} == set(range(1, max(step for step, _ in during) + 1))
    assert all(step < dispatched for step, dispatched in during), "waited for the step just dispatched"
    moments = {dispatched for _, dispatched in during}
    assert 1 <= len(moments) <= 4 and {step for step, _ in Watched.reads} == set(range(1, 46))


# ---------------------------------------------------------------------------------------------------------------
# Profile


def trace_files(run_dir):
    return glob.glob(f"{run_dir}/profile/**/*.xplane.pb", recursive=True)


def traced_steps(path):
    """step_num of every step annotation in a trace."""
    data, found = jax.profiler.ProfileData.from_file(path), []
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found += [value for name, value in event.stats if name == "step_num"]
    return sorted({int(number) for number in found})


def test_every_component_is_named_in_the_profile(command_line_run):
    """The plugin's own converter opens the trace, and every scope of the model stands in the HLO it holds.

    Of a process of its own: on jax 0.7.2 a trace also holds programs that earlier tests left behind.
    """
    from xprof.convert import raw_to_tool_data

    [path] = trace_files(command_line_run[0])
    assert os.path.getsize(path) > 10_000
    for tool in ("overview_page", "trace_viewer"):
        content, kind = raw_to_tool_data.xspace_to_tool_data([path], tool, {})
        assert content and len(content) > 200, tool
        json.loads(content)
    raw = Path(path).read_bytes()
    scopes = ["embedding", "lm_head", "loss", "optimizer"]
    scopes += [f"layer_{i}/{part}" for i in range(2) for part in ("attention", "mlp")]
    names = set(re.findall(rb"jit\(train_step\)[\w/().>-]+", raw))
    for scope in scopes:
        pattern = rb"[/(]" + scope.encode() + rb"[/)]"
        assert any(re.search(pattern, name) for name in names), f"no operation in scope {scope}"
    assert not any(b"layer_2" in name for name in names)


def test_the_profile_is_steps_15_to_20(straight):
    """26 steps are traced from 15 to 19, counted from 0, with one annotation each."""
    [path] = trace_files(straight[0].run_dir)
    assert traced_steps(path) == [15, 16, 17, 18, 19]


@pytest.mark.parametrize(
    "steps, traced",
    [(1, [0]), (3, [0, 1, 2]), (5, range(5)), (12, range(7, 12)), (20, range(15, 20)), (30, range(15, 20))],
)
def test_the_profile_adapts_to_short_runs(tmp_path, steps, traced):
    """A run too short for steps 15 to 20 traces its last five, or all it has; something ran in each."""
    window = ProfileWindow(tmp_path / "profile", steps)
    double = jax.jit(lambda x: 2 * x)
    x = double(jnp.ones(()))
    for step in range(steps):
        with window.before(step):
            x = double(x)
        window.after(step, x)
    window.close()
    [path] = trace_files(tmp_path)
    assert traced_steps(path) == list(traced)


def test_no_steps_leave_no_profile(tmp_path):
    """A finished run started again opens no trace and closes without one."""
    window = ProfileWindow(tmp_path / "profile", 0)
    window.close()
    assert trace_files(tmp_path) == []


def test_the_profile_waits_for_its_last_step(tmp_path, monkeypatch):
    """A trace stopped before the device is done lacks its last steps: the result is waited for, then it stops."""
    order = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: order.append(("wait", x)))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: order.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: order.append("stop"))
    window = ProfileWindow(tmp_path, 7)
    for step in range(7):
        with window.before(step):
            order.append(step)
        window.after(step, f"result {step}")
    assert order == [0, 1, "start", 2, 3, 4, 5, 6, ("wait", "result 6"), "stop"]
    window.close()
    assert order[-1] == "stop" and order.count("stop") == 1


# ---------------------------------------------------------------------------------------------------------------
# Command line

SMALL = (
    "--n_head 2 --head_dim 16 --aspect_ratio 16 --seq_len 64 --vocab_size 512 --device_batch_size 2 "
    "--total_batch_size 4 --num_iterations 300 --eval_every 100 --eval_tokens 2048 --save_every 120"
).split()


def start(*words, cwd=ROOT):
    """Starts `python 02_train.py words`, offline."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(ROOT / "02_train.py"), *words], cwd=cwd, **pipes)


def finish(process):
    """(exit status, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def without_bars(err):
    """stderr without tqdm's lines."""
    lines = re.split(r"[\r\n]", err)
    bar = re.compile(r"\d+%\|.*\|.*(step|it|B)")
    return [line for line in lines if line.strip() and not bar.search(line)]


@pytest.fixture(scope="module")
def command_line_run(tmp_path_factory):
    """(run folder, stdout, stderr) of a small offline run from an empty home, straight through."""
    folder = tmp_path_factory.mktemp("cli")
    code, out, err = finish(start(*SMALL, "--data", "offline", "--out", str(folder / "runs"), cwd=folder))
    assert code == 0, err
    [run_dir] = (folder / "runs").iterdir()
    return run_dir, out, err


def test_the_command_says_what_it_decided_and_what_came_out(command_line_run):
    """Device, preset, data and why, the parameter table, held-out bits per byte beside gzip's, and samples; no more."""
    run_dir, out, _ = command_line_run
    lines = out.splitlines()
    assert len(lines) <= 30 and len(set(lines)) == len(lines), "a screen, and no line twice"
    platform = jax.devices()[0].platform
    for said in (
        f"device: {len(jax.devices())} x",
        "preset: laptop",
        f"the device is a {platform}",
        "data: offline, as set",
    ):
        assert said in out
    for group in ("embed", "attention", "mlp", "lm_head", "scalars", "total", "FLOPs per token"):
        assert group in out
    assert run_dir.name in out and "standard library" in out and "tokenizer: 512" in out
    assert "bits per byte" in out and "gzip" in out
    last = [row for row in read_rows(run_dir) if "val_bpb" in row][-1]
    assert last["step"] == 300 and f"{last['val_bpb']:.3f} bits per byte" in out
    said = json.loads((run_dir / "config.json").read_text())
    assert f"{said['gzip_bits_per_byte']:.3f}" in out
    assert all(f"sample: {prompt!r}" in out for prompt in train.PROMPTS["stdlib"])


def test_the_command_keeps_stderr_for_the_progress_bar(command_line_run):
    """No word of libtpu, no warning: only tqdm's bar, which ends at the last step and shows loss, lr and tok/s.

    A pipe or log file keeps every bar: there are two, the first and the last, in a run of less than a minute.
    """
    _, _, err = command_line_run
    assert err.count("step/s") == 2
    assert without_bars(err) == []
    assert "300/300" in err and all(name in err for name in ("loss=", "lr=", "tok/s="))


def test_the_command_leaves_the_promised_files(command_line_run):
    """One folder per run with what README lists and model/, which is what goes to the Hub; nothing half-written."""
    run_dir, _, _ = command_line_run
    left = {re.sub(r"(tfevents)\.\d+$", r"\1", path.name) for path in run_dir.iterdir()}
    assert left == {
        "events.out.tfevents",
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "profile",
        "checkpoints",
        "model",
    }
    model = {path.name: path.read_bytes() for path in (run_dir / "model").iterdir()}
    described = {"README.md", "config.json", "loss.png", "tokenizer.json", "tokenizer_config.json"}
    assert set(model) == described | {"params.safetensors"}
    assert model["params.safetensors"] == (newest_checkpoint(run_dir) / "params.safetensors").read_bytes()
    assert not [path for path in run_dir.rglob("*") if path.name.endswith(".part") or path.name.startswith(".")]
    assert trace_files(run_dir) and len(read_rows(run_dir)) == 300 + 3


def test_the_folder_for_the_hub_loads_again(command_line_run, tmp_path):
    """Without a Hub: the model read back from run_dir/model writes what the run's own wrote, by the same seeds."""
    run_dir, out, _ = command_line_run
    config, params, tokenizer = train.load_model(run_dir / "model")
    write = train.make_sample_writer(config, tokenizer, train.PROMPTS["stdlib"])
    assert all(f"sample: {prompt!r} -> {text!r}" in out for prompt, text in write(params))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer.json"):
        train.load_model(tmp_path)


def test_the_command_interrupted_goes_on_when_it_is_given_again(command_line_run, tmp_path):
    """Ctrl-C in a terminal ends it with status 0 and a line; the same command again ends as if nothing had been."""
    words = (*SMALL, "--data", "offline", "--out", str(tmp_path / "runs"))
    process = start(*words)
    has_begun = lambda: [path for path in tmp_path.glob("runs/*/metrics.jsonl") if path.read_text().count("\n") > 15]
    wait_until(lambda: has_begun() or process.poll() is not None, 120)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0, err
    step = int(re.search(r"trained: (\d+) of 300 steps", out)[1])
    [run_dir] = (tmp_path / "runs").iterdir()
    assert 15 <= step < 300 and newest_checkpoint(run_dir).name == f"step_{step:08d}"
    code, out, err = finish(start(*words))
    assert code == 0 and "resuming" in out and f"step {step} " in out, err
    assert_same_end(run_dir, command_line_run[0])


def test_help_lists_every_setting():
    """--help names each field of Run and Config with what it means and its default, and runs nothing."""
    code, out, err = finish(start("--help"))
    assert code == 0 and err == ""
    shown = " ".join(out.split())
    for cls in (Run, train.Config):
        for field in dataclasses.fields(cls):
            assert f"--{field.name}" in shown
            meaning = " ".join(f"{field.metadata['help']} (default: {field.default!r})".split())
            assert field.metadata["help"] and meaning in shown, field.name


@pytest.mark.parametrize(
    "words, said",
    [(["--n_heads", "4"], ["--n_heads", "did you mean --n_head?"]), (["--seq_len", "x"], ["--seq_len", "int", "'x'"])],
)
def test_a_wrong_command_is_one_line(tmp_path, words, said):
    """A wrong name or type: a status that is not 0, one line on stderr, no traceback, nothing written."""
    code, out, err = finish(start(*words, cwd=tmp_path))
    assert code != 0 and err.count("\n") == 1 and "Traceback" not in err
    assert all(part in err for part in said)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------
# What is chosen


@pytest.fixture
def choose(monkeypatch, capsys):
    """choose() as on a command line without words; returns (run, config, what it said)."""
    monkeypatch.setattr(sys, "argv", ["02_train.py"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def call(overrides="", platform="cpu"):
        device = type("Device", (), {"platform": platform, "device_kind": f"some {platform}"})()
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        run, config = choose(train.Config, train.PRESETS, overrides)
        return run, config, capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    "platform, preset, data", [("tpu", "chip", "fineweb"), ("gpu", "gpu", "fineweb"), ("cpu", "laptop", "offline")]
)
def test_the_device_chooses_the_preset_and_the_preset_the_data(choose, platform, preset, data):
    """A TPU gets Config() itself and FineWeb-Edu, a CPU a laptop's run on the offline corpus; what and why is said."""
    run, config, said = choose(platform=platform)
    assert (run.preset, run.data) == (preset, data)
    assert preset in said and data in said and f"the device is a {platform}" in said and f"some {platform}" in said
    assert platform != "tpu" or config == train.Config()
    if platform != "cpu":  # 50M tokens a shard, and no fewer shards than the run has tokens for
        tokens = config.num_iterations * config.total_batch_size * config.seq_len
        assert run.num_shards * 50e6 >= tokens > (run.num_shards - 1) * 50e6


@pytest.mark.parametrize(
    "words, field",
    [("--preset desktop", "preset='desktop'"), ("--seq_len 0", "seq_len=0"), ("--attn_impl x", "attn_impl")],
)
def test_a_value_that_cannot_be_is_refused_in_one_line(choose, words, field):
    """A preset or a config that cannot be is told with its field before anything is said or done."""
    with pytest.raises(UserError, match=field) as caught:
        choose(words)
    assert "\n" not in str(caught.value)


def test_what_the_user_sets_goes_over_the_preset(choose):
    """Preset, data and any field can be overridden one by one, the rest of the preset stays."""
    run, config, said = choose("--preset laptop --data fineweb --n_head 2 --num_shards 7", platform="tpu")
    assert (run.preset, run.data, run.num_shards) == ("laptop", "fineweb", 7)
    assert config == train.Config(**{**train.PRESETS["laptop"], "n_head": 2})


def test_a_preset_that_the_user_set_is_told_as_such(choose):
    """The line that says why names the user and not the device."""
    _, _, said = choose("--preset laptop", platform="tpu")
    assert "laptop, as set" in said and "the device is" not in said


def test_a_run_is_named_after_its_settings(choose):
    """The same settings find the same folder, so a second start resumes; any other gets another; a name is a name."""
    name = lambda words: choose(words)[0].name
    assert name("") == name("--n_head 4") == name("--out elsewhere"), "4 heads are the laptop preset's"
    names = [name(words) for words in ("", "--n_head 2", "--data fineweb", "--learning_rate 0.002", "--param_seed 1")]
    assert len(set(names)) == 5 and all(re.fullmatch(r"[\w-]+", text) for text in names)
    assert name("--name mine --n_head 2") == "mine"
