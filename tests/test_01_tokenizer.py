"""01_tokenizer: documents, tokens and the Hub, the real client against a Hub on loopback."""

import functools
import gzip
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from corpus import write_documents
from hub import Fault, Hub

from onechip.errors import UserError

tok = importlib.import_module("01_tokenizer")


def write_parquet(path, texts, row_group_size=3, **columns):
    """A shard of `texts` and other columns, uncompressed so that a byte can be found in it."""
    table = pa.table({"text": texts, **columns})
    pq.write_table(table, path, row_group_size=row_group_size, compression="none", use_dictionary=False)
    return Path(path)


def shard_bytes(name, count=20):
    """A small parquet shard in memory."""
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({"text": [f"document {i} of {name}, " * 9 for i in range(count)]}), buffer, row_group_size=7
    )
    return buffer.getvalue()


def one_line(error):
    """The message of a refusal, which must be a single line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def corpus():
    return tok.offline_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    """1,000 tokens from 400,000 characters: small, but with merges within and across multi-byte characters."""
    texts = list(tok.training_texts(tok.read_documents(corpus.train), 400_000, 10_000))
    return tok.train_tokenizer([*texts, "déjà vu, naïve façade, Ω≈ç√∫ 日本語のテキスト 🙂🙃 " * 300], 1_000)


def random_text(rng, length):
    """Any Unicode but surrogates, with white space, controls, digits and pieces of special tokens mixed in."""
    ranges = [(0x00, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    extras = [
        *tok.SPECIAL_TOKENS,
        "<|",
        "|>",
        "\r\n",
        "\u00a0",
        "e\u0301",
        "\ufeff",
        "\ufffd",
        "👩‍👩‍👧",
        "12345",
        "  \n\n\t",
    ]
    return "".join(
        rng.choice(extras) if rng.random() < 0.1 else chr(rng.randrange(*rng.choice(ranges))) for _ in range(length)
    )


# ---- the stream of documents


def test_resume_is_exact_at_every_position(tmp_path):
    """From any position the stream continues with exactly what would have come, over shards, row groups and gaps."""
    texts = [[f"{s}.{i}" for i in range(n)] for s, n in enumerate((7, 1, 5))]
    texts[0][3] = texts[2][0] = texts[2][4] = ""
    paths = [write_parquet(tmp_path / f"shard_{s:05d}.parquet", t) for s, t in enumerate(texts)]
    whole = list(tok.read_documents(paths))
    assert [text for _, text in whole] == [text for shard in texts for text in shard if text]
    for i, (position, _) in enumerate(whole):
        assert list(tok.read_documents(paths, start=position)) == whole[i + 1 :]


def test_positions_name_the_next_document(tmp_path):
    """A position is (shard, row group, document) of what comes next; past the last shard there is nothing."""
    paths = [write_parquet(tmp_path / f"{s}.parquet", list("abcd"), row_group_size=3) for s in range(2)]
    positions = [position for position, _ in tok.read_documents(paths)]
    assert positions == [(0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 1, 0), (2, 0, 0)]


def test_only_the_text_column_is_read(tmp_path):
    """The bytes of other columns are never read: one may be damaged on disk without any effect."""
    path = write_parquet(tmp_path / "a.parquet", list("abcdef"), url=["http://x" * 9] * 6)
    raw = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    assert chunk.path_in_schema == "url"
    raw[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = b"\xff" * (
        chunk.total_compressed_size
    )
    path.write_bytes(raw)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path, columns=["url"])
    assert [text for _, text in tok.read_documents([path])] == list("abcdef")


def test_row_groups_are_read_one_at_a_time(tmp_path):
    """The documents before a damaged row group are read; the refusal names file and group."""
    path = write_parquet(tmp_path / "a.parquet", [c * 50 for c in "abcdef"])
    raw = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    raw[chunk.data_page_offset : chunk.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(raw)
    stream = tok.read_documents([path])
    assert [next(stream)[1][0] for _ in range(3)] == list("abc")
    with pytest.raises(UserError) as error:
        next(stream)
    assert "a.parquet" in one_line(error) and "row group 1" in str(error.value)


def test_long_documents_are_read_whole(tmp_path):
    """A document comes to its last character, however long it is, and the next one after it."""
    texts = ["é" * 10_001, "b", "word " * 300_000 + "end", "c"]
    path = write_parquet(tmp_path / "a.parquet", texts)
    assert [text for _, text in tok.read_documents([path])] == texts


def test_documents_are_taken_in_small_numbers():
    """A call takes 32 short documents, or a single very long one; together the calls take each document once."""
    sizes = [10] * 70 + [3_000_000, 600_000, 600_000] + [5] * 3
    documents = [((0, 0, i), "x" * size) for i, size in enumerate(sizes)]
    stream, calls = iter(documents), []
    while taken := tok.take_documents(stream, 32):
        calls.append(taken)
    assert [len(taken) for taken in calls] == [32, 32, 7, 2, 3]
    assert [pair for taken in calls for pair in taken] == documents


# ---- the offline corpus


def test_no_source_file_is_on_both_sides(corpus):
    """All pieces of one module are in one shard: none of a held-out module was trained on; and no text is lost."""
    shards = [{text for _, text in tok.read_documents([path])} for path in (*corpus.train, *corpus.val)]
    sources = tok.find_sources(Path(os.__file__).parent)
    counts = np.zeros(len(shards), int)
    for source in sources:
        try:
            text = source.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        pieces = [piece for piece in tok.split_text(text, tok.OFFLINE_DOC_CHARS, tok.SOURCE_CUTS) if piece.strip()]
        if pieces:
            holders = [i for i, shard in enumerate(shards) if all(piece in shard for piece in pieces)]
            assert holders, source
            counts[holders[0]] += 1
    assert len(corpus.train) == tok.OFFLINE_SHARDS - 1 and len(corpus.val) == 1
    assert corpus.val[0].name == f"shard_{tok.OFFLINE_SHARDS - 1:05d}.parquet"
    assert sum(map(len, shards)) > 1_200 and counts[-1] > 40


def test_no_document_is_in_training_and_held_out(corpus):
    """Not a single held-out document occurs in training, and of its long lines not one in twenty does."""
    train = {text for _, text in tok.read_documents(corpus.train)}
    val = [text for _, text in tok.read_documents(corpus.val)]
    assert not [text for text in val if text in train and len(text) > 200]
    known = {line for text in train for line in text.splitlines()}
    lines = [line for text in val for line in text.splitlines() if len(line) > 60]
    assert np.mean([line in known for line in lines]) < 0.05


def test_offline_corpus_is_the_same_twice(corpus, tmp_path):
    """The same Python writes the same shards, byte for byte, with several row groups in each."""
    again = tok.offline_corpus(tmp_path)
    for path, other in zip((*corpus.train, *corpus.val), (*again.train, *again.val), strict=True):
        assert path.read_bytes() == other.read_bytes()
        assert pq.ParquetFile(path).num_row_groups >= 2


def test_a_second_run_writes_nothing(corpus, monkeypatch):
    """Shards that are there are used as they are."""
    monkeypatch.setattr(tok, "write_shard", lambda *_: pytest.fail("a shard was written again"))
    assert tok.offline_corpus() == corpus


def test_a_crash_while_writing_leaves_no_half_shard(corpus, tmp_path, monkeypatch):
    """A run that dies within a shard leaves only whole shards, and the next run completes them to the same corpus."""
    write, calls = pq.write_table, []

    def dying_write(table, path, **options):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"PAR1 and then the lights went out")
            raise KeyboardInterrupt
        write(table, path, **options)

    monkeypatch.setattr(pq, "write_table", dying_write)
    with pytest.raises(KeyboardInterrupt):
        tok.offline_corpus(tmp_path)
    whole = sorted(tmp_path.iterdir())
    assert [path.name for path in whole] == ["shard_00000.parquet", "shard_00001.parquet"]
    written = [path.stat().st_mtime_ns for path in whole]
    monkeypatch.setattr(pq, "write_table", write)
    again = tok.offline_corpus(tmp_path)
    assert [path.read_bytes() for path in again.train] == [path.read_bytes() for path in corpus.train]
    assert [path.stat().st_mtime_ns for path in whole] == written  # nothing is written twice


def test_splitting_loses_nothing():
    """Pieces put together are the text again, none is too long or tiny, and cuts are at top-level statements."""
    rng = random.Random(0)
    for cuts in (tok.SOURCE_CUTS, tok.PIECE_CUTS):
        for _ in range(200):
            text = "".join(rng.choice(["x", "é", "\n", "\n\n", "    ", "def f():"]) for _ in range(rng.randrange(400)))
            pieces = list(tok.split_text(text, 50, cuts))
            assert "".join(pieces) == text
            assert all(len(piece) <= 50 for piece in pieces) and all(len(piece) >= 25 for piece in pieces[:-1])
    module = "\n\n\n".join(f"def f{i}():\n    a = {i}\n\n    return a" for i in range(20))
    assert all(piece.startswith("def ") for piece in tok.split_text(module, 100, tok.SOURCE_CUTS))


# ---- the tokenizer


def test_round_trip_over_any_unicode(tokenizer):
    """Decoding gives back every text exactly, whatever characters it has."""
    rng = random.Random(1)
    texts = ["", " ", "\x00", "\ufeff", *(random_text(rng, rng.randrange(200)) for _ in range(300))]
    for text, ids in zip(texts, tok.encode_batch(tokenizer, texts), strict=True):
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


def test_the_fast_encoder_gives_the_tokenizers_own_ids(tokenizer, corpus):
    """tiktoken and tokenizers agree: on code, on every character among letters, digits and dots, on runs, on noise."""
    surroundings = (f"a{c}b 1{c}2 .{c}. {c}'{c}  {c}\n" for c in map(chr, range(0x3000)))
    rng, parts = random.Random(3), [" ", "  ", "\n", "\r\n", "\t", "a", "aa", "ab", "ba", "ſ", "K", "'S", "'ll", "12"]
    parts += ["٣", "中", "!", "..", "\u00a0", "\u2003", "\u0301", "😀", "\u200d", "<|bos|>"]
    noise = ("".join(rng.choices(parts, k=rng.randrange(1, 30))) for _ in range(5_000))
    runs = (c * n for c in " a\n\t1é" for n in (999, 30_000))
    texts = [*(text for _, text in tok.read_documents(corpus.val)), *surroundings, *noise, *runs]
    for text, ids in zip(texts, tok.encode_batch(tokenizer, texts), strict=True):
        assert ids[1:] == tokenizer.encode(text, add_special_tokens=False).ids


def test_pieces_give_the_ids_of_the_whole_text(tokenizer, corpus, monkeypatch):
    """A long text is encoded in pieces, cut only where the pattern cuts too: no id differs, in code and in noise."""
    rng = random.Random(5)
    code = "".join(text for _, text in tok.read_documents(corpus.val))
    words = ["don't", "ſ", "K", "x1y2", "12345", "٣٤", "中文", "_a_", "e\u0301", "²", "...", "!\n", "\r\n", "\t"]
    gaps = ["", " ", " ", "  ", "\n", " \n  ", "\u00a0", "\u2028"]
    noise = "".join(rng.choice(words) + rng.choice(gaps) for _ in range(100_000))
    monkeypatch.setattr(tok, "PIECE_CHARS", 2_000)
    for text, ids in zip([code, noise], tok.encode_batch(tokenizer, [code, noise]), strict=True):
        assert len(list(tok.split_text(text, tok.PIECE_CHARS, tok.PIECE_CUTS))) > 100
        assert ids[1:] == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_very_long_text_is_encoded_too(tokenizer):
    """A million spaces, which overflow tiktoken's stack, are encoded; among short texts each keeps its place."""
    pieces = tok.PIECE_CHARS
    texts = [
        "a",
        "b" + " " * 1_200_000,
        "",
        "c",
        " " * pieces,
        " " * (pieces + 1),
        "x" * (3 * pieces),
        "中" * pieces * 2,
    ]
    for text, ids in zip(texts, tok.encode_batch(tokenizer, texts), strict=True):
        assert ids[0] == tokenizer.token_to_id(tok.BOS)
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


def test_special_tokens_never_come_from_text(tokenizer, tmp_path):
    """A document that spells out special tokens has no special id but its leading BOS, before and after loading."""
    tok.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    text = "a" + "".join(tok.SPECIAL_TOKENS) * 2 + "<|bos|>"
    for which in (tokenizer, tok.load_tokenizer(tmp_path / "tokenizer.json")):
        special = {which.token_to_id(token) for token in tok.SPECIAL_TOKENS}
        assert None not in special and len(special) == len(tok.SPECIAL_TOKENS) == 9
        (ids,) = tok.encode_batch(which, [text])
        assert ids[0] == which.token_to_id(tok.BOS) and not special & set(ids[1:])
        assert which.decode(ids[1:], skip_special_tokens=False) == text


def test_training_text_cannot_make_special_tokens():
    """A corpus full of spelled-out special tokens gives no merge that ends in a special id."""
    spelled = tok.train_tokenizer(["<|bos|> hello <|user_start|> world"] * 500, 285)
    special = {spelled.token_to_id(token) for token in tok.SPECIAL_TOKENS}
    assert not special & set(tok.encode_batch(spelled, ["<|bos|><|user_start|>"])[0][1:])


def test_token_bytes_add_up(tokenizer):
    """The bytes of a text's ids, put together, are the text's UTF-8 bytes, and the lengths agree."""
    raw, lengths = tok.token_byte_strings(tokenizer), tok.token_byte_lengths(tokenizer)
    assert lengths.shape == (1_000,) and lengths.dtype == np.int32
    rng = random.Random(2)
    texts = [random_text(rng, 100) for _ in range(100)]
    for text, ids in zip(texts, tok.encode_batch(tokenizer, texts), strict=True):
        assert b"".join(raw[i] for i in ids) == text.encode()
        assert lengths[ids].sum() == len(text.encode())


def test_token_bytes_are_not_those_of_a_decoded_string(tokenizer):
    """All 256 bytes are there as one byte each; through a decoded string, half of them would count three."""
    raw = tok.token_byte_strings(tokenizer)
    assert sorted(token for token in raw if len(token) == 1) == [bytes([i]) for i in range(256)]
    decoded = [len(tokenizer.decode([i], skip_special_tokens=False).encode()) for i in range(1_000)]
    wrong = [i for i, token in enumerate(raw) if token and len(token) != decoded[i]]
    assert len(wrong) >= 128
    special = [i for i, length in enumerate(tok.token_byte_lengths(tokenizer)) if length == 0]
    assert sorted(special) == sorted(tokenizer.token_to_id(token) for token in tok.SPECIAL_TOKENS)


def test_pattern_is_nanochats(tokenizer):
    """Words keep their leading space, numbers come in twos, contractions are cut: nanochat's pattern is at work."""
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("I'll pay 12345 now!\n")
    assert [piece for piece, _ in pieces] == ["I", "'ll", "Ġpay", "Ġ", "12", "34", "5", "Ġnow", "!Ċ"]


def test_training_is_deterministic_and_exact_in_size(tokenizer, corpus):
    """The same text gives the same tokenizer, of exactly the size that the model was built for."""
    texts = [text for _, (_, text) in zip(range(40), tok.read_documents(corpus.train), strict=False)]
    first, second = (tok.train_tokenizer(iter(texts), 700) for _ in range(2))
    assert first.get_vocab_size() == 700
    assert tok.tokenizer_hash(first) == tok.tokenizer_hash(second) != tok.tokenizer_hash(tokenizer)


def test_hash_depends_on_what_decides_the_ids(tokenizer, corpus, tmp_path):
    """The hash survives saving and another layout of the file, and changes with one merge or the pattern."""
    path = tmp_path / "tokenizer.json"
    tok.save_tokenizer(tokenizer, path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, sort_keys=True))
    assert tok.tokenizer_hash(tok.load_tokenizer(path)) == tok.tokenizer_hash(tokenizer)
    content["model"]["merges"][500:502] = content["model"]["merges"][501:499:-1]
    assert tok.tokenizer_hash(tok.Tokenizer.from_str(json.dumps(content))) != tok.tokenizer_hash(tokenizer)


def test_get_tokenizer_trains_once_for_each_corpus(corpus, tmp_path, monkeypatch, capsys):
    """The second call loads; another limit, size or revision trains again; each says so in one line."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path))
    first = tok.get_tokenizer(corpus, 400, max_train_chars=50_000)
    again = tok.get_tokenizer(corpus, 400)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "trained in" in said[0] and "before" in said[1]
    assert tok.tokenizer_hash(first) == tok.tokenizer_hash(again)
    trained = []
    monkeypatch.setattr(
        tok, "train_tokenizer", lambda docs, size, _t=tok.train_tokenizer: trained.append(1) or _t(docs, size)
    )
    tok.get_tokenizer(corpus, 400, max_train_chars=50_000)
    assert not trained
    tok.get_tokenizer(corpus, 400, max_train_chars=60_000)
    tok.get_tokenizer(corpus, 401, max_train_chars=60_000)
    tok.get_tokenizer(tok.dataclasses.replace(corpus, revision="other"), 400, max_train_chars=60_000)
    tok.get_tokenizer(tok.dataclasses.replace(corpus, name="other"), 400, max_train_chars=60_000)
    assert len(trained) == 4
    tok.get_tokenizer(corpus, 400, max_doc_chars=5_000)
    assert len(trained) == 5
    record = tok.tokenizer_folder(corpus, 400) / "trained_on.json"
    record.write_text('{"max_train_chars": 60000}')  # as written before the limit was a setting
    tok.get_tokenizer(corpus, 400, max_train_chars=60_000, max_doc_chars=10_000)
    assert len(trained) == 5
    folder = tok.tokenizer_folder(corpus, 400)
    (folder / "trained_on.json").write_text("{")
    assert tok.tokenizer_hash(tok.get_tokenizer(corpus, 400)) and len(trained) == 5
    tok.save_tokenizer(tok.get_tokenizer(corpus, 401), folder / "tokenizer.json")
    with pytest.raises(UserError, match="holds 401 tokens, not 400"):
        tok.get_tokenizer(corpus, 400)


def test_limits_of_the_training_text():
    """The text to train on ends with the document that reaches the limit; of each, only the start is taken."""
    documents = [((0, 0, i), "x" * 10) for i in range(9)]
    counts = [len(list(tok.training_texts(iter(documents), limit, 99))) for limit in (1, 10, 11, 30, 999)]
    assert counts == [1, 1, 2, 3, 9]
    assert list(tok.training_texts([(0, "abcde"), (0, "fg"), (0, "hij")], 6, 3)) == ["abc", "fg", "hij"]


def test_a_full_disk_keeps_the_old_tokenizer(tokenizer, tmp_path, monkeypatch):
    """Saving onto a full disk is refused in one line, and the file that was there is still whole."""
    path = tmp_path / "tokenizer.json"
    tok.save_tokenizer(tokenizer, path)
    before = path.read_bytes()

    def full_disk(self, text, **_):
        self.write_bytes(text.encode()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError) as error:
        tok.save_tokenizer(tokenizer, path)
    assert "tokenizer.json" in one_line(error) and "full" in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_gzip_bits_per_byte_counts_each_document():
    """Documents are compressed one by one, headers included, and weighed by their bytes."""
    documents = [b"abcabcabc" * 50, Path(tok.__file__).read_bytes(), "é".encode()]  # level 6 is larger on the second
    sizes = [len(gzip.compress(document, compresslevel=9, mtime=0)) for document in documents]
    assert tok.gzip_bits_per_byte(iter(documents)) == pytest.approx(
        8 * sum(sizes) / sum(map(len, documents)), rel=1e-12
    )
    with pytest.raises(UserError):
        tok.gzip_bits_per_byte([])


# ---- bad input, one line each


def make_bad_shard(path, kind):
    """Writes what is wrong with a shard; returns what the refusal must name."""
    good = shard_bytes("a")
    if kind == "not parquet":
        path.write_bytes(b"just some text, nothing else")
    elif kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "no text":
        pq.write_table(pa.table({"content": ["a"]}), path)
        return "'content'"
    elif kind == "two texts":
        table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        pq.write_table(table, path)
        return "2 columns named 'text'"
    elif kind == "numbers":
        pq.write_table(pa.table({"text": [1, 2]}), path)
        return "int64"
    return path.name


@pytest.mark.parametrize(
    "kind", ["not parquet", "truncated", "empty file", "no text", "two texts", "numbers", "missing"]
)
def test_bad_shards_are_refused_by_name(tmp_path, kind):
    """Each kind of bad shard is refused in one line that names the file and what is wrong with it."""
    path = tmp_path / "shard_00007.parquet"
    named = make_bad_shard(path, kind)
    with pytest.raises(UserError) as error:
        list(tok.read_documents([path]))
    assert "shard_00007.parquet" in one_line(error) and named in str(error.value)


def test_folder_corpora(tmp_path, capsys):
    """A folder's shards are in the order of their names, the last is held out; the revision depends on content."""
    for name in ("b", "a", "c"):
        write_parquet(tmp_path / f"{name}.parquet", [name] * 4)
    corpus = tok.get_corpus(str(tmp_path), 1)
    assert [path.stem for path in corpus.train] == ["a", "b"] and [path.stem for path in corpus.val] == ["c"]
    assert "8 documents in 2 training shards, 4 held out" in capsys.readouterr().out
    write_parquet(tmp_path / "b.parquet", ["B"] * 4)
    assert tok.folder_corpus(tmp_path).revision != corpus.revision


def test_texts_of_one_size_have_revisions_of_their_own(tmp_path):
    """Two folders whose files agree in name, size and everything but one early byte have different revisions."""
    revisions, sizes = set(), set()
    for i, first in enumerate("abba"):
        (tmp_path / f"{i}").mkdir()
        for name in ("x", "y"):
            texts = [first * 9, *(f"document {n}, the same in all " * 40 for n in range(300))]
            path = write_parquet(tmp_path / f"{i}" / f"{name}.parquet", texts)
            sizes.add(path.stat().st_size)
            assert path.stat().st_size > 200_000
        revisions.add(tok.folder_corpus(tmp_path / f"{i}").revision)
    assert len(sizes) == 1 and len(revisions) == 2


def test_unchanged_shards_are_hashed_once(tmp_path, monkeypatch):
    """A second look at a folder reads no content; a file that was changed, or written just now, is read again."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    folder, read = tmp_path / "data", []
    folder.mkdir()
    paths = [write_parquet(folder / f"{name}.parquet", [name] * 4) for name in "ab"]
    monkeypatch.setattr(tok, "hash_file", lambda path, _hash=tok.hash_file: read.append(path.name) or _hash(path))
    first = tok.folder_corpus(folder).revision
    assert tok.folder_corpus(folder).revision == first and len(read) == 4  # too young to be trusted
    later = time.time_ns() + 3_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert [tok.folder_corpus(folder).revision for _ in range(2)] == [first] * 2 and len(read) == 6
    before = paths[0].stat()
    write_parquet(paths[0], ["A"] * 4)
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps the time
    assert paths[0].stat().st_size == before.st_size
    assert tok.folder_corpus(folder).revision != first and read[6:] == ["a.parquet"]
    for note in (tmp_path / "home" / "hashes").iterdir():
        note.write_text('{"a.parquet": 3, "b.parquet": [1]}')
    assert tok.folder_corpus(folder).revision != first and len(read) == 9


def test_bad_folders_are_refused(tmp_path):
    """No such folder, no shard to hold out, a bad shard among good ones, no documents: one line each."""
    with pytest.raises(
        UserError, match="data='finewebb': is neither offline nor fineweb, climbmix, fineweb10b nor a folder"
    ):
        tok.get_corpus("finewebb", 1)
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(UserError) as error:
        tok.folder_corpus(tmp_path)
    assert "1 parquet" in one_line(error)
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b\.parquet"):
        tok.folder_corpus(tmp_path)
    write_parquet(tmp_path / "b.parquet", pa.array([], pa.string()))
    with pytest.raises(UserError, match="0 held out"):
        tok.get_corpus(str(tmp_path), 1)


def test_bad_vocabularies_are_refused():
    """Too small for bytes and special tokens, or too large for the text: refused with the numbers."""
    for size in (264, 0, -1, 10**14):
        with pytest.raises(UserError, match=rf"vocab_size={size}: must be 265 .* to 1,000,000") as error:
            tok.train_tokenizer(["abc"], size)
        one_line(error)
    assert tok.train_tokenizer(["abc"], 265).get_vocab_size() == 265
    with pytest.raises(UserError, match="vocab_size=1000: the text gives only 2.. tokens") as error:
        tok.train_tokenizer(["abc abd"], 1_000)
    one_line(error)


def test_bad_tokenizer_files_are_refused(tokenizer, tmp_path):
    """Missing, cut short, of another kind, cut or merged in a way that is not ours: one line that names the file."""
    path = tmp_path / "tokenizer.json"
    whole = tokenizer.to_str()
    other = whole.replace("<|bos|>", "<|start|>")
    gap = whole.replace(":999}", ":5000}")  # the last id
    assert gap != whole
    parsed = json.loads(whole)
    words = json.dumps(parsed | {"pre_tokenizer": {"type": "Whitespace"}})
    lower = json.dumps(parsed | {"normalizer": {"type": "Lowercase"}})
    merges = parsed["model"]["merges"]
    order = json.dumps(parsed | {"model": parsed["model"] | {"merges": [merges[-1], *merges[:-1]]}})
    for content in (None, "", whole[:5000], '{"a": 1}', other, gap, words, lower, order):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError) as error:
            tok.load_tokenizer(path)
        assert str(path) in one_line(error)


def test_more_shards_than_a_dataset_has_are_refused_at_once():
    """In the settings already, by the dataset that is chosen."""
    for words, last in (("--data fineweb --num_shards 1823", 1822), ("--data climbmix --num_shards 6543", 6542)):
        with pytest.raises(UserError, match=f"num_shards={last + 1}: must be 1 to {last}"):
            tok.choose_settings(words)
    assert tok.choose_settings("--data climbmix --num_shards 6542").num_shards == 6542


def test_fineweb_arguments_are_checked():
    """A number of shards or a revision that cannot be is refused before anything is asked of the Hub."""
    for number in (0, 1823):
        with pytest.raises(UserError, match=f"num_shards={number}: must be 1 to 1822"):
            tok.hub_corpus(tok.FINEWEB, number)
    with pytest.raises(UserError, match="revision='main': must be a commit"):
        tok.hub_corpus(tok.FINEWEB, 1, revision="main")


# ---- settings, table and picture


def test_settings_by_machine_and_by_hand(monkeypatch, capsys):
    """A TPU gets FineWeb-Edu and 32,768 tokens, a laptop the offline corpus and 8,192; what is set stays."""
    monkeypatch.setattr(sys, "argv", ["01_tokenizer.py"])
    monkeypatch.setattr(tok, "has_tpu", lambda: True)
    assert (tok.choose_settings().data, tok.choose_settings().vocab_size) == ("fineweb", 32_768)
    monkeypatch.setattr(tok, "has_tpu", lambda: False)
    assert (tok.choose_settings().data, tok.choose_settings().vocab_size) == ("offline", 8_192)
    capsys.readouterr()
    chosen = tok.choose_settings("--data fineweb --num_shards 2 --vocab_size 4096")
    assert (chosen.data, chosen.num_shards, chosen.vocab_size) == ("fineweb", 2, 4096)
    assert capsys.readouterr().out.count("as set") == 2
    for words in ("--num_shards 0", "--num_shards -3", "--vocab_size -1", "--vocab_size 1000001"):
        with pytest.raises(UserError, match=words.removeprefix("--").replace(" ", "=")):
            tok.choose_settings(words)
    for words in ("--max_train_chars 0", "--max_doc_chars 0"):
        with pytest.raises(UserError, match=words.removeprefix("--").replace(" ", "=")):
            tok.choose_settings(words)


def test_the_first_cell_shows_more_merges_in_fewer_tokens(capsys):
    """Each line of the first cell spells the same sentence, in fewer tokens with more merges."""
    tok.show_merges(["a cat sat", "a cat"], (0, 2, 5))
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2].replace("·", "") for line in lines] == ["a_cat_sat"] * 3
    counts = [line.count("·") for line in lines]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3


def test_compression_is_bytes_per_token(tokenizer, corpus):
    """The table divides UTF-8 bytes by tokens without BOS, over held-out text; a byte is one byte."""
    samples = {"one": ("here", ["naïve", "façade " * 20]), "two": ("there", ["x"])}
    table = tok.measure_compression({"ours": functools.partial(tok.count_ids, tokenizer)}, samples)
    tokens = sum(len(tokenizer.encode(text).ids) for text in samples["one"][1])
    assert table["ours"] == {"one": pytest.approx((6 + 160) / tokens), "two": 1.0}
    assert set(table["UTF-8 bytes, 256"].values()) == {1.0}
    held_out = {text for _, text in tok.read_documents(corpus.val)}
    kinds = tok.held_out_samples(corpus)
    assert set(kinds["code"][1]) <= held_out
    assert all(any(line in text for text in held_out) for line in kinds["English"][1][5].splitlines())


def test_texts_that_spell_special_tokens_are_compared_too(tmp_path, tokenizer):
    """Cut at white space only, a document's <|bos|> becomes one token, by its special name; where it does not, both
    ways to count agree."""
    for i in range(2):
        tok.write_shard(tmp_path / f"shard_{i}.parquet", write_documents(200, i, 30), 7)
    settings = tok.Settings(vocab_size=300, max_train_chars=10**6)
    counters = tok.train_baselines(tok.folder_corpus(tmp_path), settings)
    counts = {name: count(["<|bos|> import\n", "water"]) for name, count in counters.items()}
    assert counts["white space only, 300"] < counts["GPT-2's pattern, 300"]
    texts = ["import this\n\n", "naïve 数据 <|bos|>", " " * 40]
    assert tok.count_slowly(tokenizer, texts) == tok.count_ids(tokenizer, texts)


def test_mathematics_is_true(monkeypatch):
    """The generated problems are right: each \\det and each sum is recomputed from the text alone."""
    import re

    texts = tok.write_mathematics(count=30)
    checked = 0
    for text in texts:
        if "det" in text:
            a, b, c, d = map(int, re.search(r"\} (\d+) & (\d+) \\\\ (\d+) & (\d+) ", text).groups())
            assert text.rstrip("$.").endswith(f"= {a * d - b * c}")
            checked += 1
        elif r"\sum" in text:
            n = int(re.search(r"\^\{(\d+)\}", text)[1])
            assert f"= {sum(range(n + 1))} " in text
            checked += 1
        elif "derivative" in text:
            a, n = map(int, re.search(r"= (\d+)x\^\{(\d+)\}", text).groups())
            assert f"= {a * n}x^{{{n - 1}}}" in text
            checked += 1
    assert checked == 90 and texts == tok.write_mathematics(count=30)


def test_tiktoken_where_it_can_be_had(monkeypatch, capsys):
    """With tables GPT-2 and GPT-4 are counted; without, or when they hang, one line says so and the run continues."""

    class Encoding:
        def encode_ordinary_batch(self, texts):
            return [list(text) for text in texts]

    fake = types.SimpleNamespace(get_encoding=lambda name: Encoding())
    monkeypatch.setattr(tok, "tiktoken", fake)
    assert [count(["ab", "c"]) for count in tok.load_tiktoken().values()] == [3, 3]
    assert capsys.readouterr().out == ""

    def no_network(name):
        raise ConnectionError("no network")

    for broken, timeout in ((no_network, 30), (lambda name: time.sleep(2), 0.1)):
        fake.get_encoding = broken
        assert tok.load_tiktoken(timeout) == {}
        assert len(capsys.readouterr().out.splitlines()) == 1


# ---- the Hub


def run_client(hub, home, code, **environment):
    """Runs `code` with `tok` imported in a process of its own that knows only this Hub; returns the process."""
    start = "import importlib\nfrom onechip import hubclient\nfrom onechip.errors import UserError\n"
    start += 'tok = importlib.import_module("01_tokenizer")\nhubclient.FIRST_PAUSE = 0.01\n'
    environment = os.environ | hub.environment() | {"ONECHIP_HOME": str(home)} | environment
    environment |= {
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    }
    command = [sys.executable, "-c", start + code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """What a client said, after it ended well."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def add_fineweb(hub, count):
    """A FineWeb-Edu of `count` training shards and the last one, at the pinned revision."""
    files = {f"shard_{i:05d}.parquet": shard_bytes(i) for i in [*range(count), tok.FINEWEB.last_shard]}
    hub.add_repo(tok.FINEWEB.repo, files, "dataset", commit=tok.FINEWEB.revision)
    return files


def test_download_survives_faults_and_is_not_repeated(tmp_path):
    """Errors, a cut, a stall, a short and a changed answer cost a repetition each; a second run asks for nothing."""
    with Hub() as hub:
        files = add_fineweb(hub, 6)
        hub.faults = [
            Fault("HEAD", "shard_00000", status=500, times=2),
            Fault("GET", "shard_00001", status=429, headers={"Retry-After": "1"}),
            Fault("GET", "shard_00002", cut=True),
            Fault("GET", "shard_00003", stall=True),
            Fault("GET", "shard_00004", short=True),
            Fault("GET", "shard_00005", flip=True),
        ]
        code = "corpus = tok.hub_corpus(tok.FINEWEB, 6)\ncorpus.train.fetch(corpus.train.paths)\n"
        code += "print(corpus.revision, len(corpus.train), corpus.val[0].name)"
        wanted = f"{tok.FINEWEB.revision} 6 shard_01822.parquet"
        # The data is public: an expired login of the user's must not be in its way.
        assert finish(run_client(hub, tmp_path, code, HF_TOKEN="hf_expired")).splitlines()[-1] == wanted
        assert [fault.times for fault in hub.faults] == [0] * 6 and not hub.unknown
        (folder,) = tmp_path.iterdir()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        assert hub.count("GET", "shard_01822") == 1 and set(hub.tokens) == {None}
        asked = len(hub.requests)
        assert finish(run_client(hub, tmp_path, code)) == wanted + "\n"
        assert len(hub.requests) == asked


def test_downloads_that_cannot_succeed_are_refused(tmp_path):
    """A shard that is missing, stays wrong or is no parquet, or a wrong revision: one line, no file of that name."""
    with Hub() as hub:
        files = add_fineweb(hub, 3)
        files["shard_00001.parquet"] = b"not parquet, and truly so on the Hub"
        hub.add_repo(tok.FINEWEB.repo, files, "dataset", commit="b" * 40)
        del files["shard_00000.parquet"]
        hub.add_repo(tok.FINEWEB.repo, files, "dataset", commit="c" * 40)
        fifty = {f"shard_{i:05d}.parquet": b"" for i in range(50) if i != 37}
        hub.add_repo(tok.FINEWEB.repo, fifty | {"shard_01822.parquet": b""}, "dataset", commit="e" * 40)
        hub.faults = [Fault("GET", f"/{tok.FINEWEB.revision}/shard_00002", flip=True, times=100)]
        code = (
            "asked = [(2, 'b' * 40), (1, 'c' * 40), (1, 'd' * 40), (50, 'e' * 40)]\n"
            "for number, revision in ((3, tok.FINEWEB.revision), *asked):\n"
            "    try:\n        list(tok.hub_corpus(tok.FINEWEB, number, revision=revision).train)\n"
            "    except UserError as error:\n        print('refused', error)\n"
        )
        said = [line for line in finish(run_client(hub, tmp_path, code)).splitlines() if line.startswith("refused")]
        assert len(said) == 5
        assert "shard_00002" in said[0] and "SHA-256" in said[0] and "after 5 attempts" in said[0]
        assert "shard_00001" in said[1] and "parquet" in said[1]
        assert "shard_00000" in said[2] and "no such file" in said[2]
        assert "dddddddddddd" in said[3] and "attempts" not in said[3]
        assert "shard_00037" in said[4] and "no such file" in said[4] and not hub.count("GET", "e{40}")
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert f"fineweb-edu-{tok.FINEWEB.revision[:12]}/shard_00000.parquet" in left
        assert not [
            name for name in left if "shard_00002" in name or name.startswith("fineweb-edu-bbb") and "00001" in name
        ]


def test_a_revision_is_looked_up_once_and_a_run_keeps_its_own(tmp_path):
    """ClimbMix: the newest commit when it is first used, whatever comes after; resumed elsewhere, the run's own."""
    names = [f"shard_{i:05d}.parquet" for i in (0, 1, tok.CLIMBMIX.last_shard)]
    with Hub() as hub:
        for commit in ("a", "b"):
            files = {name: shard_bytes(10 * i + ord(commit)) for i, name in enumerate(names)}
            hub.add_repo(tok.CLIMBMIX.repo, files, "dataset", commit=commit * 40)
            code = "print('got', tok.get_corpus('climbmix', 2).revision)"
            assert f"got {'a' * 40}" in finish(run_client(hub, tmp_path, code)).splitlines()
        asked = len(hub.requests)
        finish(run_client(hub, tmp_path, code))
        assert len(hub.requests) == asked
        kept = {"name": "climbmix", "revision": "a" * 40}
        code = f"corpus = tok.get_corpus('climbmix', 2, {kept})\nprint('got', corpus.revision, corpus.train[0].parent)"
        elsewhere = tmp_path / "elsewhere"
        assert f"got {'a' * 40} {elsewhere / ('climbmix-' + 'a' * 12)}" in finish(run_client(hub, elsewhere, code))
        code = f"print('got', tok.get_corpus('climbmix', 2, {kept | {'name': 'stdlib'}}).revision)"
        assert f"got {'b' * 40}" in finish(run_client(hub, elsewhere, code))
        hub.faults = [Fault("GET", "/api/datasets/.*climbmix", status=500, times=100)]
        client = run_client(hub, tmp_path / "third", "tok.get_corpus('climbmix', 2)")
        assert "has not said what is newest after 5 attempts" in client.communicate(timeout=60)[1]


def test_a_killed_download_resumes(tmp_path):
    """A process killed within a shard leaves no part under its name, and the next fetches only what is missing."""
    with Hub() as hub:
        files = add_fineweb(hub, 2)
        hub.faults = [Fault("GET", "shard_00001", stall=True, times=9)]
        code = "corpus = tok.hub_corpus(tok.FINEWEB, 2)\ncorpus.train.fetch(corpus.train.paths)"
        process = run_client(hub, tmp_path, code)
        folder = tmp_path / f"fineweb-edu-{tok.FINEWEB.revision[:12]}"
        deadline = time.monotonic() + 30
        others = [folder / "shard_00000.parquet", folder / "shard_01822.parquet"]
        while not (hub.count("GET", "cdn.*00001") and all(path.exists() for path in others)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "shard_00001.parquet").exists()
        hub.faults.clear()
        before = hub.count("GET", "cdn.*(00000|01822)")
        finish(run_client(hub, tmp_path, code))
        assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == files
        assert hub.count("GET", "cdn.*(00000|01822)") == before


def test_the_whole_run_uploads_to_the_hub(tmp_path):
    """01 as a script trains, shows its table and picture, and the tokenizer arrives, private, token unsaid."""
    with Hub(users={"hf_secret_word": "someone"}) as hub:
        command = [sys.executable, str(ROOT / "01_tokenizer.py"), "--vocab_size", "500", "--max_train_chars", "200000"]
        environment = os.environ | hub.environment() | {"ONECHIP_HOME": str(tmp_path), "HF_TOKEN": "hf_secret_word"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "hf_secret_word" not in done.stdout + done.stderr
        (path,) = tmp_path.rglob("tokenizer.json")
        arrived = hub.files("someone/onechip-tokenizer")
        assert arrived["tokenizer.json"] == path.read_bytes()
        assert b"PreTrainedTokenizerFast" in arrived["tokenizer_config.json"]
        assert arrived["compression.png"].startswith(b"\x89PNG") and b"mathematics" in arrived["README.md"]
        assert hub.repos["model", "someone/onechip-tokenizer"].private and not hub.unknown
        for said in ("chosen:", "data:", "tokenizer:", "bytes per token", "gzip -9", "upload: tokenizer.json"):
            assert said in done.stdout
