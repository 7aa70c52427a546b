"""Corpora of the Hub while they arrive: the same tokens as from a folder, whatever is removed, damaged or away."""

import functools
import importlib
import itertools
import os
import shutil
import signal
import threading
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import tiny, train_tiny, write_documents
from hub import Fault, connected_hub
from test_01_tokens import write_raw

from onechip import hubclient, shards
from onechip.errors import UserError
from onechip.files import hash_file

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

pytestmark = pytest.mark.usefixtures("in_time")

REVISION, COUNT, BATCH = "c" * 40, 7, 57
TEXT = tok.Dataset("text", "Text", "someone/text", COUNT, REVISION)
TOKENS = tok.Dataset(
    "tokens", "Tokens", "someone/tokens", COUNT, REVISION, shard="t_{:03d}.bin", first=1, held_out="v_000.bin"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """{name: folder} with all shards of both data sets, of sizes that all differ."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("text", "tokens")}
    rng, bos = np.random.default_rng(0), tok.opening_id(tokenizer)
    for i in range(COUNT + 1):
        table = pa.table({"text": write_documents(9 + 2 * i, 50 + i, 12)})
        pq.write_table(table, folders["text"] / f"shard_{i:05d}.parquet", row_group_size=4)
        documents = [[bos, *rng.integers(20, 300, rng.integers(3, 40))] for _ in range(11 + i)]
        name = f"t_{i:03d}.bin" if i else "v_000.bin"
        write_raw(folders["tokens"] / name, np.concatenate(documents))
    return folders


@pytest.fixture(params=["text", "tokens"])
def dataset(request):
    return {"text": TEXT, "tokens": TOKENS}[request.param]


@pytest.fixture
def hub(monkeypatch, whole):
    monkeypatch.setattr(shards, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(shards, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(hubclient.load_hub().constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    with connected_hub(monkeypatch) as hub:
        for dataset in (TEXT, TOKENS):
            files = {path.name: path.read_bytes() for path in whole[dataset.name].iterdir()}
            hub.add_repo(dataset.repo, files, "dataset", commit=REVISION)
        yield hub


def make_disk_small(monkeypatch, corpus):
    """Has the disk of a Corpus room for four shards."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=100_000, free=20_000 + 3_900))
        corpus.train.plan(900)
    assert corpus.train.removes and corpus.train.ahead == 3
    return corpus


def local(dataset, whole):
    """The training shards in a folder that has them all."""
    return tuple(whole[dataset.name] / dataset.shard.format(dataset.first + i) for i in range(COUNT))


def batches(tokenizer, paths, packing, position=None):
    if packing == "stream":
        return tok.token_stream(tokenizer, paths, BATCH, position, docs_per_call=5)
    return tok.packed_rows(tokenizer, paths, 2, 30, position, waiting=7)


def same(pairs, others):
    """Whether two lists of (tokens, position) are equal to the last bit."""
    for (tokens, position), (other, place) in zip(pairs, others, strict=True):
        np.testing.assert_array_equal(tokens, other)
        assert position.keys() == place.keys()
        for name in position:
            np.testing.assert_array_equal(position[name], place[name])
    return True


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
@pytest.mark.parametrize("room", ["enough", "little"])
def test_what_arrives_is_what_a_folder_has(dataset, packing, room, hub, whole, tokenizer, tmp_path, monkeypatch):
    """Batches and positions of two epochs, to the last bit; where the disk is small, few shards are ever there."""
    corpus = tok.hub_corpus(dataset, COUNT, tmp_path)
    if room == "little":
        make_disk_small(monkeypatch, corpus)
    first, held_out = corpus.train.paths[0], corpus.val[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, held_out.name])
    want = list(
        itertools.takewhile(lambda pair: pair[1]["epoch"] < 2, batches(tokenizer, local(dataset, whole), packing))
    )
    assert len(want) > 15
    stream, got, most = batches(tokenizer, corpus.train, packing), [], 0
    for _ in want:
        got.append(next(stream))
        most = max(most, len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]))
    assert same(got, want)
    assert most == COUNT + 1 if room == "enough" else 3 <= most <= 5
    assert held_out.exists()


def test_a_resumed_run_fetches_only_from_where_it_is(dataset, hub, whole, tokenizer, tmp_path):
    """At shard 4: the held-out shard at the start, then 4 and on; and the very next tokens."""
    straight = list(itertools.islice(batches(tokenizer, local(dataset, whole), "stream"), 60))
    at = next(i for i, (_, position) in enumerate(straight) if position["shard"] == 4)
    corpus = tok.hub_corpus(dataset, COUNT, tmp_path, resumed=True)
    corpus.train.ahead = 1
    assert [path.name for path in tmp_path.iterdir()] == [corpus.val[0].name]
    stream = batches(tokenizer, corpus.train, "stream", straight[at][1])
    assert same(list(itertools.islice(stream, 5)), straight[at + 1 : at + 6])
    stream.close()
    for i in range(4):
        assert not hub.count("GET", f"cdn.*{corpus.train.paths[i].name}")
    assert hub.count("GET", f"cdn.*{corpus.train.paths[4].name}") == 1


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
@pytest.mark.parametrize("damage", ["cut", "gone", "bytes"])
def test_a_shard_damaged_or_gone_on_disk_is_fetched_again(
    dataset, packing, damage, hub, whole, tokenizer, tmp_path, capsys
):
    """While training goes on: one line, and not a token is lost, read twice or other."""
    corpus = tok.hub_corpus(dataset, COUNT, tmp_path)
    corpus.train.fetch(corpus.train.paths)
    capsys.readouterr()
    victim = corpus.train.paths[3]
    raw = bytearray(victim.read_bytes())
    if damage == "bytes":
        where = (
            pq.ParquetFile(victim).metadata.row_group(1).column(0).data_page_offset if dataset is TEXT else 1024 + 200
        )
        raw[where : where + 20] = b"\xff" * 20
    corpus_batches = batches(tokenizer, corpus.train, packing)
    got = [next(corpus_batches) for _ in range(2)]
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(raw[: len(raw) // 2] if damage == "cut" else raw)
    want = list(itertools.islice(batches(tokenizer, local(dataset, whole), packing), 40))
    got += itertools.islice(corpus_batches, 38)
    for (tokens, _), (other, _) in zip(got, want, strict=True):
        np.testing.assert_array_equal(tokens, other)
    assert hash_file(victim) == hash_file(whole[dataset.name] / victim.name)
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "downloading it again" in line]) == (damage != "gone")
    assert all(line.startswith("shards: ") and victim.name in line for line in said)


def test_what_the_hub_has_damaged_ends_in_a_line(hub, tokenizer, tmp_path):
    """A token that the tokenizer has not, and the same in the fresh download: refused as in a folder, by name."""
    name = "t_002.bin"
    files = hub.files(TOKENS.repo, "dataset")
    files[name] = files[name][:-2] + np.uint16(65_000).tobytes()
    corpus = tok.hub_corpus(TOKENS, COUNT, tmp_path)
    with pytest.raises(UserError, match=rf"{name}: token \d+ is 65000, and the tokenizer has only 300") as error:
        list(itertools.islice(batches(tokenizer, corpus.train, "stream"), 40))
    assert "\n" not in str(error.value) and hub.count("GET", f"cdn.*{name}") == 2


def test_two_runs_share_a_small_cache(dataset, hub, whole, tokenizer, tmp_path, monkeypatch):
    """Each removes what the other may need; both read all of two epochs, and nothing else happens."""
    want = [tokens for tokens, _ in itertools.islice(batches(tokenizer, local(dataset, whole), "stream"), 30)]
    corpora = [make_disk_small(monkeypatch, tok.hub_corpus(dataset, COUNT, tmp_path)) for _ in range(2)]
    errors, rng = [], np.random.default_rng(0)

    def read(corpus, pauses):
        try:
            stream = batches(tokenizer, corpus.train, "stream")
            for tokens, pause in zip(want, pauses, strict=True):
                np.testing.assert_array_equal(next(stream)[0], tokens)
                threading.Event().wait(pause)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, args=(corpus, rng.uniform(0, 0.05, 30))) for corpus in corpora]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert errors == [] and not any(reader.is_alive() for reader in readers)


def test_data_by_name_says_what_is_here(hub, whole, tmp_path, monkeypatch, capsys):
    """get_corpus needs two shards to say how many there are; 103 shards of fineweb10b, the first of which is 000001."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path))
    names = [tok.FINEWEB10B.held_out, *(f"fineweb_train_{i:06d}.bin" for i in range(1, 104))]
    shard = (whole["tokens"] / "t_001.bin").read_bytes()
    hub.add_repo(tok.FINEWEB10B.repo, dict.fromkeys(names, shard), "dataset", commit="d" * 40)
    corpus = tok.get_corpus("fineweb10b", 103)
    assert [path.name for path in corpus.train.paths] == names[1:] and corpus.revision == "d" * 40
    count = (len(shard) - 1024) // 2
    assert f"103 training shards, 1 of them here; {count:,} tokens held out" in capsys.readouterr().out
    assert hub.count("GET", "cdn") == 2
    with pytest.raises(UserError, match="num_shards=104: must be 1 to 103, as fineweb10b has them"):
        tok.get_corpus("fineweb10b", 104)
    tok.get_corpus("fineweb10b", 103, {"name": "fineweb10b", "revision": "d" * 40})
    assert hub.count("GET", "cdn") == 2 and hub.count("GET", "api/datasets/kjj0") == 1


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.slow
def test_a_run_waits_for_its_shard_and_saves_when_interrupted(
    hub, whole, tokenizer, tmp_path, monkeypatch, interruptible
):
    """The Hub goes away within a run: training uses what is here, waits, is interrupted and resumes to the same end."""
    monkeypatch.setattr(shards, "SAID_AFTER", 0.1)
    monkeypatch.setattr(shards, "AHEAD", 1)
    config = tiny(num_iterations=12, save_every=0, eval_every=0, eval_tokens=48)
    corpus = tok.Corpus(
        name="text", revision=REVISION, train=local(TEXT, whole), val=(whole["text"] / "shard_00007.parquet",)
    )
    straight = train_tiny(corpus, tokenizer, tmp_path / "straight", config=config)
    fetch = functools.partial(tok.hub_corpus, TEXT, COUNT, tmp_path / "cache")
    hub.faults = [Fault(method, "shard_0000[4-6]", status=503, times=10**6) for method in ("GET", "HEAD")]
    said, over = [], threading.Event()
    monkeypatch.setattr(shards, "say_above_bars", said.append)

    def interrupt():
        while not over.wait(0.05):
            if any("waits for" in line for line in said):
                return os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    cut = train_tiny(fetch(), tokenizer, tmp_path / "cut", config=config)
    over.set()
    assert 0 < cut.step < 12 and time.monotonic() - began < 30
    assert len([line for line in said if "cannot be downloaded" in line]) == 1
    hub.faults = []
    again = train_tiny(fetch(resumed=True), tokenizer, tmp_path / "cut", config=config)
    assert again.step == 12 and again.val_loss == straight.val_loss
