# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V6E1
#     machine_shape: hm
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/01_tokenizer.ipynb)
# # 01: documents and tokens
#
# From text to numbers. This notebook downloads documents, trains a byte-level BPE tokenizer on them, measures how well
# it compresses English, code and mathematics, and uploads it to your own Hub repository. Every later notebook imports
# its documents and tokens from here.
#
# | | Colab, TPU v6e | laptop, no network |
# |---|---|---|
# | data | FineWeb-Edu, 2 shards of 90 MB | the Python standard library, 11 MB |
# | vocabulary | 32,768 | 8,192 |
# | time | some minutes, most of it download | under a minute |
# | memory | 4 GB | 0.5 GB |
# | cost | no accelerator is used: any runtime will do | nothing |

# %% cellView="form"
# @title Opening cell, the same in every notebook
# On Colab: fetches the repository, installs what the image lacks, looks for the TPU. Elsewhere: finds the repository.
REPOSITORY = "https://github.com/onechip/onechip"
REF = "main"  # @param {type:"string"}
# @markdown REF is the version of the repository's files: a branch, a tag or a full commit hash. A notebook opened from
# @markdown GitHub uses the repository it was opened from, and the branch too unless you set another REF than `main`.
# @markdown To freeze your copy, set REF to the commit in its runs' config.json.


def opened_from():
    """(repository, ref) on github.com that Colab opened this notebook from; None if it does not say within 2 s."""
    import contextlib
    import json
    import os
    import re
    import sys
    from multiprocessing.pool import ThreadPool
    from urllib.parse import unquote
    from urllib.request import urlopen

    place = re.compile(r"(?a)fileId=(https://github\.com/\w[\w-]*/\w[\w.-]*)/blob/(\w[\w./+@-]*)/notebooks/\w+\.ipynb")
    with contextlib.suppress(Exception), ThreadPool(1) as pool:
        url = f"http://{os.environ['COLAB_JUPYTER_IP']}:{os.environ.get('KMP_TARGET_PORT', 9000)}/api/sessions"
        sessions = pool.apply_async(lambda: json.load(urlopen(url, timeout=2))).get(timeout=2)
        mine = [s for s in sessions if s["kernel"]["id"] in " ".join(sys.argv)]  # kernels start with -f kernel-ID.json
        names = [unquote(unquote(str(s.get(key)))) for s in mine or sessions for key in ("path", "name")]
        found = {match.groups() for match in map(place.fullmatch, names) if match}
        return found.pop() if len(found) == 1 else None


def open_notebook(repository, ref):
    """Makes the repository's files importable, without touching any package that is already installed."""
    import os
    import subprocess
    import sys
    from importlib.util import find_spec
    from pathlib import Path
    from urllib.parse import quote

    on_colab = find_spec("google") is not None and find_spec("google.colab") is not None
    folder = next((f for f in (Path.cwd(), Path.cwd().parent) if (f / "01_tokenizer.py").exists()), None)
    if not folder and not on_colab:
        raise RuntimeError(f"no 01_tokenizer.py here or one folder up: open this notebook in a clone of {repository}")
    if not folder:
        opened = None if "ONECHIP_REPO" in os.environ else opened_from()
        if opened:
            repository, ref = opened[0], opened[1] if ref == "main" else ref
        repository, ref = os.environ.get("ONECHIP_REPO", repository), os.environ.get("ONECHIP_REF", ref)
        if repository.startswith("-") or ref.startswith("-"):
            raise RuntimeError(f"REF={ref!r}, repository={repository!r}: neither may begin with a dash")
        print(f"Using {ref} of {repository},", "where this notebook is from." if opened else "as set here.")
        folder = Path(quote(".".join(repository.split("/")[-2:]) + f"@{ref}", safe="@")).resolve()
        if not (folder / "01_tokenizer.py").exists():
            folder.mkdir(exist_ok=True)
            # fetch, not clone --branch: that takes no commit hash
            for step in (["init"], ["fetch", "--depth", "1", repository, ref], ["checkout", "FETCH_HEAD"]):
                command, asking = ["git", "-C", folder, step[0], "-q", *step[1:]], {"GIT_TERMINAL_PROMPT": "0"}
                git = subprocess.run(command, capture_output=True, text=True, env=os.environ | asking)
                if git.returncode:
                    reason = git.stderr.strip().partition("\n")[0]
                    raise RuntimeError(f"cannot fetch {ref!r} of {repository}: {reason}")
    sys.path.insert(0, str(folder))
    if on_colab:
        from onechip.colab import prepare_colab

        prepare_colab()


if "__file__" not in globals():  # a kernel only: scripts and imports find their siblings by themselves
    open_notebook(REPOSITORY, REF)

# %% [markdown]
# ## What a tokenizer does
#
# A model reads numbers, not letters. Byte-level BPE starts with one token for each of the 256 bytes. It then merges
# the pair of neighbouring tokens that occurs most often into a new token, and repeats that until the vocabulary is
# full. Below it learns from three sentences: the more merges, the fewer tokens for the same words (a dot marks a
# boundary, an underscore a space).

# %%
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from onechip.machine import prepare, wants_a_look

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them


def show_merges(sentences, counts):
    """Prints the first sentence in tokens of a BPE trained on all of them, after each number of merges in `counts`."""
    for count in counts:
        toy = Tokenizer(models.BPE())
        toy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=alphabet, show_progress=False)
        toy.train_from_iterator(sentences, trainer)
        tokens = toy.encode(sentences[0]).tokens
        print(f"{count:2} merges, {len(tokens):2} tokens: {'·'.join(tokens).replace('Ġ', '_')}")


if LOOK:
    prepare()
    show_merges(["the cat sat on the mat", "the hat on the cat", "that cat is fat"], (0, 4, 8, 16))

# %% [markdown]
# ## Setup
#
# Tokenizing is the CPU's work: nothing here uses the TPU or GPU. Libraries in Rust and C++ do the heavy part
# (`tokenizers`, `tiktoken`, `pyarrow`). The Python around them only streams text, and has to supply more than a
# million tokens a second, or the chip waits.

# %%
import ast
import bisect
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import os
import platform
import random
import re
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tokenizers import Regex, decoders

from onechip.conversations import CHAT_SETTINGS, with_boundary, without_boundary
from onechip.download import download_file, is_commit, look_up_files, newest_revision
from onechip.errors import UserError, first_line, require, say
from onechip.files import atomic_write, hash_file, read_json_or_none, write_json, write_text
from onechip.hub import upload_folder
from onechip.hubclient import without_bars
from onechip.machine import has_tpu, home, read_secret
from onechip.plots import show_picture
from onechip.settings import check_fields, parse_settings, setting
from onechip.shards import DamagedShard, HubShards, following, local_paths
from onechip.tables import table

# %% [markdown]
# ## Config
#
# `0` and `""` mean "decide by the machine". With a TPU that is FineWeb-Edu and 32,768 tokens. Without one it is the
# offline corpus and 8,192 tokens: its 2.5 million tokens of text are too few to train 32,768 embeddings. What was
# decided is printed in a line. In the notebook, change settings in the run cell at the end; in a terminal, with the
# same words: `uv run 01_tokenizer.py --data fineweb --vocab_size 32768`.

# %%
LARGEST_VOCAB = 1_000_000  # four times the largest in use; far beyond it, the library fails for want of memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What 01 does when it runs."""

    data: str = setting("", "offline, fineweb, climbmix, or a folder of parquet shards; empty: by the machine")
    num_shards: int = setting(8, "training shards, 90 MB each: those that are read are downloaded", at_least=1)
    vocab_size: int = setting(
        0, "tokens in the vocabulary, special ones included; 0: by the data", at_least=0, at_most=LARGEST_VOCAB
    )
    max_train_chars: int = setting(200_000_000, "characters to train the tokenizer on", at_least=1)
    max_doc_chars: int = setting(10_000, "characters of each document that the tokenizer is trained on", at_least=1)
    hub_repo: str = setting("", "Hub repository for the tokenizer; empty: <you>/onechip-tokenizer")

    def __post_init__(self):
        check_fields(self)


def choose_data(tpu):
    """The data for a run that did not name any, with a TPU or without: "fineweb" or "offline"."""
    return "fineweb" if tpu else "offline"


def choose_vocab_size(data):
    """8,192 for the 11 MB of the offline corpus, 32,768 for anything else."""
    return 8_192 if data == "offline" else 32_768


def choose_settings(overrides=""):
    """Settings with nothing left open; prints in a line what was chosen and why."""
    settings = Settings(**parse_settings(Settings, overrides=overrides)[0])
    data = settings.data or choose_data(has_tpu())
    if data in DATASETS:
        check_shards(DATASETS[data], settings.num_shards)
    require(not is_tokenized(data), "data", data, "holds tokens already; a tokenizer is trained on text")
    vocab_size = settings.vocab_size or choose_vocab_size(data)
    data_why = "as set" if settings.data else f"{'a' if has_tpu() else 'no'} TPU is here"
    vocab_why = "as set" if settings.vocab_size else "suits this data"
    say(f"chosen: data {data} ({data_why}), vocab_size {vocab_size:,} ({vocab_why})")
    return dataclasses.replace(settings, data=data, vocab_size=vocab_size)


if LOOK:
    print(f"on this machine: {choose_data(has_tpu())}, {choose_vocab_size(choose_data(has_tpu())):,} tokens")

# %% [markdown]
# ## Data
#
# A corpus is a list of parquet shards with one string column, `text`. The last shard is held out: neither the
# tokenizer nor the model is ever trained on it. The layout is that of nanochat's datasets, with about 53,000 documents
# in a shard and about 1,000 in a row group. A large corpus is not here as a whole: `train[s]` is where shard s is, and
# is downloaded when somebody asks for it.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Shards of text (.parquet) or of tokens (.bin); `name` and `revision` together identify the text exactly."""

    name: str
    revision: str
    train: Sequence[Path]
    val: tuple[Path, ...]  # never trained on


# %% [markdown]
# A row group is the smallest part of a parquet file that can be read alone. Reading one at a time, and of it only the
# column `text`, keeps half a gigabyte in memory where whole shards would take nine (marin#4325). A damaged shard is
# reported in one line that names it.
#
# Each document comes with the position right after it, so another process can resume at the very next document. Every
# document is read whole, however long it is.


# %%
def open_shard(path):
    """Opens a parquet shard; UserError if it is missing, not parquet, cut short, or has not one string column `text`.

    Returns a pyarrow.parquet.ParquetFile.
    """
    try:
        shard = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DamagedShard(path, "there is no such shard") from None
    except (pa.ArrowException, OSError) as error:
        what = f"not a complete parquet file ({first_line(error)}); delete it and get it again"
        raise DamagedShard(path, what) from None
    columns = shard.schema_arrow
    count = columns.names.count("text")
    if count == 0:
        raise UserError(f"{path}: has no column 'text', only {', '.join(map(repr, columns.names)) or 'none'}")
    if count > 1:
        raise UserError(f"{path}: has {count} columns named 'text'; keep one and rename the others")
    kind = columns.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column 'text' must hold strings, here it holds {kind}")
    return shard


def read_texts(shard, group, path):
    """The texts of one row group, a list of str or None; no other column is read from disk."""
    try:
        return shard.read_row_group(group, columns=["text"]).column("text").to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedShard(path, f"row group {group} is damaged ({first_line(error)}); get the shard again") from None


def read_documents(paths, start=(0, 0, 0)):
    """Yields (position, text) for each document of all shards from `start` on, once; empty documents are left out.

    A position is (shard, row group, document in it), all int, and names the document after this one.
    """
    first_shard, first_group, first_document = start
    for s in range(first_shard, len(paths)):
        path = paths[s]
        with open_shard(path) as shard:
            for g in range(first_group, shard.num_row_groups):
                texts = read_texts(shard, g, path)
                after = (s, g + 1, 0) if g + 1 < shard.num_row_groups else (s + 1, 0, 0)
                for d in range(first_document, len(texts)):
                    if texts[d]:
                        yield (s, g, d + 1) if d + 1 < len(texts) else after, texts[d]
                first_document = 0
        first_group = 0


def write_shard(path, documents, row_group_size):
    """Writes strings as one parquet shard, completely or not at all."""
    with atomic_write(path) as part:
        pq.write_table(pa.table({"text": documents}), part, row_group_size=row_group_size, compression="zstd")


if LOOK:
    with tempfile.TemporaryDirectory() as scratch:
        write_shard(Path(scratch) / "shard.parquet", ["one", "two", "three"], row_group_size=2)
        print("documents and positions:", *read_documents([Path(scratch) / "shard.parquet"]))

# %% [markdown]
# ### Shards of tokens
#
# Text can also come as tokens that somebody else has made: then encoding costs nothing, and figures can be compared
# with theirs. The layout is modded-nanogpt's, a header of 256 int32 and then uint16 ids, 100 million of them in 200 MB.
# Each document is opened by GPT-2's `<|endoftext|>`; a document may go on in the next shard.
#
# A position here is (shard, 0, token in it). Files are read a million tokens at a time and not mapped into memory: one
# that is cut short while it is mapped would end the process without a word.


# %%
TOKENS_MAGIC, TOKENS_VERSION, HEADER = 20240520, 1, 256
TOKENS_AT_ONCE = 1 << 20  # that are read together, and the longest document: a longer one comes in parts of so many


def open_tokens(path):
    """(open file at its first token, number of tokens) of a .bin shard; UserError if it is missing, cut or no such."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise DamagedShard(path, "there is no such shard") from None
    except OSError as error:
        raise DamagedShard(path, f"cannot be read ({error.strerror})") from None
    try:
        size = os.fstat(file.fileno()).st_size
        header = np.fromfile(file, "<i4", HEADER).tolist() + [0, 0, 0]
        if tuple(header[:2]) != (TOKENS_MAGIC, TOKENS_VERSION):
            known = f"a shard of tokens begins with {TOKENS_MAGIC}, {TOKENS_VERSION}"
            raise DamagedShard(path, f"its header begins with {header[0]}, {header[1]}; {known}")
        here = (size - 4 * HEADER) / 2
        if here != header[2]:
            how = "cut short" if here < header[2] else "too long"
            raise DamagedShard(path, f"is {how}: {here:,.0f} tokens, its header says {header[2]:,}; get it again")
    except BaseException:
        file.close()
        raise
    return file, header[2]


def read_tokens(path, start=0):
    """Yields (offset, tokens), uint16, of a .bin shard from the token `start` on."""
    file, count = open_tokens(path)
    with file:
        file.seek(4 * HEADER + 2 * start)
        for at in range(start, count, TOKENS_AT_ONCE):
            wanted = min(TOKENS_AT_ONCE, count - at)
            try:
                tokens = np.fromfile(file, "<u2", wanted)
            except OSError as error:
                raise DamagedShard(path, f"cannot be read at token {at:,} ({first_line(error)})") from None
            if len(tokens) < wanted:
                raise DamagedShard(path, f"was cut short at token {at + len(tokens):,} while it was read")
            yield at, tokens


def check_tokens(tokenizer, tokens, path, at):
    """UserError if one of the tokens, which are those of a shard from `at` on, is not the tokenizer's."""
    size = tokenizer.get_vocab_size()
    if tokens.max(initial=0) >= size:
        i = int(np.argmax(tokens >= size))
        raise DamagedShard(path, f"token {at + i:,} is {tokens[i]}, and the tokenizer has only {size:,}")


def read_token_documents(tokenizer, paths, start=(0, 0, 0)):
    """Yields (position, tokens) for each document of all .bin shards from `start` on, once; uint16, its opening first.

    A position is (shard, 0, token in it) and names what comes next. Where the first shard begins within a document,
    and after TOKENS_AT_ONCE tokens of one, tokens come without an opening.
    """
    bos, parts, count = opening_id(tokenizer), [], 0  # of the document that is not complete
    first_shard, _, offset = start
    for s in range(first_shard, len(paths)):
        path, opened = paths[s], 0
        for at, tokens in read_tokens(path, offset):
            check_tokens(tokenizer, tokens, path, at)
            begin, cuts = 0, np.flatnonzero(tokens == bos).tolist()
            opened += len(cuts)
            for end in [*cuts, len(tokens)]:
                while count + end - begin >= TOKENS_AT_ONCE:
                    cut = begin + TOKENS_AT_ONCE - count
                    yield (s, 0, at + cut), np.concatenate([*parts, tokens[begin:cut]])
                    begin, parts, count = cut, [], 0
                parts.append(tokens[begin:end])
                count += end - begin
                if end < len(tokens) and count:
                    yield (s, 0, at + end), np.concatenate(parts)
                    parts, count = [], 0
                begin = end
        if not offset and not opened:
            raise UserError(f"{path}: no document in it begins with {opening_token(tokenizer)}, id {bos}")
        offset = 0
    if count:
        yield (len(paths), 0, 0), np.concatenate(parts)


def write_tokens(path, tokens):
    """Writes token ids below 65,536 as one .bin shard, completely or not at all."""
    with atomic_write(path) as part:
        header = np.zeros(HEADER, "<i4")
        header[:3] = TOKENS_MAGIC, TOKENS_VERSION, len(tokens)
        part.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def holds_tokens(paths):
    """Whether shards are of tokens and not of text."""
    return Path(local_paths(paths)[0]).suffix == ".bin"


def count_contents(path):
    """The number of documents in a shard of text, or of tokens in one of tokens; UserError for a bad one."""
    if holds_tokens([path]):
        file, count = open_tokens(path)
        file.close()
        return count
    with open_shard(path) as shard:
        return shard.metadata.num_rows


if LOOK:
    with tempfile.TemporaryDirectory() as scratch:
        write_tokens(Path(scratch) / "shard.bin", [256, 7, 8, 256, 9])
        print("a shard of", count_contents(Path(scratch) / "shard.bin"), "tokens")

# %% [markdown]
# ### Offline: the standard library
#
# Every machine with Python holds about 11 MB of careful English and code: the sources of the standard library.
#
# - Modules longer than 10,000 characters become several documents, cut at blank lines before top-level statements
#   where there are some. No text is lost.
# - All pieces of one file go to the same shard, so no file is in both training and held-out text.
# - Docstrings stay where they are. As documents of their own they would be in the corpus twice.


# %% cellView="form"
# @title The offline corpus
OFFLINE_FORMAT = 1  # part of the folder's name: raise it when the code below would write other shards
OFFLINE_SHARDS = 10  # of 1.1 MB; the last is held out
OFFLINE_ROW_GROUP = 64
OFFLINE_DOC_CHARS = 10_000
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} | {
    "encodings"  # generated tables, each much like the next: with some of them in training, the held-out ones are easy
}
SOURCE_CUTS = (r"\n\n(?=\S)", r"\n\n", r"\n")  # before a top-level statement, at a blank line, at a line


def find_sources(stdlib):
    """The .py files under `stdlib`, sorted; no tests, installed packages, tables, or this machine's build settings."""
    paths = (path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    kept = (path for path in paths if not SKIPPED_FOLDERS & set(path.parts) and "_sysconfigdata" not in path.name)
    return [stdlib / path for path in sorted(kept)]


def split_text(text, max_chars, cuts):
    """Yields pieces of at most `max_chars` characters that together are the text.

    cuts: regular expressions, best first. A piece ends right after the last match of the first one that matches in its
    second half; if none does, it has `max_chars`.
    """
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        found = ([match.end() for match in re.finditer(cut, text[start + max_chars // 2 : end])] for cut in cuts)
        end = next((start + max_chars // 2 + ends[-1] for ends in found if ends), end)
        yield text[start:end]
        start = end
    yield text[start:]


def read_sources(paths):
    """The documents of one shard, in an order that is random and always the same."""
    documents = []
    for path in paths:
        try:
            documents += split_text(path.read_text(encoding="utf-8"), OFFLINE_DOC_CHARS, SOURCE_CUTS)
        except UnicodeDecodeError:
            continue  # a handful of files in other encodings
    documents = [text for text in documents if text.strip()]
    random.Random(0).shuffle(documents)
    return documents


def offline_corpus(directory=None):
    """The standard library of the Python that runs this, as parquet shards that are written once."""
    revision = f"python{platform.python_version()}-{OFFLINE_FORMAT}"
    directory = Path(directory or home() / f"stdlib-{revision}")
    shards = [directory / f"shard_{i:05d}.parquet" for i in range(OFFLINE_SHARDS)]
    if not all(shard.exists() for shard in shards):
        stdlib = Path(sysconfig.get_path("stdlib"))
        sources = find_sources(stdlib)
        if len(sources) < OFFLINE_SHARDS:
            raise UserError(f"{stdlib}: {len(sources)} .py files are too few for a corpus; set data to a folder")
        random.Random(0).shuffle(sources)
        for i, shard in enumerate(shards):
            if not shard.exists():
                write_shard(shard, read_sources(sources[i::OFFLINE_SHARDS]), OFFLINE_ROW_GROUP)
    return Corpus(name="stdlib", revision=revision, train=tuple(shards[:-1]), val=tuple(shards[-1:]))


# %%
if LOOK:
    _, text = next(read_documents(offline_corpus().train))
    print(f"the first document has {len(text):,} characters and begins {text[:50]!r}")

# %% [markdown]
# ### FineWeb-Edu, ClimbMix and FineWeb in tokens
#
# Karpathy's shuffles of 100 billion tokens of FineWeb-Edu, in 1,823 shards of 90 MB, and of 400 billion of NVIDIA's
# ClimbMix, in 6,543, which is what nanochat trains on since March 2026. Each shard is a fair sample of the whole.
# `fineweb10b` is 10 billion of FineWeb in GPT-2's tokens, on which modded-nanogpt's records are run.
#
# - FineWeb-Edu's revision is pinned to a commit. The others' is looked up once, when it is first used on a machine, and
#   kept; a run that is resumed elsewhere brings the commit that it began with. The same number of shards of a revision
#   is always the same text.
# - Training begins as soon as the held-out shard and the first one are here: the others come while it runs, eight
#   ahead (`onechip/shards.py`). Where the disk is too small for all, each is deleted once it is read.
# - A shard gets its name in the cache only if its SHA-256 is the one that the Hub lists, and one that is there is used
#   without asking. If the Hub goes away in the meantime, a line says so, and training waits only for the very shard
#   that it needs.


# %%
class Dataset(NamedTuple):
    """Shards on the Hub, numbered from `first` on; held_out: the one never trained on, "" if number last_shard is.

    last_shard: how many there are to train on. revision: a commit; empty for the newest one when it is first asked for.
    """

    name: str
    title: str
    repo: str
    last_shard: int
    revision: str = ""
    shard: str = "shard_{:05d}.parquet"
    first: int = 0
    held_out: str = ""


FINEWEB = Dataset(
    "fineweb-edu", "FineWeb-Edu, shuffled", "karpathy/fineweb-edu-100b-shuffle", 1822,
    "4c8f30d6756da75362432a4d5569e1b229263b71",
)  # fmt: skip
CLIMBMIX = Dataset("climbmix", "ClimbMix, shuffled", "karpathy/climbmix-400b-shuffle", 6542)
FINEWEB10B = Dataset(
    "fineweb10b", "FineWeb in GPT-2's tokens", "kjj0/fineweb10B-gpt2", 103,
    shard="fineweb_train_{:06d}.bin", first=1, held_out="fineweb_val_000000.bin",
)  # fmt: skip
DATASETS = {"fineweb": FINEWEB, "climbmix": CLIMBMIX, "fineweb10b": FINEWEB10B}  # by what --data calls them


def check_shards(dataset, num_shards):
    """UserError unless a dataset has that many shards to train on."""
    last = dataset.last_shard
    require(1 <= num_shards <= last, "num_shards", num_shards, f"must be 1 to {last}, as {dataset.name} has them")


def hub_corpus(dataset, num_shards, directory=None, revision="", resumed=False):
    """The first `num_shards` shards of a Dataset to train on, and its held-out one.

    Downloads the latter and, unless a run is resumed, the first one; the others when they are read. revision: a commit;
    empty: the dataset's own.
    """
    check_shards(dataset, num_shards)
    revision = revision or dataset.revision or newest_revision(dataset.name, dataset.repo)
    require(is_commit(revision), "revision", revision, f"must be a commit of {dataset.repo}, 40 hexadecimal digits")
    directory = Path(directory or home() / f"{dataset.name}-{revision[:12]}")
    names = [dataset.shard.format(dataset.first + i) for i in range(num_shards)]
    train = HubShards(dataset.repo, revision, names, directory, count_contents)
    held_out = directory / (dataset.held_out or dataset.shard.format(dataset.last_shard))
    needed = [held_out] if resumed else [train.paths[0], held_out]
    train.fetch(needed)
    for path in needed:
        count_contents(path)
    train.plan(held_out.stat().st_size)
    return Corpus(name=dataset.name, revision=revision, train=train, val=(held_out,))


if LOOK:
    for dataset in DATASETS.values():
        shards = list(home().glob(f"{dataset.name}-*/*{Path(dataset.shard).suffix}"))
        print(f"{dataset.title}: {len(shards)} of {dataset.last_shard + 1:,} shards are on this machine")

# %% [markdown]
# ### A folder of your own
#
# Any folder with two or more `*.parquet` files that have a string column `text` will do. In the order of their names,
# the last one is held out. Or one with two or more `*.bin` files of tokens: there `*_val_*.bin` is, if it has such, and
# a `tokenizer.json` next to them says what the tokens mean, if they are not GPT-2's.
#
# The revision is a hash of the names and of the whole content, so a changed folder gets a tokenizer of its own.
# Hashing takes a second per gigabyte; hashes are kept until a file's size or time stamps change.


# %% cellView="form"
# @title Your own shards, and which corpus is meant
def hash_shards(folder, paths):
    """{name: SHA-256, hex} of the files `paths` in `folder`; the unchanged ones from a note in the home folder."""
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    note = home() / "hashes" / f"{place}.json"
    known = read_json_or_none(note) or {}  # no note, or one that cannot be read: everything is hashed again
    fresh, hashes = {}, {}
    for path in paths:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        before = known.get(path.name)
        if isinstance(before, list) and before[:-1] == stamp:
            hashes[path.name] = before[-1]
        else:
            hashes[path.name] = hash_file(path)
        # One that was written just now could change again within the same time stamp.
        if time.time_ns() - max(stamp[1:]) > 2e9:
            fresh[path.name] = [*stamp, hashes[path.name]]
    if fresh != known:
        write_json(note, fresh)
    return hashes


def is_tokenized(source):
    """Whether the data that `source` names is of tokens: a key of DATASETS, or a folder of .bin shards."""
    if source in DATASETS:
        return DATASETS[source].shard.endswith(".bin")
    return source != "offline" and any(Path(source).expanduser().glob("*.bin"))


def folder_corpus(path):
    """The shards of a folder, of text or of tokens: the last one is held out, or those of tokens named *_val_*."""
    path = Path(path).expanduser()
    named = ", ".join(DATASETS)
    require(path.is_dir(), "data", str(path), f"is neither offline nor {named} nor a folder of shards")
    shards, kind = sorted(path.glob("*.parquet")), "parquet"
    if tokens := sorted(path.glob("*.bin")):
        if shards:
            raise UserError(f"{path}: holds {shards[0].name} and {tokens[0].name}; keep .parquet or .bin, not both")
        shards, kind = tokens, ".bin"
    val = [shard for shard in tokens if "_val_" in shard.name] or shards[-1:]
    train = [shard for shard in shards if shard not in val]
    if not train:
        raise UserError(f"{path}: holds {len(shards)} {kind} shards; two or more are needed, one of them is held out")
    for shard in shards:
        count_contents(shard)
    digest = hashlib.sha256(json.dumps(hash_shards(path, shards)).encode())
    return Corpus(name=path.name, revision=digest.hexdigest()[:12], train=tuple(train), val=tuple(val))


def get_corpus(source, num_shards, kept=None):
    """The Corpus that `source` names: "offline", a key of DATASETS or a folder; prints in one line what it is.

    kept: {"name", "revision"} of the data that a run began with: the revision of that name is the one to get.
    """
    if source == "offline":
        corpus, what = offline_corpus(), "the Python standard library's own sources"
    elif source in DATASETS:
        dataset, kept = DATASETS[source], kept or {}
        revision = kept.get("revision", "") if kept.get("name") == dataset.name else ""
        corpus = hub_corpus(dataset, num_shards, revision=revision, resumed=bool(revision))
        what = dataset.title
    else:
        corpus, what = folder_corpus(source), "your own folder"
    say(f"data: {what} ({corpus.name} at {corpus.revision[:20]}): {describe_contents(corpus, source)}")
    return corpus


def describe_contents(corpus, source):
    """How much a Corpus holds, in words; UserError if that is nothing."""
    unit, val = "tokens" if holds_tokens(corpus.val) else "documents", sum(map(count_contents, corpus.val))
    paths = local_paths(corpus.train)
    if paths is not corpus.train:  # they come as they are needed
        here = sum(path.exists() for path in paths)
        return f"{len(paths)} training shards, {here} of them here; {val:,} {unit} held out"
    train = sum(map(count_contents, paths))
    require(train and val, "data", source, f"holds too few {unit}: {train} to train on, {val} held out")
    return f"{train:,} {unit} in {len(paths)} training shards, {val:,} held out"


# %%
if LOOK:
    same = folder_corpus(offline_corpus().train[0].parent)
    print(f"the offline corpus as a folder: {len(same.train)} training shards, revision {same.revision}")

# %% [markdown]
# ## Tokenizer
#
# As in the first cell, with two additions. A pattern first cuts text into words, numbers of at most two digits,
# punctuation and white space, and no merge crosses a cut. And nine special tokens are reserved. Pattern and special
# tokens are nanochat's. A vocabulary of 8,192 tokens from 11 MB takes two seconds.

# %%
BOS = "<|bos|>"  # begins every document
GPT2_BOS = "<|endoftext|>"  # and here where a tokenizer is not of this notebook: GPT-2's
SPECIAL_TOKENS = (
    BOS,
    "<|user_start|>",  # these and the following are for chats, after pretraining
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# nanochat's: GPT-4's, but \p{N}{1,2} where that has {1,3}, to spend fewer tokens on numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts, vocab_size, pattern=SPLIT_PATTERN):
    """Trains a byte-level BPE of exactly `vocab_size` tokens, special ones included, on an iterable of strings.

    Returns a tokenizers.Tokenizer; UserError if the size is out of range or the text gives fewer tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    require(
        smallest <= vocab_size <= LARGEST_VOCAB,
        "vocab_size",
        vocab_size,
        f"must be {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special tokens) to {LARGEST_VOCAB:,}",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    require(reached == vocab_size, "vocab_size", vocab_size, f"the text gives only {reached} tokens: lower it")
    tokenizer.encode_special_tokens = True  # "<|bos|>" in a document is seven characters, not a command
    return tokenizer


if LOOK:
    small = train_tokenizer((text for _, text in read_documents(offline_corpus().val)), 2_000)
    tokens = small.encode("return 1024 + x[0]  # bytes").tokens
    print("a vocabulary of 2,000:", "·".join(tokens).replace("Ġ", "_"))

# %% [markdown]
# What does it learn from? The first 200 million characters of the training shards, and of each document the first
# 10,000, so that a few very long ones do not decide the vocabulary. Both are settings, `max_train_chars` and
# `max_doc_chars`, and concern the tokenizer's training only: the model reads every document to its end.
#
# The file is `tokenizer.json`, in the format of the library that wrote it: no pickle, so nothing in it can run. One
# switch is not part of the file: whether a special token that is spelled out in plain text becomes the special id. It
# must not, or any web page could end a document. `load_tokenizer` therefore sets the switch again, and
# `tokenizer_config.json` does so for `transformers`. A model that was trained on conversations is exported with their
# template as well, which needs the special tokens to be found in what it renders: there the template itself keeps
# what is spelled out in a message text.
#
# Shards of tokens come with a tokenizer of their own, GPT-2's unless a `tokenizer.json` lies next to them: 50,257
# tokens, of which `<|endoftext|>` opens a document, and none is for chats.


# %%
def opening_token(tokenizer):
    """The special token that opens a document, as text: <|bos|>, or <|endoftext|> in one of GPT-2's kind; else None."""
    return next((token for token in (BOS, GPT2_BOS) if tokenizer.token_to_id(token) is not None), None)


def opening_id(tokenizer):
    """The id of the token that opens a document."""
    return tokenizer.token_to_id(opening_token(tokenizer))


def save_tokenizer(tokenizer, path):
    """Writes tokenizer.json, completely or not at all."""
    write_text(path, tokenizer.to_str(pretty=True))


def export_tokenizer(tokenizer, folder, chat=False, **more):
    """Writes tokenizer.json for `tokenizers`, and next to it what `transformers.AutoTokenizer` needs.

    chat: with the template of conversations, for a model that was trained on some (onechip/conversations.py).
    more: further entries of tokenizer_config.json, such as eos_token or model_max_length.
    """
    save_tokenizer(with_boundary(tokenizer) if chat else tokenizer, folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": opening_token(tokenizer)}
    settings |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}  # text stays text
    write_json(folder / "tokenizer_config.json", {**settings, **(CHAT_SETTINGS if chat else {}), **more})


def load_tokenizer(path):
    """Reads tokenizer.json; UserError if it is missing, cannot be parsed or is neither ours nor like GPT-2's."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no tokenizer; run 01_tokenizer to train one")
    try:
        tokenizer = without_boundary(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json ({first_line(error)}); delete it and run 01_tokenizer") from None
    needed = SPECIAL_TOKENS if opening_token(tokenizer) != GPT2_BOS else ()
    absent = [token for token in needed if tokenizer.token_to_id(token) is None]
    if absent:
        raise UserError(f"{path}: has no special token {absent[0]!r}; delete it and run 01_tokenizer")
    size = tokenizer.get_vocab_size()
    if sorted(tokenizer.get_vocab().values()) != list(range(size)):
        raise UserError(f"{path}: its ids are not 0 to {size - 1}; delete it and run 01_tokenizer")
    try:
        fast_encoder(tokenizer)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: does not cut and merge text as ours do; delete it and run 01_tokenizer") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_hash(tokenizer):
    """SHA-256, hex, of what decides the ids: vocabulary, merges, splitting, special tokens; not the file's layout."""
    parsed = json.loads(tokenizer.to_str())
    decisive = [parsed["model"]["vocab"], parsed["model"]["merges"], parsed["pre_tokenizer"], parsed["added_tokens"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def training_texts(documents, max_train_chars, max_doc_chars):
    """Yields the start of each (position, text), up to the one that takes their sum to `max_train_chars`."""
    total = 0
    for _, text in documents:
        yield text[:max_doc_chars]
        total += min(len(text), max_doc_chars)
        if total >= max_train_chars:
            return


def tokenizer_folder(corpus, vocab_size):
    """Where the tokenizer of a corpus is kept, in the shared home folder."""
    return home() / "tokenizers" / f"{corpus.name}-{corpus.revision[:20]}-{vocab_size}"


def read_limits(record):
    """The limits that a tokenizer was trained with, by name; empty where its record cannot be read."""
    known = read_json_or_none(record)
    return {} if known is None else {"max_doc_chars": 10_000, **known}  # older records lack it: it was a constant


GPT2 = ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")


def tokenizer_of_tokens(folder):
    """The tokenizer of a folder's shards of tokens: the tokenizer.json there, or GPT-2's, downloaded once."""
    path, (repo, revision) = folder / "tokenizer.json", GPT2
    if not path.exists():
        path = home() / "tokenizers" / f"gpt2-{revision[:12]}" / "tokenizer.json"
    if not path.exists():
        say(f"download: {path.name} of {repo} at {revision[:12]} to {path.parent}")
        with without_bars():
            listed = look_up_files(repo, [path.name], revision, repo_type="model")[path.name]
            download_file(path, listed, repo, revision, load_tokenizer, repo_type="model")
    tokenizer = load_tokenizer(path)
    say(f"tokenizer: {tokenizer.get_vocab_size():,} tokens, those that the shards are in ({path})")
    return tokenizer


def get_tokenizer(corpus, vocab_size, max_train_chars=None, max_doc_chars=None):
    """The tokenizer of a corpus: the one trained before, if its limits are those that are given, or a new one.

    That of shards of tokens is given with them, whatever vocab_size says.
    """
    if holds_tokens(corpus.val):
        return tokenizer_of_tokens(corpus.val[0].parent)
    folder = tokenizer_folder(corpus, vocab_size)
    path, record = folder / "tokenizer.json", folder / "trained_on.json"
    known, asked = read_limits(record), {"max_train_chars": max_train_chars, "max_doc_chars": max_doc_chars}
    if path.exists() and all(limit in (None, known.get(name)) for name, limit in asked.items()):
        tokenizer = load_tokenizer(path)
        if tokenizer.get_vocab_size() != vocab_size:
            raise UserError(f"{path}: holds {tokenizer.get_vocab_size()} tokens, not {vocab_size}; delete it")
        say(f"tokenizer: {vocab_size:,} tokens, trained on this corpus before ({path})")
        return tokenizer
    default = Settings()
    limits = {name: getattr(default, name) if limit is None else limit for name, limit in asked.items()}
    began = time.perf_counter()
    tokenizer = train_tokenizer(training_texts(read_documents(corpus.train), **limits), vocab_size)
    save_tokenizer(tokenizer, path)
    write_json(record, {**limits, "corpus": corpus.name, "revision": corpus.revision})
    seconds = time.perf_counter() - began
    say(f"tokenizer: {vocab_size:,} tokens, trained in {seconds:.1f} s as there was none for this corpus ({path})")
    return tokenizer


if LOOK:
    spelled = small.encode(f"{BOS} in a text")
    print(f"{BOS} is id {small.token_to_id(BOS)}; spelled out in a text it is {spelled.ids[:4]}, as any other text")

# %% [markdown]
# ### Bytes
#
# Loss per token cannot be compared between tokenizers. Bits per byte can, and needs the number of bytes of each token.
#
# Counting the bytes of the decoded string is a known trap. A token that ends inside a character decodes to U+FFFD,
# which has three bytes, whatever the token stood for: in nanochat 193 of 32,768 tokens came out wrong (its commit
# 2ce972a). A byte-level vocabulary spells each byte as one printable character, so the bytes can be read off the token
# itself.


# %%
def byte_alphabet():
    """{character: byte}, as GPT-2 spells bytes: visible Latin-1 is itself, the others are U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_byte_strings(tokenizer):
    """The bytes of each id, a list of bytes; b"" for the special ones."""
    alphabet = byte_alphabet()
    special = set(tokenizer.get_added_tokens_decoder())
    tokens = (tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
    return [b"" if i in special else bytes(alphabet[char] for char in token) for i, token in enumerate(tokens)]


def token_byte_lengths(tokenizer):
    """(vocab_size,) int32: bytes of each token id, 0 for the special ones."""
    return np.array([len(raw) for raw in token_byte_strings(tokenizer)], np.int32)


if LOOK:
    lengths, ids = token_byte_lengths(small), small.encode(text).ids
    print(f"lengths {lengths.shape} {lengths.dtype}: {lengths[ids].sum():,} bytes; the text: {len(text.encode()):,}")

# %% [markdown]
# What should a model reach? `gzip -9`, document by document, is the bar that needs no training: 2.1 to 2.5 bits per
# byte on the offline corpus.


# %%
def gzip_bits_per_byte(documents):
    """8 * compressed / raw bytes of `gzip -9`, each document (bytes) by itself, as a model would see it."""
    compressed = raw = 0
    for document in documents:
        compressed += len(gzip.compress(document, 9, mtime=0))
        raw += len(document)
    if not raw:
        raise UserError("gzip: no held-out text to compress")
    return 8 * compressed / raw


if LOOK:
    print(f"this document: {gzip_bits_per_byte([text.encode()]):.2f} bits per byte")

# %% [markdown]
# ### Encoding
#
# Encoding has to keep up with the chip. `tokenizers` spends 45 of 100 samples of it in its regular expressions, and as
# much again in merging. `tiktoken` cuts and merges in the same way from the same table, and gives 2.5 times as many
# ids per CPU second, equal to the last one (a test compares). It only encodes: training, decoding and the file stay
# with `tokenizers`.
#
# A very long document is encoded in pieces of at most 50,000 characters, because a million spaces in a row overflow
# `tiktoken`'s stack. A piece ends before white space, where the pattern cuts anyway, so the ids are those of the whole
# text; only 25,000 characters without white space are cut anywhere. A document of 50 MB takes five seconds on two
# cores and half a gigabyte.

# %%
PIECE_CHARS = 50_000
PIECE_CUTS = (r"[^\W_](?=\s)", r"\S(?= )")  # after a letter or digit before white space, else before a blank


def split_pattern(parsed):
    """The regular expression that a tokenizer.json cuts text by; ValueError for one that tiktoken would not follow."""
    vocab, merges, cut = parsed["model"]["vocab"], parsed["model"]["merges"], parsed["pre_tokenizer"]
    made = dict.fromkeys(vocab["".join(pair)] for pair in merges)
    if parsed["normalizer"] or list(made) != sorted(made):  # tiktoken merges in the order of the ids
        raise ValueError("the text is changed first, or ids are not in the order of merges")
    if cut["type"] == "ByteLevel" and cut["use_regex"] and not cut["add_prefix_space"]:
        return GPT2_PATTERN
    (pattern,) = (step["pattern"]["Regex"] for step in cut["pretokenizers"] if step["type"] == "Split")
    return pattern


@functools.lru_cache(maxsize=4)
def fast_encoder(tokenizer):
    """tiktoken.Encoding for the vocabulary and pattern of a tokenizer; built once, in 5 ms for 8,192 tokens.

    ValueError, KeyError or TypeError for a tokenizer that does not work in the same way.
    """
    pattern = split_pattern(json.loads(tokenizer.to_str()))
    ranks = {raw: i for i, raw in enumerate(token_byte_strings(tokenizer)) if raw}
    return tiktoken.Encoding("onechip", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def encode_batch(tokenizer, texts):
    """Token ids of each text, a list of int with the opening one first; on all cores."""
    bos = opening_id(tokenizer)
    pieces = [list(split_text(text, PIECE_CHARS, PIECE_CUTS)) for text in texts]
    encode = fast_encoder(tokenizer).encode_ordinary_batch
    encoded = iter(encode([piece for text in pieces for piece in text], num_threads=os.cpu_count()))
    return [[bos, *itertools.chain.from_iterable(itertools.islice(encoded, len(text)))] for text in pieces]


if LOOK:
    (ids,) = encode_batch(small, [text])
    print(f"{len(text):,} characters, {len(ids):,} ids, equal to the slow ones:", ids[1:] == small.encode(text).ids)

# %% [markdown]
# ### One stream of tokens
#
# Training reads documents as one endless stream of tokens, each document opened by `<|bos|>`. Each piece comes with
# the stream's position right after it: epoch, shard, row group, document, and the tokens already made but not yet
# used. From there another process continues at the very next token.


# %%
def take_documents(documents, count, chars=1_000_000):
    """The next `count` (position, document) of an iterator, fewer once they have `chars` characters; [] at its end."""
    taken, total = [], 0
    for position, text in itertools.islice(documents, count):
        taken.append((position, text))
        total += len(text)
        if total >= chars:
            break
    return taken


BEGINNING = {"epoch": 0, "shard": 0, "row_group": 0, "document": 0}


def check_position(position, vocab_size, packed=False):
    """UserError, one line, unless a position is None or one that a stream, or packed rows, can have given.

    It comes from a checkpoint, which may have been written by anybody.
    """
    if position is None:
        return
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
    remedy = "of the newest checkpoint: no place in the data; move that one elsewhere, and an older one is used"
    refuse = lambda good, name, value: require(good, f"position, {name}", value, remedy)
    for name in (*BEGINNING, *(("packed", "dropped") if packed else ()), *(("step",) if "step" in position else ())):
        refuse(whole(position.get(name)), name, position.get(name))
    for name in ("tokens", "lengths") if packed else ("tokens",):
        array = position.get(name)
        sound = isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype.kind in "iu"
        refuse(sound, name, array if array is None else f"{type(array).__name__} {np.shape(array)}")
    last = int(position["tokens"].max(initial=0))
    refuse(position["tokens"].min(initial=0) >= 0 and last < vocab_size, "tokens", last)
    if packed:
        lengths = position["lengths"]
        fit = lengths.min(initial=1) > 0 and lengths.sum() == len(position["tokens"])
        refuse(fit, "lengths", f"the sum {lengths.sum()} of {len(position['tokens'])} tokens")
    log = position.get("log", {})
    numbers = isinstance(log, dict) and all(type(value) in (int, float) for value in log.values())
    refuse(numbers, "log", log)


def reader_of(tokenizer, paths):
    """(read, encode): read(paths, start) yields (position, document), encode(documents) gives the ids of each."""
    if holds_tokens(paths):
        return functools.partial(read_token_documents, tokenizer), list
    return read_documents, functools.partial(encode_batch, tokenizer)


def encoded_documents(tokenizer, paths, place, needed, docs_per_call=32):
    """Yields (documents, place) without end: a list of int32 arrays, <|bos|> first, and the place right after them.

    place: as BEGINNING has it. 32 documents a call are enough for the encoder's threads, and few enough to have tokens
    early. A shard of the Hub that is damaged is downloaded again, and read on at the very next document. UserError if a
    whole epoch has no more than `needed` tokens.
    """
    epoch, *start = (place[name] for name in BEGINNING)
    (read, encode), start = reader_of(tokenizer, paths), tuple(start)
    whole, seen = start == (0, 0, 0), 0
    with following(paths, start[0]) as shards:
        while True:
            documents = read(shards, start)
            try:
                while chunk := take_documents(documents, docs_per_call):
                    encoded = [np.asarray(ids, np.int32) for ids in encode([document for _, document in chunk])]
                    seen, start = seen + sum(map(len, encoded)), chunk[-1][0]
                    yield encoded, dict(zip(BEGINNING, (epoch, *start), strict=True))
            except DamagedShard as error:
                if shards is paths:
                    raise
                shards.recover(error)
                continue
            if whole and seen <= needed:
                raise UserError(f"the corpus has {seen:,} tokens, too few for one batch of {needed:,}: add documents")
            epoch, start, whole, seen = epoch + 1, (0, 0, 0), True, 0


def token_stream(tokenizer, paths, batch_tokens, position=None, docs_per_call=32):
    """Yields (tokens, position): int32 (batch_tokens + 1,), whose last token opens the next batch.

    position: a place, and "tokens", an int32 array of those left over.
    """
    position = position or {**BEGINNING, "tokens": []}
    place, left = {name: position[name] for name in BEGINNING}, np.asarray(position["tokens"], np.int32)
    documents = encoded_documents(tokenizer, paths, place, batch_tokens, docs_per_call)
    while True:
        while len(left) > batch_tokens:
            batch, left = left[: batch_tokens + 1], left[batch_tokens:]
            yield batch, {**place, "tokens": left}
        encoded, place = next(documents)
        left = np.concatenate([left, *encoded])


# %% [markdown]
# ### Rows of whole documents
#
# A stream cut into rows begins most of them in the middle of a document. nanochat packs: every row begins with
# `<|bos|>`, and of a thousand waiting documents the longest that still fits is put into it, again and again. Where none
# fits, the shortest is cut to the room that is left, and its rest is dropped. A token then never sees half a sentence
# as its whole past; the price is the text that is dropped, a third of FineWeb's at 2,048 tokens a row. The waiting
# documents are part of the position, so this resumes as exactly as the stream.

# %%
WAITING = 1_000  # documents to choose from


def packed_rows(tokenizer, paths, rows, length, position=None, waiting=WAITING):
    """Yields (tokens, position): int32 (rows, length), each row beginning with a document.

    position: a place; "tokens" and "lengths", int32, of the documents that wait, shortest first; how many tokens were
    "packed" and "dropped" so far; and the "log" of a run, their share.
    """
    position = position or {**BEGINNING, "tokens": [], "lengths": [], "packed": 0, "dropped": 0}
    place, packed, dropped = {name: position[name] for name in BEGINNING}, position["packed"], position["dropped"]
    lengths = np.asarray(position["lengths"], np.int64)
    held = [piece for piece in np.split(np.asarray(position["tokens"], np.int32), np.cumsum(lengths)) if len(piece)]
    documents, bos = encoded_documents(tokenizer, paths, place, rows * length), opening_id(tokenizer)
    while True:
        batch = np.empty((rows, length), np.int32)
        for row in batch:
            filled = 0
            while filled < length:
                while len(held) < waiting:
                    encoded, place = next(documents)
                    for document in encoded:
                        if document[0] == bos:
                            bisect.insort(held, document, key=len)
                        else:  # the rest of one that was opened in a shard before the first, or a million tokens ago
                            dropped += len(document)
                fits = bisect.bisect_right(held, length - filled, key=len)
                document = held.pop(max(0, fits - 1))
                part = document[: length - filled]
                row[filled : filled + len(part)] = part
                filled, dropped = filled + len(part), dropped + len(document) - len(part)
        packed += batch.size
        state = {"tokens": np.concatenate(held), "lengths": np.asarray(list(map(len, held)), np.int32)}
        counts = {"packed": packed, "dropped": dropped, "log": {"dropped_tokens": dropped / (packed + dropped)}}
        yield batch, {**place, **state, **counts}


if LOOK:
    packed, place = next(packed_rows(small, offline_corpus().train, 8, 257))
    openings = (packed == small.token_to_id(BOS)).sum(axis=1)
    print(f"documents begun in each row: {openings.tolist()}; {place['log']['dropped_tokens']:.0%} of tokens dropped")

# %% [markdown]
# The held-out set is a fixed number of tokens, cut into rows once, so that a run with another batch size is scored on
# the very same tokens.


# %%
class HeldOut(NamedTuple):
    """Validation rows x, y (R, T) int32, and the same text's bits per byte under gzip -9, document by document."""

    x: np.ndarray
    y: np.ndarray
    gzip_bpb: float


def load_held_out(tokenizer, corpus, eval_tokens, seq_len):
    """The first eval_tokens tokens of the held-out shards as a HeldOut of rows of seq_len; UserError if too few."""
    rows = max(1, eval_tokens // seq_len)
    needed = rows * seq_len + 1
    (read, encode), parts, total = reader_of(tokenizer, corpus.val), [], 0
    for _, document in read(corpus.val):
        parts.append(encode([document])[0])
        total += len(parts[-1])
        if total >= needed:
            break
    remedy = f"the held-out shards have {total:,} tokens: use at most that, less one sequence"
    require(total >= needed, "eval_tokens", eval_tokens, remedy)
    parts[-1] = parts[-1][: len(parts[-1]) - (total - needed)]
    raw = token_byte_strings(tokenizer)
    gzip_bpb = gzip_bits_per_byte(b"".join(raw[i] for i in ids) for ids in parts if len(ids) > 1)
    tokens = np.concatenate(parts).astype(np.int32)
    return HeldOut(tokens[:-1].reshape(rows, -1), tokens[1:].reshape(rows, -1), gzip_bpb)


if LOOK:
    pieces, place = zip(*itertools.islice(token_stream(small, offline_corpus().train, 1_000), 3), strict=True)
    after = {name: value for name, value in place[-1].items() if name != "tokens"}
    print(f"{len(pieces)} pieces of {len(pieces[0]):,} tokens; the stream is then at {after}")

# %% [markdown]
# ## Run
#
# Everything above defines things and shows them at work. Here the tokenizer itself is trained. To change a setting,
# write it into `OVERRIDES` as on a command line, for example `"--data fineweb --num_shards 4"`, and run this cell and
# those below again. On the offline corpus the first run takes about four seconds.

# %%
OVERRIDES = ""  # @param ["", "--data offline", "--data fineweb --num_shards 8"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    settings = choose_settings(OVERRIDES)
    hub_token = read_secret("HF_TOKEN")
    corpus = get_corpus(settings.data, settings.num_shards)
    tokenizer = get_tokenizer(corpus, settings.vocab_size, settings.max_train_chars, settings.max_doc_chars)

# %% [markdown]
# ## Look
#
# How far does it compress text that it was not trained on?
#
# - English and code are held-out documents; the table names their source.
# - Mathematics is generated here: 200 short worked problems in LaTeX with random numbers. It shows what digits and
#   symbols cost; it is no sample of real papers.


# %% cellView="form"
# @title English, code and mathematics to compress
def read_docstrings(sources):
    """The docstrings in Python sources, as plain English; sources that are cut inside a statement are left out."""
    found = []
    for source in sources:
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes, by newer Pythons
                nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        nodes = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        found += [text for text in map(ast.get_docstring, nodes) if text]
    return found


def write_mathematics(count=200, seed=0):
    """`count` worked problems in LaTeX with numbers drawn from `seed`, six texts each, like a page of exercises."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        a, b, c, n = (rng.randint(2, 99) for _ in range(4))
        texts += [
            rf"Solve $x^2 - {a + b}x + {a * b} = 0$. It factors as $(x - {a})(x - {b})$, so $x = {a}$ or $x = {b}$.",
            rf"Since ${a} \cdot {b} = {a * b}$ and ${a * b} + {c} = {a * b + c}$, we have "
            rf"${a * b + c} \equiv {c % a} \pmod{{{a}}}$.",
            rf"For $f(x) = {a}x^{{{n}}}$ the derivative is $f'(x) = {a * n}x^{{{n - 1}}}$, "
            rf"and $\int_0^1 f(x)\,dx = \frac{{{a}}}{{{n + 1}}} \approx {a / (n + 1):.4f}$.",
            rf"$\det\begin{{pmatrix}} {a} & {b} \\ {c} & {n} \end{{pmatrix}} = {a * n} - {b * c} = {a * n - b * c}$.",
            rf"\[ \sum_{{k=1}}^{{{n}}} k = \frac{{{n} \cdot {n + 1}}}{{2}} = {n * (n + 1) // 2} \]",
            rf"Let $X$ have mean $\mu = {a / 10}$ and variance $\sigma^2 = {b}$. By Chebyshev, "
            rf"$P(|X - \mu| \ge {c}) \le \sigma^2 / {c}^2 = {b / c**2:.3f}$.",
        ]
    return texts


def held_out_samples(corpus, max_documents=1_000):
    """{kind: (source, texts)} for English, code and mathematics, none of it trained on."""
    documents = [text for _, text in itertools.islice(read_documents(corpus.val), max_documents)]
    code = [text for _, text in read_documents(offline_corpus().val)]
    if corpus.name == "stdlib":
        english = ("held-out standard library, docstrings", read_docstrings(code))
    else:
        english = (f"held-out {corpus.name}", documents)
    return {
        "English": english,
        "code": ("held-out standard library, sources", code),
        "mathematics": ("worked problems in LaTeX, generated", write_mathematics()),
    }


# %% [markdown]
# Compared with what?
#
# - Bytes: where there is no tokenizer, a token is a byte, 1.0.
# - Two more of our own vocabulary size, trained on the same text: one with GPT-2's pattern, one that cuts at white
#   space only. The pattern is all that differs.
# - GPT-2's and GPT-4's own, where `tiktoken` can load their tables. With 50,257 and 100,277 tokens they are larger,
#   which buys part of their lead.
#
# The shortest output is not the aim by itself. White space alone wins on code, because `self.name` becomes one token,
# and pays with a vocabulary full of such compounds.

# %% cellView="form"
# @title Tokenizers to compare with
SPACE_PATTERN = r"\s?\S+|\s+"


def count_ids(tokenizer, texts):
    """The number of tokens in texts, without <|bos|>."""
    return sum(len(ids) - 1 for ids in encode_batch(tokenizer, texts))


def count_slowly(tokenizer, texts):
    """The same of any tokenizer, also of one that has merged a special token that is spelled out in its texts."""
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))


def count_tiktoken_ids(encoding, texts):
    """The number of tokens in texts by one of tiktoken's own encodings."""
    return sum(map(len, encoding.encode_ordinary_batch(texts)))


def train_baselines(corpus, settings):
    """{name: function that counts the tokens in texts}, of the same size, from the same text, by other patterns."""
    counters = {}
    for name, pattern in (("GPT-2's pattern", GPT2_PATTERN), ("white space only", SPACE_PATTERN)):
        texts = training_texts(read_documents(corpus.train), settings.max_train_chars, settings.max_doc_chars)
        other = train_tokenizer(texts, settings.vocab_size, pattern)
        counters[f"{name}, {settings.vocab_size:,}"] = functools.partial(count_slowly, other)
    return counters


def load_tiktoken(timeout=30.0):
    """{name: function that counts the tokens in texts} of GPT-2 and GPT-4; empty if they cannot be loaded in time."""
    tables = {"GPT-2, 50,257": "gpt2", "GPT-4, 100,277": "cl100k_base"}
    try:
        with ThreadPool(1) as pool:  # the download has no time-out of its own: its thread may stay
            encodings = pool.apply_async(lambda: list(map(tiktoken.get_encoding, tables.values()))).get(timeout)
    except Exception:  # of tiktoken, requests, or the time-out
        say("tiktoken cannot load its tables (no network?): GPT-2 and GPT-4 are not shown")
        return {}
    counters = (functools.partial(count_tiktoken_ids, encoding) for encoding in encodings)
    return dict(zip(tables, counters, strict=True))


def measure_compression(counters, samples):
    """{tokenizer: {kind of text: UTF-8 bytes per token}}."""
    compression = {"UTF-8 bytes, 256": dict.fromkeys(samples, 1.0)}
    for name, count in counters.items():
        compression[name] = {
            kind: sum(len(text.encode()) for text in texts) / count(texts) for kind, (_, texts) in samples.items()
        }
    return compression


# %% cellView="form"
# @title Table and picture
def show_compression(compression, samples):
    """The table as aligned text, where higher is better, and below it the source of each column."""
    rows = [[name, *(f"{row[kind]:.2f}" for kind in samples)] for name, row in compression.items()]
    lines = [table(rows, heads=["bytes per token", *samples], align="< >11")]
    for kind, (source, texts) in samples.items():
        lines.append(f"{kind}: {source}, {sum(len(text.encode()) for text in texts) / 1e3:,.0f} kB")
    return "\n".join(lines)


def plot_compression(compression, samples, path):
    """Writes bars of bytes per token, grouped by kind of text, as a PNG; ours is the dark one."""
    from matplotlib.figure import Figure  # here, because importing it looks for fonts

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(compression)
    colors = ["#d0d4da", "#1f4e79", "#6fa8dc", "#b4cfe8", "#e0a458", "#c97b2a"]
    for i, (name, row) in enumerate(compression.items()):
        places = [k + (i - (len(compression) - 1) / 2) * width for k in range(len(samples))]
        bars = axes.bar(places, [row[kind] for kind in samples], width * 0.92, label=name, color=colors[i])
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(samples)), [f"{kind}\n({source})" for kind, (source, _) in samples.items()], fontsize=9)
    axes.set_ylabel("UTF-8 bytes per token")
    axes.set_title("Compression of held-out text: longer bars, fewer tokens", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    columns = len(compression) if len(compression) < 5 else 3
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png")


# %%
if __name__ == "__main__":
    folder = tokenizer_folder(corpus, settings.vocab_size)
    samples = held_out_samples(corpus)
    counters = {f"onechip, {settings.vocab_size:,}": functools.partial(count_ids, tokenizer)}
    counters |= train_baselines(corpus, settings) | load_tiktoken()
    compression = measure_compression(counters, samples)
    say(show_compression(compression, samples))
    plot_compression(compression, samples, folder / "compression.png")
    say(f"picture: {folder / 'compression.png'}")
    show_picture(folder / "compression.png")

# %% [markdown]
# A look at the tokens themselves, and the bar that a model has to pass.

# %%
if __name__ == "__main__":
    raw = token_byte_strings(tokenizer)
    example = "def halve(x):  # 1024 becomes 512, and <|bos|> is only text"
    say(" · ".join(raw[i].decode(errors="replace") or "BOS" for i in encode_batch(tokenizer, [example])[0]))
    say(f"bytes per token id: {np.mean(token_byte_lengths(tokenizer)):.2f} on average, {max(map(len, raw))} at most")
    held_out = [text.encode() for _, text in itertools.islice(read_documents(corpus.val), 1_000)]
    say(f"gzip -9, document by document: {gzip_bits_per_byte(held_out):.3f} bits per byte of held-out text")

# %% [markdown]
# ## Save
#
# With a token (HF_TOKEN, as a Colab secret or in the environment) the tokenizer goes to a private repository of your
# own on the Hub, in one commit with a short card: half a megabyte at 8,192 tokens. Without one, a line says so. A
# Colab's disk is deleted with its session; what is on the Hub stays.


# %% cellView="form"
# @title The card
def tokenizer_card(corpus, vocab_size, compression):
    """README.md of the Hub repository: what this is, from which text, how well it compresses (a table as text)."""
    return (
        "---\nlicense: mit\nlibrary_name: tokenizers\ntags:\n- bpe\n- onechip\n---\n"
        f"# A byte-level BPE of {vocab_size:,} tokens\n\n"
        f"Trained by onechip's `01_tokenizer` on `{corpus.name}` at revision `{corpus.revision}`, with nanochat's "
        "split pattern and special tokens. Load it with `transformers.AutoTokenizer.from_pretrained`, or with "
        "`tokenizers.Tokenizer.from_file`, and then set `encode_special_tokens = True` before encoding text that you "
        "did not write.\n\n![Bytes per token](compression.png)\n\n"
        f"```\n{compression}\n```\n"
    )


# %%
if __name__ == "__main__":
    card = tokenizer_card(corpus, settings.vocab_size, show_compression(compression, samples))
    write_text(folder / "README.md", card)
    export_tokenizer(tokenizer, folder)
    files = ["tokenizer.json", "tokenizer_config.json", "README.md", "compression.png"]
    upload_folder(folder, files, hub_token, settings.hub_repo, "onechip-tokenizer")
