"""A small corpus, its tokenizer, a tiny Config and a run in one go, for the tests that train."""

import importlib
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compiled import keeping_compiled
from safetensors.numpy import load_file

from onechip import resume
from onechip.checkpoints import newest_checkpoint
from onechip.runfolder import RunFolder

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

VOCAB = 300
ROWS = 7  # of held-out tokens: no batch size but 1 and 7 divides it
# B 6 in microbatches of 2 | T 24 | D 16 | N 2 | K 1 | H 8 | L 2; evaluations at 8, 16, 24 and the end
TINY = {
    "n_head": 2, "n_kv_head": 1, "head_dim": 8, "aspect_ratio": 8, "vocab_size": VOCAB, "seq_len": 24,
    "attn_impl": "einsum", "dtype": "float32", "device_batch_size": 2, "total_batch_size": 6, "num_iterations": 26,
    "learning_rate": 1e-2, "eval_every": 8, "eval_tokens": ROWS * 24, "sample_every": 0, "keep": 99, "save_every": 6,
}  # fmt: skip
PROMPTS = ("the", "import self", "water")
TIMES = ("time", "tokens_per_second", "mfu", "rollouts/seconds")


def tiny(**changes):
    """The tiny Config with other fields."""
    return train.Config(**{**TINY, **changes})


# ----------------------------------------------------------------------------------------------------------------------
# A corpus small enough to pass through several times: 3 training shards of 2 to 3 row groups, about 20 batches

WORDS = "the of and energy light measure water plant number import return self value naïve 数据 <|bos|> 1024".split()


def write_documents(count, seed, longest):
    """Texts of 1 to `longest` words, one of them empty: a reader leaves it out, and must not lose count."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + ".\n" for _ in range(count)]
    texts[count // 2] = ""
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
    """300 tokens, trained on the corpus."""
    return tok.train_tokenizer((text for _, text in tok.read_documents(corpus.train)), VOCAB)


def texts_of(paths):
    """All documents, read without the code under test."""
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist() if text]


def pack(tokenizer, paths, epochs=1):
    """The token stream built independently: <|bos|> and the ids of each document, end to end."""
    bos = tokenizer.token_to_id("<|bos|>")
    once = [i for text in texts_of(paths) for i in [bos, *tokenizer.encode(text).ids]]
    return np.array(once * epochs)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def train_tiny(corpus, tokenizer, run_dir, *, config=None, prompts=(), model=train.GPT, **options):
    """Pretrains on the corpus in `run_dir`; returns the Result. config: tiny() if None; options are train()'s."""
    config = config or tiny()
    task = train.pretraining(config, corpus, tokenizer)
    sample = train.make_sample_writer(config, tokenizer, prompts, model)
    return train.train(config, task, run_dir, model=model, sample=sample, **options)


@pytest.fixture(scope="session")
def straight(corpus, tokenizer, tmp_path_factory, compiled_folder):
    """(Result, rows that on_log got) of 26 steps with nothing in between, beyond an epoch's end."""
    rows = []
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    with keeping_compiled(compiled_folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "git_commit", lambda: "a commit")
        result = train_tiny(corpus, tokenizer, run_dir, prompts=PROMPTS, on_log=rows.append)
    return result, without_times(rows)


def without_times(rows):
    """Rows of metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def read_rows(run_dir):
    """metrics.jsonl of a run, without times."""
    return without_times(map(json.loads, RunFolder(run_dir).metrics.read_text().splitlines()))


def newest(run_dir):
    """The newest complete checkpoint of a run, or None."""
    return newest_checkpoint(RunFolder(run_dir).checkpoints)


def list_checkpoints(run_dir):
    """What is in a run's folder of checkpoints, sorted names."""
    return sorted(path.name for path in RunFolder(run_dir).checkpoints.iterdir())


def read_record(run_dir):
    """state.json of a run's newest checkpoint."""
    return json.loads((newest(run_dir) / "state.json").read_text())


def read_arrays(checkpoint, *names):
    """Arrays of a checkpoint's files by name: {"params.wte": (dtype, shape, bytes), ...}."""
    files = {name: load_file(Path(checkpoint) / f"{name}.safetensors") for name in names or ("params", "opt")}
    return {f"{k}.{name}": (a.dtype, a.shape, a.tobytes()) for k, file in files.items() for name, a in file.items()}


def assert_same_end(run_dir, straight_dir):
    """The same metrics, step, parameters, optimizer state and best score, to the last bit.

    Not compared: where the stream was cut, and what the run was started from.
    """
    assert read_rows(run_dir) == read_rows(straight_dir)
    ours, theirs = (read_arrays(newest(folder)) for folder in (run_dir, straight_dir))
    assert set(ours) == set(theirs) and [name for name in ours if ours[name] != theirs[name]] == []
    records = [{**read_record(folder), "stream": None, "made_from": None} for folder in (run_dir, straight_dir)]
    assert records[0] == records[1]


def is_one_line(said, most=400):
    """Whether a message is one line of a useful length."""
    return "\n" not in str(said) and 0 < len(str(said)) < most
