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
# From text to numbers: this notebook fetches documents, trains a byte-level BPE tokenizer on them, measures how far it
# compresses English, code and mathematics, and puts it into your own Hub repository. Everything later (the model, the
# sweep, the larger run) imports its documents and its tokens from here.
#
# | | Colab, TPU v6e | laptop, no network |
# |---|---|---|
# | data | FineWeb-Edu, 9 shards of 90 MB | the Python standard library, 11 MB |
# | vocabulary | 32,768 | 8,192 |
# | time | some minutes, most of it download | under a minute |
# | memory | 4 GB | 0.5 GB |
# | cost | no accelerator is used: any runtime will do | nothing |

# %% cellView="form"
# @title Opening cell, the same in every notebook
# On Colab: fetches the sibling files, installs what the image lacks, looks for the TPU. Elsewhere: finds the siblings.
REPOSITORY = "https://github.com/onechip/onechip"
REF = "main"  # @param {type:"string"}
# @markdown REF is the version of the sibling files: a branch, a tag or a full commit hash.
# @markdown In a copy of yours that must stay as it is, name the commit that `config.json` of its runs tells.


def open_notebook(repository, ref):
    """Makes the sibling files importable, without touching any package that is already installed."""
    import importlib.metadata
    import os
    import subprocess
    import sys
    from importlib.util import find_spec
    from pathlib import Path

    repository, ref = os.environ.get("ONECHIP_REPO", repository), os.environ.get("ONECHIP_REF", ref)
    on_colab = find_spec("google") is not None and find_spec("google.colab") is not None
    clone = Path(f"onechip-{ref}".replace("/", "-")).resolve()  # named after the ref: another ref, another folder
    folders = [f for f in (Path.cwd(), Path.cwd().parent, clone) if (f / "01_tokenizer.py").exists()]
    if not folders and not on_colab:
        raise RuntimeError(f"no 01_tokenizer.py here or one folder up: open this notebook in a clone of {repository}")
    if not folders:
        clone.mkdir(exist_ok=True)
        # fetch, not clone --branch: that takes no commit hash
        for step in (["init"], ["fetch", "--depth", "1", repository, ref], ["checkout", "FETCH_HEAD"]):
            command, asking = ["git", "-C", clone, step[0], "-q", *step[1:]], {"GIT_TERMINAL_PROMPT": "0"}
            git = subprocess.run(command, capture_output=True, text=True, env=os.environ | asking)
            if git.returncode:
                raise RuntimeError(f"cannot fetch {ref!r} of {repository}: {git.stderr.strip().partition(chr(10))[0]}")
    sys.path.insert(0, str((folders or [clone])[0]))
    if on_colab:
        for names in (("tiktoken",), ("tensorboard", "xprof", "wandb", "sweeps")):  # first what 01 cannot do without
            if missing := [name for name in names if find_spec(name) is None]:
                # Each installed version is a constraint, so that pip adds packages and replaces none.
                installed = "\n".join(f"{d.name}==={d.version}" for d in importlib.metadata.distributions())
                pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "/dev/stdin", *missing]
                if subprocess.run(pip, input=installed, text=True).returncode:
                    print(f"Going on without {', '.join(missing)}: pip could not install them beside what is here.")
        import common  # noqa: F401  (before jax: it keeps a libtpu that has no TPU quiet)

        # isort: split
        import jax

        if jax.default_backend() != "tpu":
            print("=" * 80, f"NO TPU: JAX found only {jax.default_backend().upper()}.", sep="\n")
            print("Choose Runtime > Change runtime type > v6e-1 TPU, then Run all again. Going on without one.")
            print("=" * 80)


if "__file__" not in globals():  # a kernel only: scripts and imports find their siblings by themselves
    open_notebook(REPOSITORY, REF)

# %% [markdown]
# ## Setup
#
# No JAX here: tokenizing is the CPU's work, so this notebook never takes hold of the chip (one process owns it, and
# that is 02's). The heavy lifting is done by libraries in Rust and C++, `tokenizers`, `tiktoken` and `pyarrow`; the
# Python around them only streams, and must stay above a million tokens a second for the chip not to wait.

# %%
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import platform
import random
import re
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from onechip.errors import UserError, first_line, say
from onechip.files import atomic_write
from onechip.hub import load_hub, try_again, upload_folder
from onechip.machine import has_tpu, home, read_secret
from onechip.plots import show_picture
from onechip.runlog import progress_bar
from onechip.settings import parse_settings, setting

# %% [markdown]
# ## Config
#
# `0` and `""` mean "decide by what is there": a machine with a TPU gets FineWeb-Edu and 32,768 tokens, any other the
# offline corpus and 8,192, because 2.5 million tokens of text cannot teach a model what 32,768 embeddings mean.
# Whatever was decided is printed in a line. In the notebook, override in the run cell at the end; in a terminal, with
# the same words: `uv run 01_tokenizer.py --data fineweb --vocab_size 32768`.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What 01 does when it is run."""

    data: str = setting("", "offline, fineweb, or the path of a folder of parquet shards; empty: by the machine")
    num_shards: int = setting(8, "training shards to download from FineWeb-Edu, 90 MB each")
    vocab_size: int = setting(0, "tokens in the vocabulary, the nine special ones included; 0: by the data")
    max_train_chars: int = setting(200_000_000, "characters that the tokenizer learns from, at most")
    hub_repo: str = setting("", "Hub repository to upload to; empty: <you>/onechip-tokenizer")


def choose_data(has_tpu: bool) -> str:
    """The source for a run that did not say what data it wants."""
    return "fineweb" if has_tpu else "offline"


def choose_vocab_size(source: str) -> int:
    """8,192 for the 11 MB of the offline corpus, 32,768 for anything else."""
    return 8_192 if source == "offline" else 32_768


def choose_settings(overrides: str = "") -> Settings:
    """Settings with nothing left open; says in a line what was chosen and why."""
    settings = Settings(**parse_settings(Settings, overrides=overrides)[0])
    data = settings.data or choose_data(has_tpu())
    vocab_size = settings.vocab_size or choose_vocab_size(data)
    data_why = "as set" if settings.data else f"as {'a' if has_tpu() else 'no'} TPU is here"
    vocab_why = "as set" if settings.vocab_size else "as suits this data"
    say(f"chosen: data {data} ({data_why}), vocab_size {vocab_size:,} ({vocab_why})")
    return dataclasses.replace(settings, data=data, vocab_size=vocab_size)


# %% [markdown]
# ## Data
#
# A corpus is a list of parquet shards with one string column, `text`. The last shard is held out: nothing is ever
# trained on it, neither the tokenizer nor the model. The layout is that of nanochat's datasets, with some 53,000
# documents in a shard and 1,000 or so in a row group.


# %%
MAX_CHARS_PER_DOC = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Parquet shards with a string column `text`; `name` and `revision` together say exactly which text."""

    name: str
    revision: str
    train: tuple[Path, ...]
    val: tuple[Path, ...]  # never trained on


# %% [markdown]
# A row group is the smallest part of a parquet file that can be read alone. Reading one at a time, and of it only the
# column `text`, keeps half a gigabyte in memory where whole shards would take nine (marin#4325). What is wrong with a
# shard is told here, once, in one line that names it.


# %%
def open_shard(path: Path) -> pq.ParquetFile:
    """Opens a parquet shard; UserError if it is missing, not parquet, cut short, or has no string column `text`."""
    try:
        shard = pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such shard") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({first_line(error)}); delete it, get it again") from None
    columns = shard.schema_arrow
    if "text" not in columns.names:
        raise UserError(f"{path}: has no column 'text', only {', '.join(map(repr, columns.names)) or 'none'}")
    kind = columns.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column 'text' must hold strings, here it holds {kind}")
    return shard


def read_texts(shard: pq.ParquetFile, group: int, path: Path) -> list[str | None]:
    """The texts of one row group; no other column is read from disk."""
    try:
        return shard.read_row_group(group, columns=["text"]).column("text").to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: row group {group} is damaged ({first_line(error)}); get the shard again") from None


Position = tuple[int, int, int]  # shard, row group, document in it


def read_documents(
    paths: Iterable[Path], start: Position = (0, 0, 0), max_chars: int = MAX_CHARS_PER_DOC
) -> Iterator[tuple[Position, str]]:
    """Yields (position of the next document, text) over all shards, once; empty documents are left out."""
    paths = tuple(paths)
    first_shard, first_group, first_document = start
    for s in range(first_shard, len(paths)):
        with open_shard(paths[s]) as shard:
            for g in range(first_group, shard.num_row_groups):
                texts = read_texts(shard, g, paths[s])
                after = (s, g + 1, 0) if g + 1 < shard.num_row_groups else (s + 1, 0, 0)
                for d in range(first_document, len(texts)):
                    if texts[d]:
                        yield (s, g, d + 1) if d + 1 < len(texts) else after, texts[d][:max_chars]
                first_document = 0
        first_group = 0


# %% [markdown]
# ### Offline: the standard library
#
# Every machine that runs Python holds some 11 MB of careful English and code: the standard library's sources,
# docstrings and comments included. Modules longer than 10,000 characters are cut into several documents, at blank lines
# before top-level statements where there are some, so no text is lost. The cut comes after the split: all pieces of one
# file are in the same shard, so no file is on both sides of the line between training and held-out text. Docstrings
# stay where they are: as documents of their own they would be in the corpus twice.


# %% cellView="form"
# @title The offline corpus
OFFLINE_FORMAT = 1  # part of the folder's name: raise it when the code below would write other shards
OFFLINE_SHARDS = 10  # of 1.1 MB; the last is held out
OFFLINE_ROW_GROUP = 64
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} | {
    "encodings"  # generated tables, each much like the next: with some of them in training, the held-out ones are easy
}


def find_sources(stdlib: Path) -> list[Path]:
    """The .py files under `stdlib`, sorted; no tests, installed packages, tables, or this machine's build settings."""
    paths = (path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    kept = (path for path in paths if not SKIPPED_FOLDERS & set(path.parts) and "_sysconfigdata" not in path.name)
    return [stdlib / path for path in sorted(kept)]


def split_source(text: str, max_chars: int = MAX_CHARS_PER_DOC) -> list[str]:
    """Cuts `text` into pieces of at most `max_chars`, at the best place in the second half of each; loses nothing."""
    pieces = []
    while len(text) > max_chars:
        cut = max_chars
        for place in (r"\n\n(?=\S)", r"\n\n", r"\n"):  # before a top-level statement, at a blank line, at a line
            ends = [match.end() for match in re.compile(place).finditer(text, max_chars // 2, max_chars)]
            if ends:
                cut = ends[-1]
                break
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def read_sources(paths: list[Path]) -> list[str]:
    """The documents of one shard, in an order that is random and always the same."""
    documents = []
    for path in paths:
        try:
            documents += split_source(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a handful of files in other encodings
    documents = [text for text in documents if text.strip()]
    random.Random(0).shuffle(documents)
    return documents


def write_shard(path: Path, documents: list[str], row_group_size: int) -> None:
    """Writes one parquet shard, whole or not at all."""
    with atomic_write(path) as part:
        pq.write_table(pa.table({"text": documents}), part, row_group_size=row_group_size, compression="zstd")


def offline_corpus(directory: Path | None = None) -> Corpus:
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


# %% [markdown]
# ### FineWeb-Edu
#
# Karpathy's shuffle of 100 billion tokens of FineWeb-Edu: 1,823 shards of 90 MB, each a fair sample of the whole, so
# eight of them are as good a start as any. The revision is pinned to a commit: the same number always names the same
# text. Eight shards come at a time, each with time-outs and a few retries, and a shard gets its name in the cache only
# once its SHA-256 is the one that the Hub lists. A run that was interrupted fetches only what is missing, and a second
# run asks the Hub nothing at all.


# %% cellView="form"
# @title Downloads: several at a time, checked, whole or not at all
FINEWEB_REPO = "karpathy/fineweb-edu-100b-shuffle"
FINEWEB_REVISION = "4c8f30d6756da75362432a4d5569e1b229263b71"
FINEWEB_LAST_SHARD = 1822  # held out
DOWNLOADS_AT_ONCE = 8


def list_shards(names: list[str], revision: str) -> dict:
    """What the Hub says of each shard: name -> RepoFile with size in bytes and SHA-256, in one request."""
    api = load_hub().HfApi(token=False)  # public data: no login, so no expired one can be in the way
    listed = try_again(
        lambda: api.get_paths_info(FINEWEB_REPO, names, revision=revision, repo_type="dataset"),
        f"{FINEWEB_REPO} at {revision[:12]}: cannot be downloaded",
    )
    listed = {file.path: file for file in listed}
    for name in names:
        if name not in listed:
            raise UserError(f"{name}: {FINEWEB_REPO} has no such shard at {revision[:12]}; choose another revision")
    return listed


def download_shard(name: str, directory: Path, revision: str, sha256: str | None) -> int:
    """Brings one shard to `directory`, whole, checked and under its own name, or not at all; returns its bytes."""
    hub = load_hub()

    def fetch():
        with atomic_write(directory / name) as part:
            hub.hf_hub_download(
                FINEWEB_REPO, name, repo_type="dataset", revision=revision, local_dir=part.parent, token=False
            )
            with open(part, "rb") as file:
                arrived = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 and arrived != sha256:
                raise OSError(f"SHA-256 {arrived[:12]} is not the Hub's {sha256[:12]}")
            try:
                open_shard(part).close()
            except UserError as error:
                raise UserError(str(error).replace(str(part), f"{name} of {FINEWEB_REPO}")) from None
            return part.stat().st_size

    return try_again(fetch, f"{name}: cannot be downloaded")


def fineweb_corpus(num_shards: int, directory: Path | None = None, revision: str = FINEWEB_REVISION) -> Corpus:
    """FineWeb-Edu: the first `num_shards` shards to train on and the dataset's last one held out; downloads once."""
    if not 1 <= num_shards <= FINEWEB_LAST_SHARD:
        raise UserError(f"num_shards must be 1 to {FINEWEB_LAST_SHARD}, not {num_shards}")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UserError(f"revision must be a commit of {FINEWEB_REPO} (40 hexadecimal digits), not {revision!r}")
    directory = Path(directory or home() / f"fineweb-edu-{revision[:12]}")
    names = [f"shard_{i:05d}.parquet" for i in [*range(num_shards), FINEWEB_LAST_SHARD]]
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        download_shards(missing, directory, revision)
    paths = [directory / name for name in names]
    for path in paths:
        open_shard(path).close()
    return Corpus(name="fineweb-edu", revision=revision, train=tuple(paths[:-1]), val=tuple(paths[-1:]))


def download_shards(names: list[str], directory: Path, revision: str) -> None:
    """Downloads several shards at a time under one progress bar; the first that fails stops the rest."""
    hub = load_hub()
    listed = list_shards(names, revision)
    size = sum(listed[name].size for name in names)
    say(f"download: {len(names)} shards, {size / 1e6:,.0f} MB, of {FINEWEB_REPO} at {revision[:12]} to {directory}")
    their_bars = not hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()  # one bar for all, in place of one for each
    pool = concurrent.futures.ThreadPoolExecutor(DOWNLOADS_AT_ONCE)
    try:
        jobs = []
        for name in names:
            sha256 = listed[name].lfs.sha256 if listed[name].lfs else None
            jobs.append(pool.submit(download_shard, name, directory, revision, sha256))
        with progress_bar(total=size, unit="B", unit_scale=True, desc="shards") as bar:
            for job in concurrent.futures.as_completed(jobs):
                bar.update(job.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if their_bars:
            hub.utils.enable_progress_bars()


# %% [markdown]
# ### A folder of your own
#
# Any folder of `*.parquet` files with a string column `text` will do, from two shards on: in the order of their names,
# the last is held out. Its revision is a hash of names, sizes and the last 64 KiB of each file, where parquet keeps its
# checksums and statistics, so a changed folder gets a tokenizer of its own.


# %% cellView="form"
# @title Your own shards, and which corpus is meant
def folder_corpus(path: Path | str) -> Corpus:
    """The parquet shards of a folder, the last one held out."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"data: {str(path)!r} is neither 'offline' nor 'fineweb' nor a folder of parquet shards")
    shards = sorted(path.glob("*.parquet"))
    if len(shards) < 2:
        raise UserError(f"{path}: holds {len(shards)} parquet shards; two or more are needed, the last is held out")
    digest = hashlib.sha256()
    for shard in shards:
        open_shard(shard).close()
        with open(shard, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**16))
            digest.update(f"{shard.name} {size} ".encode() + file.read())
    return Corpus(name=path.name, revision=digest.hexdigest()[:12], train=tuple(shards[:-1]), val=tuple(shards[-1:]))


def get_corpus(source: str, num_shards: int) -> Corpus:
    """The corpus that `source` names: "offline", "fineweb" or a folder; says in one line what it is and how much."""
    if source == "offline":
        corpus, what = offline_corpus(), "the Python standard library's own sources"
    elif source == "fineweb":
        corpus, what = fineweb_corpus(num_shards), "FineWeb-Edu, shuffled"
    else:
        corpus, what = folder_corpus(source), "your own folder"
    documents = [sum(count_rows(path) for path in paths) for paths in (corpus.train, corpus.val)]
    if not all(documents):
        raise UserError(f"data: {source!r} holds no documents; {documents[0]} to train on, {documents[1]} held out")
    say(
        f"data: {what} ({corpus.name} at {corpus.revision[:20]}): {documents[0]:,} documents in {len(corpus.train)} "
        f"training shards, {documents[1]:,} held out"
    )
    return corpus


def count_rows(path: Path) -> int:
    """Documents in a shard, from its footer."""
    with open_shard(path) as shard:
        return shard.metadata.num_rows


# %% [markdown]
# ## Tokenizer
#
# Byte-level BPE: the 256 bytes are tokens, and the commonest neighbours are merged until the vocabulary is full. A
# pattern first cuts text into words, numbers of at most two digits, punctuation and white space, and no merge crosses a
# cut. Pattern and special tokens are nanochat's; a vocabulary of 8,192 from 11 MB takes two seconds.


# %%
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>",  # the others are for chats, after pretraining
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


def train_tokenizer(documents: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Trains a byte-level BPE of exactly `vocab_size` tokens, special ones included; UserError if it cannot be."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size must be {smallest} or more (256 bytes and {len(SPECIAL_TOKENS)} special), not {vocab_size}"
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
    tokenizer.train_from_iterator(documents, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise UserError(f"vocab_size: the text gives {reached} tokens, not {vocab_size}; lower it or add text")
    tokenizer.encode_special_tokens = True  # "<|bos|>" in a document is seven characters, not a command
    return tokenizer


# %% [markdown]
# The file is `tokenizer.json`, in the format of the library that wrote it: no pickle, so it can be opened on any
# machine, and nothing in it can run. One switch is not part of the file: whether a special token spelled out in plain
# text becomes the special id. It must not, or any web page could end a document; so `load_tokenizer` sets it again, and
# `tokenizer_config.json`, by which `transformers` loads the tokenizer, says the same.


# %%
def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes tokenizer.json, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def export_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json for `tokenizers`, and beside it what `transformers.AutoTokenizer` asks for."""
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL_TOKENS[0]}
    settings |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}  # text stays text
    with atomic_write(folder / "tokenizer_config.json") as part:
        part.write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads tokenizer.json; UserError if it is missing, cannot be parsed or is not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no tokenizer; run 01_tokenizer to train one")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json ({first_line(error)}); delete it and run 01_tokenizer") from None
    absent = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if absent:
        raise UserError(f"{path}: has no special token {absent[0]!r}; delete it and run 01_tokenizer")
    size = tokenizer.get_vocab_size()
    if sorted(tokenizer.get_vocab().values()) != list(range(size)):
        raise UserError(f"{path}: its ids are not 0 to {size - 1}; delete it and run 01_tokenizer")
    try:
        fast_encoder(tokenizer)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: does not cut text into bytes as ours do; delete it and run 01_tokenizer") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of what decides the ids: vocabulary, merges, splitting, special tokens; layout does not count."""
    parsed = json.loads(tokenizer.to_str())
    decisive = [parsed["model"]["vocab"], parsed["model"]["merges"], parsed["pre_tokenizer"], parsed["added_tokens"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def count_chars(documents: Iterable[tuple[Position, str]], limit: int) -> Iterator[str]:
    """The texts of `documents`, up to the one that takes their sum to `limit` characters."""
    total = 0
    for _, text in documents:
        yield text
        total += len(text)
        if total >= limit:
            return


def get_tokenizer(corpus: Corpus, vocab_size: int, max_train_chars: int | None = None) -> Tokenizer:
    """The tokenizer of a corpus: the one trained before (on `max_train_chars`, if that is given), or a new one."""
    folder = tokenizer_folder(corpus, vocab_size)
    path, record = folder / "tokenizer.json", folder / "trained_on.json"
    known = None
    with contextlib.suppress(OSError, ValueError, KeyError):  # no record, or none that can be read: not known
        known = json.loads(record.read_text())["max_train_chars"]
    if path.exists() and max_train_chars in (None, known):
        tokenizer = load_tokenizer(path)
        if tokenizer.get_vocab_size() != vocab_size:
            raise UserError(f"{path}: holds {tokenizer.get_vocab_size()} tokens, not {vocab_size}; delete it")
        say(f"tokenizer: {vocab_size:,} tokens, trained on this corpus before ({path})")
        return tokenizer
    limit = max_train_chars or Settings().max_train_chars
    began = time.perf_counter()
    tokenizer = train_tokenizer(count_chars(read_documents(corpus.train), limit), vocab_size)
    save_tokenizer(tokenizer, path)
    with atomic_write(record) as part:
        part.write_text(json.dumps({"max_train_chars": limit, "corpus": corpus.name, "revision": corpus.revision}))
    seconds = time.perf_counter() - began
    say(f"tokenizer: {vocab_size:,} tokens, trained in {seconds:.1f} s as there was none for this corpus ({path})")
    return tokenizer


def tokenizer_folder(corpus: Corpus, vocab_size: int) -> Path:
    """Where the tokenizer of a corpus lives, under the shared home folder."""
    return home() / "tokenizers" / f"{corpus.name}-{corpus.revision[:20]}-{vocab_size}"


# %% [markdown]
# Encoding is the part that must keep up with the chip, and `tokenizers` spends 45 of 100 samples of it in its regular
# expressions. nanochat's way out is `tiktoken`, which cuts and merges alike from the same table: 2.5 times as many ids
# per CPU second, equal to the last one (a test compares). It only encodes, so training, decoding and the file stay
# with `tokenizers`, and so do texts above 100,000 characters: a million spaces in a row overflow `tiktoken`'s stack,
# and 100,000 of them take its version 0.9 three seconds.

# %%
LONG_TEXT = 100_000  # characters


@functools.lru_cache(maxsize=4)
def fast_encoder(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken's encoder for the vocabulary and pattern of a tokenizer; made once, in 5 ms for 8,192 tokens."""
    steps = json.loads(tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    (pattern,) = (step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
    ranks = {raw: i for i, raw in enumerate(token_byte_strings(tokenizer)) if raw}
    return tiktoken.Encoding("onechip", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, <|bos|> first; on all cores."""
    bos, short = tokenizer.token_to_id("<|bos|>"), [text for text in texts if len(text) <= LONG_TEXT]
    fast = iter(fast_encoder(tokenizer).encode_ordinary_batch(short, num_threads=os.cpu_count()))
    slow = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    return [[bos, *(next(fast) if len(text) <= LONG_TEXT else slow(text))] for text in texts]


# %% [markdown]
# Loss per token cannot be compared between tokenizers; bits per byte can, and need the bytes of each token. Counting
# them through the decoded string is a known trap: a token that ends within a character decodes to U+FFFD, which is
# three bytes whatever it stood for, and 193 of 32,768 tokens came out wrong in nanochat (its commit 2ce972a). A
# byte-level vocabulary spells each byte as one printable character, so the bytes can be read off the token itself.


# %%
def byte_alphabet() -> dict[str, int]:
    """character -> byte, as GPT-2 spells bytes: visible Latin-1 stands for itself, the others are U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_byte_strings(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; b"" for the special ones."""
    alphabet = byte_alphabet()
    special = set(tokenizer.get_added_tokens_decoder())
    tokens = (tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
    return [b"" if i in special else bytes(alphabet[char] for char in token) for i, token in enumerate(tokens)]


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int32: bytes per token id, 0 for the special ones."""
    return np.array([len(raw) for raw in token_byte_strings(tokenizer)], np.int32)


# %% [markdown]
# What should a model reach? gzip at its best, document by document, is the bar that needs no training: on the offline
# corpus 2.1 to 2.5 bits per byte.


# %%
def gzip_bits_per_byte(documents: Iterable[bytes]) -> float:
    """8 * compressed / raw bytes of `gzip -9`, each document by itself as a model would meet it."""
    compressed = raw = 0
    for document in documents:
        compressed += len(gzip.compress(document, 9, mtime=0))
        raw += len(document)
    if not raw:
        raise UserError("gzip: no held-out text to compress")
    return 8 * compressed / raw


# %% [markdown]
# ## Run
#
# Everything above only defined things. To change a setting, write it into `OVERRIDES` the way it would stand on a
# command line, say `"--data fineweb --num_shards 4"`, and run this cell and the ones below again. The first run on the
# offline corpus takes about four seconds.

# %%
OVERRIDES = ""  # @param ["", "--data offline", "--data fineweb --num_shards 8"] {allow-input: true}

if __name__ == "__main__":
    settings = choose_settings(OVERRIDES)
    hub_token = read_secret("HF_TOKEN")
    corpus = get_corpus(settings.data, settings.num_shards)
    tokenizer = get_tokenizer(corpus, settings.vocab_size, settings.max_train_chars)

# %% [markdown]
# ## Look
#
# How far does it compress text that it was not trained on? English and code are held-out documents; whose, the table
# says. Mathematics is written here: short worked problems in LaTeX with random numbers, 200 of them, so it shows what
# digits and symbols cost and is no sample of anybody's papers.


# %% cellView="form"
# @title English, code and mathematics to compress
def read_docstrings(sources: list[str]) -> list[str]:
    """The docstrings in Python sources, as plain English; sources that are cut within a statement are left out."""
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


def write_mathematics(count: int = 200, seed: int = 0) -> list[str]:
    """Worked problems in LaTeX with numbers drawn from `seed`: what a page of exercises looks like to a tokenizer."""
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


def held_out_samples(corpus: Corpus, max_documents: int = 1_000) -> dict[str, tuple[str, list[str]]]:
    """kind -> (source, texts), none of it trained on: English, code and mathematics."""
    documents = [text for _, (_, text) in zip(range(max_documents), read_documents(corpus.val), strict=False)]
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
# Compared with what? A byte is a token where there is no tokenizer: 1.0. Two more of our own vocabulary size are
# trained on the same text, one with GPT-2's pattern, one that cuts at white space only, so that the pattern is all that
# differs. The shortest output is not the aim by itself: white space alone wins on code, as `self.name` becomes one
# token, and pays with a vocabulary full of such compounds. Where `tiktoken` can load its tables, GPT-2 and GPT-4 are
# shown as well, at 50,257 and 100,277 tokens: larger vocabularies, which buy part of their lead.


# %% cellView="form"
# @title Tokenizers to compare with
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE_PATTERN = r"\s?\S+|\s+"


def count_with(tokenizer: Tokenizer):
    """texts -> number of tokens, without <|bos|>."""
    return lambda texts: sum(len(ids) - 1 for ids in encode_batch(tokenizer, texts))


def train_baselines(corpus: Corpus, vocab_size: int, max_train_chars: int) -> dict:
    """name -> token counter, for tokenizers of the same size from the same text with other patterns."""
    counters = {}
    for name, pattern in (("GPT-2's pattern", GPT2_PATTERN), ("white space only", SPACE_PATTERN)):
        texts = count_chars(read_documents(corpus.train), max_train_chars)
        counters[f"{name}, {vocab_size:,}"] = count_with(train_tokenizer(texts, vocab_size, pattern))
    return counters


def load_tiktoken(timeout: float = 30.0) -> dict:
    """name -> token counter of GPT-2 and GPT-4; empty, with a line that says why, where they cannot be had."""
    loaded = {}

    def load():
        for name, table in (("GPT-2, 50,257", "gpt2"), ("GPT-4, 100,277", "cl100k_base")):
            encoding = tiktoken.get_encoding(table)
            loaded[name] = lambda texts, e=encoding: sum(map(len, e.encode_ordinary_batch(texts)))

    # Its download has no time-out: a daemon thread can be left behind.
    thread = threading.Thread(target=load_quietly, args=(load,), daemon=True)
    thread.start()
    thread.join(timeout)
    if len(loaded) < 2:
        say("tiktoken cannot load its tables (no network?): GPT-2 and GPT-4 are not shown")
        return {}
    return loaded


def load_quietly(load) -> None:
    """Runs `load` and drops its error: what is missing afterwards says it."""
    with contextlib.suppress(Exception):
        load()


def measure_compression(counters: dict, samples: dict) -> dict[str, dict[str, float]]:
    """tokenizer -> kind of text -> UTF-8 bytes per token."""
    table = {"UTF-8 bytes, 256": dict.fromkeys(samples, 1.0)}
    for name, count in counters.items():
        table[name] = {}
        for kind, (_, texts) in samples.items():
            table[name][kind] = sum(len(text.encode()) for text in texts) / count(texts)
    return table


# %% cellView="form"
# @title Table and picture
def show_compression(table: dict[str, dict[str, float]], samples: dict) -> str:
    """The table as aligned text, higher is better, and where its columns come from."""
    width = max(map(len, table))
    lines = ["bytes per token".ljust(width) + "".join(f"{kind:>13}" for kind in samples)]
    for name, row in table.items():
        lines.append(name.ljust(width) + "".join(f"{row[kind]:13.2f}" for kind in samples))
    for kind, (source, texts) in samples.items():
        lines.append(f"{kind}: {source}, {sum(len(text.encode()) for text in texts) / 1e3:,.0f} kB")
    return "\n".join(lines)


def plot_compression(table: dict[str, dict[str, float]], samples: dict, path: Path) -> None:
    """Bars of bytes per token, grouped by kind of text, as a PNG; ours is the dark one."""
    from matplotlib.figure import Figure  # here, because importing it looks for fonts

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(table)
    colors = ["#d0d4da", "#1f4e79", "#6fa8dc", "#b4cfe8", "#e0a458", "#c97b2a"]
    for i, (name, row) in enumerate(table.items()):
        places = [k + (i - (len(table) - 1) / 2) * width for k in range(len(samples))]
        bars = axes.bar(places, [row[kind] for kind in samples], width * 0.92, label=name, color=colors[i])
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(samples)), [f"{kind}\n({source})" for kind, (source, _) in samples.items()], fontsize=9)
    axes.set_ylabel("UTF-8 bytes per token")
    axes.set_title("Compression of held-out text: longer bars, fewer tokens", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=len(table) if len(table) < 5 else 3, frameon=False, fontsize=9)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png")


# %%
if __name__ == "__main__":
    folder = tokenizer_folder(corpus, settings.vocab_size)
    samples = held_out_samples(corpus)
    counters = {f"onechip, {settings.vocab_size:,}": count_with(tokenizer)}
    counters |= train_baselines(corpus, settings.vocab_size, settings.max_train_chars) | load_tiktoken()
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
    held_out = [text.encode() for _, (_, text) in zip(range(1_000), read_documents(corpus.val), strict=False)]
    say(f"gzip -9, document by document: {gzip_bits_per_byte(held_out):.3f} bits per byte of held-out text")

# %% [markdown]
# ## Save
#
# With a token (HF_TOKEN, as a Colab secret or in the environment) the tokenizer goes to a private repository of your
# own on the Hub, half a megabyte at 8,192 tokens, in a single commit with a short card. Without one, a line says so. A
# Colab's disk goes with its session; what is on the Hub stays.


# %% cellView="form"
# @title The card
def write_card(corpus: Corpus, vocab_size: int, table: str) -> str:
    """The README of the Hub repository: what this is, from which text, how well it compresses."""
    return (
        "---\nlicense: mit\nlibrary_name: tokenizers\ntags:\n- bpe\n- onechip\n---\n"
        f"# A byte-level BPE of {vocab_size:,} tokens\n\n"
        f"Trained by onechip's `01_tokenizer` on `{corpus.name}` at revision `{corpus.revision}`, with nanochat's "
        "split pattern and special tokens. Load it with `transformers.AutoTokenizer.from_pretrained`, or with "
        "`tokenizers.Tokenizer.from_file`, and then set `encode_special_tokens = True` before encoding text that you "
        "did not write.\n\n![Bytes per token](compression.png)\n\n"
        f"```\n{table}\n```\n"
    )


# %%
if __name__ == "__main__":
    with atomic_write(folder / "README.md") as part:
        part.write_text(
            write_card(corpus, settings.vocab_size, show_compression(compression, samples)), encoding="utf-8"
        )
    export_tokenizer(tokenizer, folder)
    files = ["tokenizer.json", "tokenizer_config.json", "README.md", "compression.png"]
    upload_folder(folder, files, hub_token, settings.hub_repo, "onechip-tokenizer")
