"""Shards of tokens: their layout, their stream and rows, the tokenizer that comes with them, and a run on them."""

import functools
import importlib
import itertools
import json

import numpy as np
import pytest
from corpus import ROWS, assert_same_end, is_one_line, tiny, train_tiny
from hub import Fault, connected_hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onechip.errors import UserError

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

SIZE = 300  # of the stand-in for GPT-2's tokenizer
LIMIT = 50  # tokens that are read together, in these tests
BATCH = 44


def write_raw(path, tokens, header=(20240520, 1)):
    """A .bin shard, without the code under test."""
    whole = np.zeros(256, "<i4")
    whole[:3] = *header, len(tokens)
    path.write_bytes(whole.tobytes() + np.array(tokens, "<u2").tobytes())
    return path


@pytest.fixture(scope="module")
def gpt2():
    """Byte-level BPE as GPT-2's file has it: the regular expression built in, one special token, with the last id."""
    texts = [
        "the water of the measure isn't 1024 light, we'll import  self\n\n",
        "naïve 数据 number return energy " * 9,
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts * 9, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert tokenizer.get_vocab_size() == SIZE and tokenizer.token_to_id("<|endoftext|>") == SIZE - 1
    return tokenizer


@pytest.fixture(scope="module")
def folder(gpt2, tmp_path_factory):
    """Three shards to train on and one held out, and their tokenizer.

    Documents of 1 to 170 tokens, so that some are longer than three pieces; one goes on in the next shard, and the
    first shard begins within one.
    """
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    lengths = rng.permutation([*range(1, 60), 49, 50, 51, 99, 100, 101, 150, 170])
    stream = np.concatenate([[SIZE - 1, *rng.integers(0, SIZE - 1, n - 1)] for n in lengths])[7:]
    parts = np.split(stream, [731, 1500])
    assert SIZE - 1 not in [part[0] for part in parts]
    for i, part in enumerate(parts):
        write_raw(folder / f"some_train_{i:03d}.bin", part)
    write_raw(folder / "a_val_000.bin", [SIZE - 1, *rng.integers(0, SIZE - 1, 83)] * 5)
    (folder / "tokenizer.json").write_text(gpt2.to_str())
    return folder


@pytest.fixture
def corpus(folder, monkeypatch):
    """The folder as a Corpus, read in small pieces."""
    monkeypatch.setattr(tok, "TOKENS_AT_ONCE", LIMIT)
    return tok.folder_corpus(folder)


@pytest.fixture
def tokenizer(corpus):
    return tok.get_tokenizer(corpus, 0)


def tokens_of(paths):
    """All tokens, read without the code under test."""
    return np.concatenate([np.frombuffer(path.read_bytes()[1024:], "<u2") for path in paths]).astype(int)


def cut_documents(stream):
    """Documents of a whole stream, as lists; the one without an opening first."""
    starts = [0, *(i for i, token in enumerate(stream) if token == SIZE - 1), len(stream)]
    return [stream[a:b].tolist() for a, b in itertools.pairwise(starts)]


def through_json(position):
    """A position as a checkpoint keeps it."""
    arrays = {k: v.copy() for k, v in position.items() if isinstance(v, np.ndarray)}
    return json.loads(json.dumps({k: v for k, v in position.items() if k not in arrays})) | arrays


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("docs_per_call", [1, 5, 32])
def test_the_stream_is_every_token_in_order(corpus, tokenizer, docs_per_call):
    """Of all shards and two epochs, nothing lost at a piece's, document's or shard's end; int32."""
    once = tokens_of(corpus.train)
    both = np.concatenate([once, once])
    stream = tok.token_stream(tokenizer, corpus.train, BATCH, docs_per_call=docs_per_call)
    for i in range((len(both) - 1) // BATCH):
        tokens, position = next(stream)
        np.testing.assert_array_equal(tokens, both[i * BATCH : (i + 1) * BATCH + 1])
        assert tokens.dtype == np.int32 and set(position) == {"epoch", "shard", "row_group", "document", "tokens"}
        assert position["row_group"] == 0


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
@pytest.mark.parametrize("limit", [LIMIT, 1 << 20])
def test_tokens_resume_exactly_from_every_position(corpus, tokenizer, packing, limit, monkeypatch):
    """JSON and arrays in between: the same batches and the same places, wherever a document or piece was cut."""
    monkeypatch.setattr(tok, "TOKENS_AT_ONCE", limit)
    if packing == "stream":
        make = functools.partial(tok.token_stream, tokenizer, corpus.train, BATCH, docs_per_call=3)
    else:
        make = functools.partial(tok.packed_rows, tokenizer, corpus.train, 2, 22, waiting=13)
    straight = list(itertools.islice(make(), 90))
    assert straight[-1][1]["epoch"] >= 1
    for i in range(0, 80, 7 if packing == "best-fit" else 1):
        resumed = make(position=through_json(straight[i][1]))
        for (want, place), (got, same) in zip(straight[i + 1 :], resumed, strict=False):
            np.testing.assert_array_equal(got, want)
            if packing == "best-fit":
                assert place.keys() == same.keys()
                for name in place:
                    np.testing.assert_array_equal(same[name], place[name])


def test_rows_hold_documents_cut_at_the_opening_token(corpus, tokenizer, monkeypatch):
    """Each row begins with <|endoftext|> and has whole documents but for its last; the headless one is dropped."""
    monkeypatch.setattr(tok, "TOKENS_AT_ONCE", 180)
    documents = cut_documents(tokens_of(corpus.train))
    headless, known = documents[0], documents[1:]
    rows = tok.packed_rows(tokenizer, corpus.train, 3, 61, waiting=9)
    _, first = next(rows)
    assert first["dropped"] >= len(headless)
    for tokens, _ in itertools.islice(rows, 9):
        assert tokens.shape == (3, 61) and (tokens[:, 0] == SIZE - 1).all()
        for row in tokens:
            parts = cut_documents(row)[1:]
            assert all(part in known for part in parts[:-1])
            assert any(document[: len(parts[-1])] == parts[-1] for document in known)


def test_a_document_goes_on_in_the_next_shard(corpus, tokenizer):
    """Joined to one; the place after it is in the next shard, and before it where the document began."""
    at = list(tok.read_token_documents(tokenizer, corpus.train))
    np.testing.assert_array_equal(np.concatenate([tokens for _, tokens in at]), tokens_of(corpus.train))
    joined = [i for i, ((s, _, _), _) in enumerate(at) if i and s > at[i - 1][0][0]]
    assert len(joined) == 3 and at[-1][0] == (3, 0, 0)
    for i in joined[:2]:
        assert at[i][0][2] > 0 and max(len(tokens) for _, tokens in at) == LIMIT
    for i, (position, _) in enumerate(at):
        for (_, want), (_, got) in zip(
            at[i + 1 :], tok.read_token_documents(tokenizer, corpus.train, position), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_a_shard_is_not_read_as_a_whole(corpus, tokenizer):
    """The first documents come although what follows in their file is damaged; the line names token and file."""
    path = corpus.train[0]
    raw = bytearray(path.read_bytes())
    raw[1024 + 2 * 400 : 1024 + 2 * 401] = np.uint16(SIZE).tobytes()
    bad = path.parent / "bad"
    bad.mkdir(exist_ok=True)
    (bad / path.name).write_bytes(raw)
    documents, seen = tok.read_token_documents(tokenizer, [bad / path.name]), 0
    with pytest.raises(UserError) as error:
        for _, tokens in documents:
            seen += len(tokens)
    assert seen > 250 and is_one_line(error.value)
    assert str(error.value).endswith(f"{path.name}: token 400 is {SIZE}, and the tokenizer has only {SIZE}")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input, one line each


def make_bad(path, kind):
    """Writes what is wrong with a shard; returns what the line must say."""
    write_raw(path, [299, *range(40)])
    raw = path.read_bytes()
    if kind == "cut short":
        path.write_bytes(raw[:-10])
        return "is cut short: 36 tokens, its header says 41"
    if kind == "too long":
        path.write_bytes(raw + b"ab")
        return "is too long: 42 tokens, its header says 41"
    if kind == "half a token":
        path.write_bytes(raw[:-1])
        return "is cut short"
    if kind == "other layout":
        path.write_bytes(b"PK\x03\x04" * 900)
        return "its header begins with 67324752, 67324752; a shard of tokens begins with 20240520, 1"
    if kind == "other version":
        write_raw(path, range(41), header=(20240520, 2))
        return "its header begins with 20240520, 2"
    if kind == "no header":
        path.write_bytes(b"\x58")
        return "its header begins with 0, 0"
    path.unlink()
    return "there is no such shard"


KINDS = ["cut short", "too long", "half a token", "other layout", "other version", "no header", "missing"]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_headers_are_refused_by_name(tmp_path, gpt2, kind):
    """Before training, from the header and the size alone; and when such a shard is read."""
    write_raw(tmp_path / "a.bin", [299, 1])
    write_raw(tmp_path / "c.bin", [299, 1])
    what = make_bad(tmp_path / "b.bin", kind)
    if kind != "missing":
        with pytest.raises(UserError, match="b.bin: ") as error:
            tok.folder_corpus(tmp_path)
        assert what in str(error.value) and is_one_line(error.value)
    with pytest.raises(UserError, match="b.bin: ") as error:
        list(tok.read_token_documents(gpt2, [tmp_path / "a.bin", tmp_path / "b.bin"]))
    assert what in str(error.value) and is_one_line(error.value)


def test_a_shard_cut_while_it_is_read_is_a_line(corpus, tokenizer, tmp_path):
    """Not a bus error, as it would be in memory that is mapped."""
    path = write_raw(tmp_path / "a.bin", tokens_of(corpus.train[:1]))
    documents = tok.read_token_documents(tokenizer, [path])
    next(documents)
    with open(path, "r+b") as file:
        file.truncate(1024 + 2 * 333)
    with pytest.raises(UserError, match=r"a\.bin: was cut short at token \d+ while it was read") as error:
        list(documents)
    assert is_one_line(error.value)


def test_a_shard_without_openings_is_a_line(gpt2, tmp_path):
    """Tokens of another kind would be packed for ever."""
    path = write_raw(tmp_path / "a.bin", list(range(90)) * 9)
    with pytest.raises(UserError, match=r"a\.bin: no document in it begins with <\|endoftext\|>, id 299"):
        next(tok.packed_rows(gpt2, [path], 2, 30))


def test_folders_of_tokens(folder, tmp_path, capsys):
    """*_val_* is held out, else the last by name; text and tokens together, or too few, are refused; tokens counted."""
    corpus = tok.get_corpus(str(folder), 1)
    assert [path.name for path in corpus.val] == ["a_val_000.bin"] and len(corpus.train) == 3
    total = len(tokens_of(corpus.train))
    assert f"{total:,} tokens in 3 training shards, 420 held out" in capsys.readouterr().out
    for name in "dbc":
        write_raw(tmp_path / f"{name}.bin", [299, 1])
    other = tok.folder_corpus(tmp_path)
    assert [path.name for path in (*other.train, *other.val)] == ["b.bin", "c.bin", "d.bin"]
    write_raw(tmp_path / "c.bin", [299, 2])
    assert tok.folder_corpus(tmp_path).revision != other.revision
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds x\.parquet and b\.bin; keep \.parquet or \.bin, not both") as error:
        tok.folder_corpus(tmp_path)
    assert is_one_line(error.value)
    for name in ("x.parquet", "b.bin", "c.bin"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"holds 1 \.bin shards; two or more"):
        tok.folder_corpus(tmp_path)


def test_no_tokenizer_is_trained_on_tokens(folder):
    """01 says so before anything is downloaded, for a folder and for the data set of that kind."""
    for source in (str(folder), "fineweb10b"):
        with pytest.raises(UserError, match="holds tokens already; a tokenizer is trained on text"):
            tok.choose_settings(f"--data {source}")


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


def test_the_fast_encoder_follows_gpt2s_pattern(tokenizer):
    """Equal ids on every character among letters, digits and dots, on runs, contractions and texts that are cut."""
    surroundings = [f"a{c}b 1{c}2 .{c}. {c}'{c}  {c}\n" for c in map(chr, range(0x3000))]
    rng = np.random.default_rng(1)
    parts = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "a",
        "ab",
        "'s",
        "'ll",
        "'S",
        "12345",
        "٣",
        "中",
        "!",
        "..",
        "\u00a0",
        "\u2003",
    ]
    parts += ["\u0301", "😀", "<|endoftext|>", "²", "water", " the"]
    noise = ["".join(rng.choice(parts, rng.integers(1, 30))) for _ in range(2_000)]
    texts = [*surroundings, *noise, " " * 30_000, "".join(rng.choice(parts, 60_000))]
    for text, ids in zip(texts, tok.encode_batch(tokenizer, texts), strict=True):
        assert ids[0] == SIZE - 1 and ids[1:] == tokenizer.encode(text, add_special_tokens=False).ids
        assert SIZE - 1 not in ids[1:]


def test_bytes_and_decoding_of_gpt2s_kind(tokenizer):
    """The bytes of a text's ids are its UTF-8 bytes, the opening token has none, and decoding gives the text again."""
    text, raw = "naïve 数据 <|endoftext|> isn't 1024", tok.token_byte_strings(tokenizer)
    (ids,) = tok.encode_batch(tokenizer, [text])
    assert b"".join(raw[i] for i in ids) == text.encode() and raw[SIZE - 1] == b""
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert tok.opening_token(tokenizer) == "<|endoftext|>" and tok.opening_id(tokenizer) == SIZE - 1
    assert len(tok.tokenizer_hash(tokenizer)) == 64


def test_an_export_names_the_token_that_opens(tokenizer, tmp_path):
    """For transformers, too, a text begins with <|endoftext|>."""
    tok.export_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<|endoftext|>"


def test_gpt2s_tokenizer_is_downloaded_once_and_checked(gpt2, folder, tmp_path, monkeypatch, capsys):
    """Where none lies next to the shards: from its pinned commit, after an answer that was changed; then from disk."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    for name in ("a.bin", "b.bin"):
        write_raw(tmp_path / name, [299, 1, 2])
    corpus = tok.folder_corpus(tmp_path)
    with connected_hub(monkeypatch) as hub:
        repo, revision = tok.GPT2
        hub.add_repo(repo, {"tokenizer.json": gpt2.to_str().encode()}, commit=revision)
        hub.faults = [Fault("GET", "resolve/.*tokenizer.json", flip=True)]
        first = tok.get_tokenizer(corpus, 50_257)
        assert hub.faults[0].times == 0 and hub.count("GET", f"resolve/{revision}/tokenizer.json") >= 2
        asked = len(hub.requests)
        again = tok.get_tokenizer(corpus, 50_257)
        assert len(hub.requests) == asked
    assert tok.tokenizer_hash(first) == tok.tokenizer_hash(again) == tok.tokenizer_hash(gpt2)
    assert first.encode_special_tokens and "300 tokens, those that the shards are in" in capsys.readouterr().out
    with pytest.raises(UserError, match="vocab_size=50257: the tokenizer has 300 tokens: use 300"):
        train.check_vocabulary(tiny(vocab_size=50_257), first)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_held_out_rows_of_tokens(corpus, tokenizer):
    """The first eval_tokens tokens of the held-out shard, and gzip's figure of their bytes, document by document."""
    held_out = tok.load_held_out(tokenizer, corpus, ROWS * 24 + 5, 24)
    tokens, raw = tokens_of(corpus.val)[: ROWS * 24 + 1], tok.token_byte_strings(tokenizer)
    np.testing.assert_array_equal(held_out.x.ravel(), tokens[:-1])
    np.testing.assert_array_equal(held_out.y.ravel(), tokens[1:])
    assert held_out.x.dtype == np.int32
    parts = [document for document in cut_documents(tokens) if len(document) > 1]
    cut = [part[i : i + LIMIT] for part in parts for i in range(0, len(part), LIMIT)]
    assert held_out.gzip_bpb == tok.gzip_bits_per_byte(b"".join(raw[i] for i in part) for part in cut if len(part) > 1)
    with pytest.raises(UserError, match="eval_tokens=432: the held-out shards have 420 tokens"):
        tok.load_held_out(tokenizer, corpus, 432, 24)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_on_tokens_resumes_to_the_last_bit(corpus, tokenizer, tmp_path):
    """A run that was interrupted and resumed ends as the one that was not; it samples up to <|endoftext|>."""
    config = tiny(packing="best-fit", num_iterations=9, eval_every=4, save_every=3)
    whole = train_tiny(corpus, tokenizer, tmp_path / "whole", config=config, prompts=["the"])
    assert whole.val_bpb > 0 and isinstance(whole.samples[0][1], str) and "<|endoftext|>" not in whole.samples[0][1]

    def stop(row):
        if row["step"] == 4 and "val_bpb" in row:
            raise KeyboardInterrupt

    cut = train_tiny(corpus, tokenizer, tmp_path / "cut", config=config, prompts=["the"], on_log=stop)
    assert cut.step == 4
    again = train_tiny(corpus, tokenizer, tmp_path / "cut", config=config, prompts=["the"])
    assert again.samples == whole.samples
    assert_same_end(again.run_dir, whole.run_dir)
