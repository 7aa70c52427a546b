"""What 02 learns from and is scored on: the stream of tokens, its batches, the held-out rows and their score."""

import functools
import hashlib
import importlib
import itertools
import json
import math
import re
import shutil
import zlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configs import random_params
from corpus import ROWS, VOCAB, assert_same_end, is_one_line, pack, texts_of, tiny, train_tiny

from onechip.errors import UserError

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
pytestmark = pytest.mark.usefixtures("compiled_once")

BATCH = 144  # tokens

# ----------------------------------------------------------------------------------------------------------------------
# Positions of somebody else's

ARRAY = np.arange(5, dtype=np.int32)
PLACE = {"epoch": 1, "shard": 1, "row_group": 0, "document": 3, "tokens": ARRAY}
PACKED = {**PLACE, "lengths": np.array([2, 3], np.int32), "packed": 7, "dropped": 0, "log": {"dropped_tokens": 0.5}}
WRONG = [
    *[{"epoch": value} for value in (None, "1", 1.0, True, -1, [1], {"a": 1})],
    *[{name: value} for name in ("shard", "row_group", "document", "step") for value in ("x", -1, None)],
    *[{"tokens": value} for value in (None, [1, 2], "abc", ARRAY.astype(np.float32), ARRAY.reshape(1, 5), ARRAY - 1)],
    {"tokens": ARRAY + VOCAB},
    {"log": [1]},
    {"log": {"dropped_tokens": "0.5"}},
]
WRONG_PACKED = [
    *[{"lengths": value} for value in (None, [2, 3], np.array([2, 2]), np.array([6, -1]), np.array([[2, 3]]))],
    *[{name: value} for name in ("packed", "dropped") for value in (None, "7", -1, 1.5)],
]


def wrong_positions():
    """(packing, what is changed, position) of what a crafted or damaged checkpoint may hold."""
    stream = [("stream", *change, PLACE | change) for change in WRONG]
    return stream + [("best-fit", *change, PACKED | change) for change in WRONG + WRONG_PACKED]


@pytest.mark.parametrize("packing, wrong, position", wrong_positions())
def test_what_cannot_be_a_position_is_refused_in_a_line(corpus, tokenizer, packing, wrong, position):
    """At once, with the field; not by a traceback from the loader's thread, nor by reading somewhere else."""
    config = tiny(packing=packing, seq_len=9)
    with pytest.raises(UserError, match="^position, ") as raised:
        train.pretraining_batches(config, corpus, tokenizer, position)
    named = str(raised.value).partition("=")[0].removeprefix("position, ")
    assert is_one_line(raised.value) and named == wrong


@pytest.mark.parametrize("packing, position", [("stream", None), ("stream", PLACE), ("best-fit", PACKED)])
def test_what_can_be_one_is_read_from(corpus, tokenizer, packing, position):
    """A shard beyond the last, as after an epoch's end, begins the next epoch; large numbers are no error."""
    config = tiny(packing=packing, seq_len=9)
    for change in ({}, {"shard": 3}, {"document": 10**30}) if position else ({},):
        batches = train.pretraining_batches(config, corpus, tokenizer, position and position | change)
        batch, _ = next(batches)
        assert batch["x"].shape == (6, 9)
        batches.close()


def test_a_checkpoint_with_a_crafted_position_ends_in_a_line(corpus, tokenizer, straight, tmp_path):
    """Its hashes are right. The line says what to do, and then the run resumes from an older one to the same end."""
    shutil.copytree(straight[0].run_dir, tmp_path / "run")
    newest_one = tmp_path / "run" / "checkpoints" / "step_00000024"
    for step in (25, 26):
        shutil.rmtree(newest_one.with_name(f"step_{step:08d}"), ignore_errors=True)
    state = json.loads((newest_one / "state.json").read_text())
    raw = json.dumps(state | {"stream": state["stream"] | {"row_group": "1; import os"}}).encode()
    (newest_one / "state.json").write_bytes(raw)
    manifest = json.loads((newest_one / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (newest_one / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="^position, row_group='1; import os': of the newest checkpoint") as raised:
        train_tiny(corpus, tokenizer, tmp_path / "run")
    assert is_one_line(raised.value)
    shutil.move(newest_one, tmp_path)
    again = train_tiny(corpus, tokenizer, tmp_path / "run")
    assert again.step == 26
    assert_same_end(tmp_path / "run", straight[0].run_dir)


# ----------------------------------------------------------------------------------------------------------------------
# The stream


@pytest.mark.parametrize("docs_per_call", [1, 5, 32, 1000])
def test_the_stream_is_every_document_once_per_epoch_in_order(corpus, tokenizer, docs_per_call):
    """Batch i is tokens i*n to i*n+n inclusive of the packed text, across shards, row groups and the epoch's end."""
    packed = pack(tokenizer, corpus.train, epochs=3)
    stream = tok.token_stream(tokenizer, corpus.train, BATCH, docs_per_call=docs_per_call)
    count = (len(packed) - 1) // BATCH
    assert count > 40 and len(packed) // 3 % BATCH, "the epoch's end should fall inside a batch"
    for i in range(count):
        tokens, position = next(stream)
        assert tokens.dtype == np.int32 and tokens.shape == (BATCH + 1,)
        np.testing.assert_array_equal(tokens, packed[i * BATCH : (i + 1) * BATCH + 1], err_msg=f"batch {i}")
        assert position["tokens"].dtype == np.int32 and position["tokens"][0] == tokens[-1]


def test_a_document_that_spells_a_special_token_does_not_end(corpus, tokenizer):
    """ "<|bos|>" in a document is text: the only bos ids in the stream are those that open documents."""
    assert any("<|bos|>" in text for text in texts_of(corpus.train))
    stream = tok.token_stream(tokenizer, corpus.train, len(pack(tokenizer, corpus.train)) - 1)
    tokens, _ = next(stream)
    assert (tokens == tokenizer.token_to_id("<|bos|>")).sum() == len(texts_of(corpus.train))


@pytest.mark.parametrize("docs_per_call", [3, 32])
def test_the_stream_resumes_exactly_from_the_position_of_every_batch(corpus, tokenizer, docs_per_call):
    """From the position after any batch of two epochs, JSON in between, a new stream gives the very same batches.

    Its own positions may cut the stream elsewhere: documents are read in groups, counted from where it began.
    """
    make = functools.partial(tok.token_stream, tokenizer, corpus.train, BATCH, docs_per_call=docs_per_call)
    straight = list(itertools.islice(make(), 2 * len(pack(tokenizer, corpus.train)) // BATCH))
    places = set()
    for i, (_, position) in enumerate(straight[:-1]):
        place = json.loads(json.dumps({k: v for k, v in position.items() if k != "tokens"}))
        places.add(tuple(place.values()))
        left = position["tokens"].tolist()
        resumed = make(position={**place, "tokens": np.array(left, np.int32)})
        for (tokens, _), (same, _) in zip(straight[i + 1 :], resumed, strict=False):
            np.testing.assert_array_equal(tokens, same, err_msg=f"after batch {i}")
    epochs = {place[0] for place in places}
    assert epochs == {0, 1} and (docs_per_call == 32 or len({place[1:3] for place in places}) > 5)


def test_batches_are_rows_and_y_is_x_one_token_later(corpus, tokenizer):
    """x and y are int32 (total_batch_size, T); y continues x within a row, and the next row continues it again."""
    config = tiny()
    n = config.total_batch_size * config.seq_len
    packed = pack(tokenizer, corpus.train, epochs=2)
    batches = train.pretraining(config, corpus, tokenizer).batches(None)
    for i, (batch, position) in enumerate(itertools.islice(batches, 30)):
        assert list(batch) == ["x", "y"]
        for a, start in ((batch["x"], i * n), (batch["y"], i * n + 1)):
            assert a.dtype == np.int32 and a.shape == (6, 24)
            np.testing.assert_array_equal(a.ravel(), packed[start : start + n])
        assert set(position) == {"epoch", "shard", "row_group", "document", "tokens"}


def test_a_corpus_of_too_few_tokens_is_refused_in_one_line(corpus, tokenizer):
    """A corpus shorter than one batch is refused at the first batch and not trained on over and over."""
    total = len(pack(tokenizer, corpus.train))
    with pytest.raises(UserError, match=f"{total:,} tokens") as caught:
        next(tok.token_stream(tokenizer, corpus.train, total))
    assert is_one_line(caught.value) and f"{total:,}" in str(caught.value)
    assert len(next(tok.token_stream(tokenizer, corpus.train, total - 1))[0]) == total


def test_an_empty_corpus_does_not_spin(tmp_path, tokenizer):
    """Shards without documents end in a UserError and not in an endless loop over epochs."""
    for i in range(2):
        pq.write_table(pa.table({"text": pa.array(["", ""], pa.string())}), tmp_path / f"shard_{i}.parquet")
    with pytest.raises(UserError, match="too few"):
        next(tok.token_stream(tokenizer, tuple(tmp_path.glob("*.parquet")), BATCH))


# ----------------------------------------------------------------------------------------------------------------------
# Rows of whole documents

WAITING = 19


def best_fit(documents, rows, length, waiting):
    """Rows (rows, length) of best-fit packing, slowly: a list of lists; and how many tokens were dropped."""
    held, out, dropped = [], [], 0
    for _ in range(rows):
        row = []
        while len(row) < length:
            while len(held) < waiting:  # the source gives 32 at a time
                held += [next(documents) for _ in range(32)]
            room, lengths = length - len(row), [len(document) for document in held]
            fitting = [n for n in lengths if n <= room]
            # Of several that are as long, the last to come; of the shortest, the first.
            at = len(held) - 1 - lengths[::-1].index(max(fitting)) if fitting else lengths.index(min(lengths))
            chosen = held.pop(at)
            row += chosen[:room]
            dropped += max(0, len(chosen) - room)
        out.append(row)
    return out, dropped


def encoded(corpus, tokenizer):
    """Each training document's ids, <|bos|> first, read without the code under test."""
    bos = tokenizer.token_to_id("<|bos|>")
    return [[bos, *tokenizer.encode(text).ids] for text in texts_of(corpus.train)]


@pytest.mark.parametrize("length", [9, 40, 150])
def test_rows_are_packed_by_best_fit(corpus, tokenizer, length, monkeypatch):
    """As a slow packer has them, in rows shorter and longer than documents; what was dropped is counted."""
    documents = encoded(corpus, tokenizer) * 3
    every = list(itertools.islice(itertools.cycle(documents), 2000))
    monkeypatch.setattr(tok, "encoded_documents", lambda *args, **more: in_groups(every))
    packed = tok.packed_rows(tokenizer, corpus.train, 4, length, waiting=WAITING)
    batches = [next(packed) for _ in range(6)]
    want, dropped = best_fit(iter(every), 24, length, WAITING)
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in batches]), want)
    last = batches[-1][1]
    assert (last["packed"], last["dropped"]) == (24 * length, dropped) and dropped > 0
    assert last["log"]["dropped_tokens"] == dropped / (24 * length + dropped)


def in_groups(documents):
    """(32 documents as arrays, a place) at a time."""
    for i in range(0, len(documents), 32):
        yield [np.asarray(document, np.int32) for document in documents[i : i + 32]], dict(tok.BEGINNING, document=i)


def test_packed_rows_begin_with_a_document_and_hold_every_document_once_an_epoch(corpus, tokenizer):
    """Two epochs: each row is made of the beginnings of documents, each of which comes in one row an epoch or waits."""
    bos = tokenizer.token_to_id("<|bos|>")
    known = encoded(corpus, tokenizer)
    rows = tok.packed_rows(tokenizer, corpus.train, 3, 61, waiting=WAITING)
    seen = 0
    while True:
        tokens, position = next(rows)
        assert tokens.dtype == np.int32 and tokens.shape == (3, 61) and (tokens[:, 0] == bos).all()
        for row in tokens:
            starts = [*np.flatnonzero(row == bos), len(row)]
            parts = [row[a:b].tolist() for a, b in itertools.pairwise(starts)]
            assert all(part in known for part in parts[:-1])  # whole ones
            assert any(document[: len(parts[-1])] == parts[-1] for document in known)
            seen += len(parts)
        if position["epoch"] == 2:
            break
    read = (
        2 * len(known)
        + sum(1 for _ in tok.read_documents(corpus.train))
        - len(list(tok.read_documents(corpus.train, tuple(position[n] for n in ("shard", "row_group", "document")))))
    )
    assert seen + len(position["lengths"]) == read


def test_packing_resumes_exactly_from_the_position_of_every_batch(corpus, tokenizer):
    """JSON and arrays in between: the same rows, and the same positions."""
    make = functools.partial(tok.packed_rows, tokenizer, corpus.train, 2, 61, waiting=WAITING)
    straight = list(itertools.islice(make(), 40))
    assert straight[-1][1]["epoch"] > 1
    for i in (0, 1, 7, 18, 30):
        rest = {k: v for k, v in straight[i][1].items() if not isinstance(v, np.ndarray)}
        arrays = {k: v.copy() for k, v in straight[i][1].items() if isinstance(v, np.ndarray)}
        assert set(arrays) == {"tokens", "lengths"}
        resumed = make(position=json.loads(json.dumps(rest)) | arrays)
        for (tokens, position), (same, place) in zip(straight[i + 1 :], resumed, strict=False):
            np.testing.assert_array_equal(tokens, same)
            jax.tree.map(np.testing.assert_array_equal, position, place)


def test_batches_of_packed_rows(corpus, tokenizer):
    """x (total_batch_size, T) begins with documents, and y is x one token later, with one more at its end."""
    config = tiny(packing="best-fit")
    batch, position = next(train.pretraining(config, corpus, tokenizer).batches(None))
    rows, _ = next(tok.packed_rows(tokenizer, corpus.train, 6, 25))
    np.testing.assert_array_equal(batch["x"], rows[:, :-1])
    np.testing.assert_array_equal(batch["y"], rows[:, 1:])
    assert 0 < position["log"]["dropped_tokens"] < 1


def test_too_few_tokens_to_pack_are_refused_in_one_line(corpus, tokenizer):
    """An epoch shorter than a batch ends in a line; a corpus of fewer documents than may wait does not."""
    total = len(pack(tokenizer, corpus.train))
    with pytest.raises(UserError, match=f"{total:,} tokens, too few for one batch of {4 * total:,}"):
        next(tok.packed_rows(tokenizer, corpus.train, 4, total))
    tokens, position = next(tok.packed_rows(tokenizer, corpus.train, 2, 30))
    assert len(position["lengths"]) >= 990 and position["epoch"] > 10


# ----------------------------------------------------------------------------------------------------------------------
# The held-out set


def byte_lengths(tokenizer):
    """Bytes per token id by GPT-2's published table (visible bytes stand for themselves, others for 256 and up)."""
    visible = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    characters = {chr(b) for b in visible} | {chr(256 + i) for i in range(256 - len(visible))}
    tokens = [tokenizer.id_to_token(i) for i in range(VOCAB)]
    assert all(set(token) <= characters for token in tokens if not re.fullmatch(r"<\|\w+\|>", token))
    return np.array([0 if re.fullmatch(r"<\|\w+\|>", token) else len(token) for token in tokens])


@pytest.mark.parametrize("rows", [1, ROWS])
def test_held_out_rows_and_their_gzip_figure(corpus, tokenizer, rows):
    """The first eval_tokens held-out tokens, and gzip -9 of each document's bytes, the last one cut as they are."""
    config = tiny(eval_tokens=rows * 24 + 23)  # what does not fill a row is left out
    held_out = tok.load_held_out(tokenizer, corpus, config.eval_tokens, 24)
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


def test_more_eval_tokens_than_there_are_is_refused_in_one_line(corpus, tokenizer):
    """Too large an eval_tokens is refused with the field, its value and how many tokens there are; one less works."""
    total = len(pack(tokenizer, corpus.val))
    most = (total - 1) // 24 * 24
    assert len(tok.load_held_out(tokenizer, corpus, most, 24).x) == most // 24
    with pytest.raises(UserError, match="eval_tokens=") as caught:
        tok.load_held_out(tokenizer, corpus, most + 24, 24)
    assert f"{total:,}" in str(caught.value) and is_one_line(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# The score


@pytest.fixture(scope="module")
def reference_score(corpus, tokenizer):
    """(nats per token, bits per byte) in float64 NumPy from forward's logits."""
    tokens = pack(tokenizer, corpus.val)[: ROWS * 24 + 1]
    y, sizes = tokens[1:], byte_lengths(tokenizer)
    forward = jax.jit(functools.partial(train.forward, tiny()))
    logits = np.asarray(forward(random_params(tiny()), tokens[:-1].reshape(ROWS, 24).astype(np.int32)), np.float64)
    logits = logits.reshape(-1, VOCAB)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]
    assert (sizes[y] == 0).sum() > 3, "special tokens should be among the targets"
    return losses.mean(), losses[sizes[y] > 0].sum() / math.log(2) / sizes[y].sum()


@pytest.mark.parametrize("device_batch_size", [1, 3, 4, 16])
def test_the_score_is_the_same_whatever_the_batch_size(corpus, tokenizer, reference_score, device_batch_size):
    """Loss and bits per byte equal a float64 reference over the same fixed tokens, padding rows counting nothing."""
    config = tiny(device_batch_size=device_batch_size, total_batch_size=device_batch_size * len(jax.devices()))
    evaluate = train.pretraining(config, corpus, tokenizer).score(config, train.GPT, train.make_mesh())
    score = evaluate(random_params(tiny()))
    assert list(score) == ["val_loss", "val_bpb"]
    np.testing.assert_allclose(list(score.values()), reference_score, rtol=1e-5)
