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
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/02_train.ipynb)
# # Train a GPT on one chip
#
# One function, `train`, takes documents and a `Config` and leaves a trained GPT behind: a transformer in the manner
# of nanochat, four interchangeable attentions, AdamW, a prefetching loader, sampling, a profile and a checkpoint, all
# of it raw JAX that fits one screen at a time. The same file runs on a TPU v6e, a GPU, several chips and a laptop.
#
# | where | model | time | memory | cost |
# |---|---|---|---|---|
# | laptop, two cores, no network | 7M parameters, Python's own sources | 2.5 minutes | under 2 GB | nothing |
# | Colab, TPU v6e | 268M parameters, FineWeb-Edu | hours; goes on where it stopped | under 31.25 GiB | compute units |

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
# Nothing below runs on import: definitions come first and the few cells that do something stand under
# `if __name__ == "__main__":`. Documents and tokens come from `01_tokenizer`, imported under the name that says so.
#
# Shapes are written with nine letters, in comments and in lower case in einsums, as in *How to Scale Your Model*
# (Austin et al., 2025):
#
# | B | T | D | N | K | H | F | L | V |
# |---|---|---|---|---|---|---|---|---|
# | batch | sequence | model | query heads | key/value heads | head dimension | MLP hidden | layers | vocabulary |

# %%
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import queue
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import chip
import common
from common import UserError, require, say, setting

tok = importlib.import_module("01_tokenizer")

# %% [markdown]
# ## Config
#
# Every number that shapes the model or its training is a field here and nowhere else. `TrainConfig` holds what any
# model needs, `Config` adds the sizes of this one. One knob scales it: `n_head`. The width is `n_head * head_dim` and
# there is one layer per `aspect_ratio` channels of width, so 8 heads give 1024 channels, 16 layers and 268.4M
# parameters. A config that cannot run is refused when it is built, with the field, the value and the remedy. It is
# static to `jit`: change a field and the step is compiled anew. A run never goes on with another `fixed` field.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What training needs of any model. A model's Config adds n_head, n_kv_head, head_dim, n_embd, n_layer, mlp_dim."""

    vocab_size: int = setting(32768, "tokens in the vocabulary, the nine special ones included", fixed=True)
    seq_len: int = setting(2048, "tokens of context", fixed=True)
    window_pattern: str = setting(
        "SSSL", "attention per layer, tiled: S half the context, L all; the last layer is L", fixed=True
    )
    softcap: float = setting(15.0, "logits are bounded to +-softcap by tanh; 0 for no bound", fixed=True)
    rope_base: float = setting(10000.0, "longest rotary wavelength, in units of 2 pi tokens", fixed=True)
    attn_impl: str = setting(
        "pallas", "einsum (any device), jax (any device), splash (TPU) or pallas (TPU, our own kernels)"
    )
    dtype: str = setting("bfloat16", "compute type, bfloat16 or float32; master weights and moments stay float32")
    device_batch_size: int = setting(4, "sequences per microbatch and device")
    total_batch_size: int = setting(64, "sequences per step: device_batch_size * devices * accumulation", fixed=True)
    num_iterations: int = setting(20000, "optimizer steps")
    learning_rate: float = setting(7e-4, "peak learning rate")
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only")
    beta1: float = setting(0.9, "AdamW: decay of the first moment")
    beta2: float = setting(0.95, "AdamW: decay of the second moment")
    eps: float = setting(1e-8, "AdamW: added to the root of the second moment")
    grad_clip: float = setting(1.0, "largest global norm of the gradient; 0 for no clipping")
    warmup_ratio: float = setting(0.02, "share of the steps in which the learning rate rises from 0")
    warmdown_ratio: float = setting(0.5, "share of the steps, the last ones, in which it falls")
    final_lr_frac: float = setting(0.0, "what it falls to, as a share of learning_rate")
    eval_every: int = setting(250, "steps between evaluations; 0 for one at the end only")
    eval_tokens: int = setting(1 << 20, "held-out tokens of an evaluation, whatever the batch size")
    sample_every: int = setting(1000, "steps between samples; 0 for those at the end only")
    save_every: int = setting(1000, "steps between checkpoints; 0 for none but those that follow from the others")
    save_minutes: float = setting(15.0, "minutes between checkpoints at most; 0 for no such limit")
    keep: int = setting(2, "newest checkpoints that stay; the best one stays as well")
    param_seed: int = setting(42, "seed of the initial weights", fixed=True)
    loss_slice: int = setting(8192, "tokens whose logits exist at one time")

    @property
    def windows(self):
        """Keys that a query sees in each layer, itself included: (n_layer,) ints."""
        span = {"S": max(1, self.seq_len // 2), "L": self.seq_len}
        pattern = itertools.islice(itertools.cycle(self.window_pattern), self.n_layer - 1)
        return (*(span[letter] for letter in pattern), self.seq_len)

    def __post_init__(self):
        check_config(self)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Model and training parameters."""

    n_head: int = setting(8, "query heads; scales the model: n_embd = n_head * head_dim", fixed=True)
    n_kv_head: int = setting(0, "key/value heads, a divisor of n_head; 0 means as many as n_head", fixed=True)
    head_dim: int = setting(128, "channels per head; 128 fills half a v6e matrix unit, 256 all of it", fixed=True)
    aspect_ratio: int = setting(64, "channels per layer: n_layer = n_embd // aspect_ratio", fixed=True)

    @property
    def n_embd(self):
        return self.n_head * self.head_dim

    @property
    def n_layer(self):
        return self.n_embd // self.aspect_ratio

    @property
    def mlp_dim(self):
        return 4 * self.n_embd

    def __post_init__(self):
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        super().__post_init__()

    def check_sizes(self):
        """Raises UserError unless there is a whole number of layers."""
        require(self.aspect_ratio > 0, "aspect_ratio", self.aspect_ratio, "must be a positive integer")
        width = f"must be a multiple of aspect_ratio={self.aspect_ratio}, so that n_layer is whole"
        require(self.n_embd % self.aspect_ratio == 0, "n_embd = n_head * head_dim", self.n_embd, width)


# %% [markdown]
# The checks below read as rules. Those on `attn_impl` are the kernels' own: both work on blocks of at least 128 tokens,
# and ours holds a whole head in VMEM, 4096 tokens at 128 channels. Better refused here than after a download of 5 GB.


# %% cellView="form"
# @title Checks of a Config
def check_config(config):
    """Raises UserError for the first field of a Config that cannot work."""
    c = config
    for field in dataclasses.fields(c):
        value, kinds = getattr(c, field.name), {float: (float, int), int: (int,), str: (str,)}[field.type]
        fits = isinstance(value, kinds) and not isinstance(value, bool) and (field.type is str or math.isfinite(value))
        require(fits, field.name, value, f"must be a finite {field.type.__name__}")
    sizes = "n_head n_kv_head head_dim vocab_size seq_len device_batch_size total_batch_size keep"
    for name in f"{sizes} num_iterations eval_tokens loss_slice".split():
        require(getattr(c, name) > 0, name, getattr(c, name), "must be a positive integer")
    for name in ("rope_base", "learning_rate", "eps"):
        require(getattr(c, name) > 0, name, getattr(c, name), "must be greater than 0")
    require(0 <= c.softcap <= 60, "softcap", c.softcap, "must lie in [0, 60]: exp(softcap) summed must fit float32")
    for name in ("eval_every", "sample_every", "save_every", "save_minutes", "grad_clip", "weight_decay"):
        require(getattr(c, name) >= 0, name, getattr(c, name), "must not be negative")
    for name in ("beta1", "beta2"):
        require(0 <= getattr(c, name) < 1, name, getattr(c, name), "must lie in [0, 1)")
    for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac"):
        require(0 <= getattr(c, name) <= 1, name, getattr(c, name), "must lie in [0, 1]")
    ramps = c.warmup_ratio + c.warmdown_ratio
    require(ramps <= 1, "warmup_ratio + warmdown_ratio", ramps, "must not exceed 1")
    require(c.n_head % c.n_kv_head == 0, "n_kv_head", c.n_kv_head, f"must divide n_head={c.n_head}")
    require(c.head_dim % 2 == 0, "head_dim", c.head_dim, "must be even: RoPE turns pairs of channels")
    c.check_sizes()
    letters = bool(c.window_pattern) and set(c.window_pattern) <= {"S", "L"}
    require(letters, "window_pattern", c.window_pattern, 'use the letters S and L, such as "SSSL" or "L"')
    require(c.dtype in ("bfloat16", "float32"), "dtype", c.dtype, "use bfloat16 or float32")
    batches = f"must be a multiple of device_batch_size={c.device_batch_size}"
    require(c.total_batch_size % c.device_batch_size == 0, "total_batch_size", c.total_batch_size, batches)
    check_attention(config)


def check_attention(config):
    """Raises UserError if the attention implementation cannot do what the Config asks of it."""
    c = config
    require(c.attn_impl in ATTENTIONS, "attn_impl", c.attn_impl, f"use one of {', '.join(ATTENTIONS)}")
    if c.attn_impl in ("splash", "pallas"):
        blocks = f"attn_impl={c.attn_impl!r} works on blocks of 128 tokens: use a multiple of 128, or attn_impl='jax'"
        require(c.seq_len % 128 == 0, "seq_len", c.seq_len, blocks)
    if c.attn_impl == "pallas":
        import kernels

        lanes = "attn_impl='pallas' works on 128 channels at a time: use a multiple of 128, or attn_impl='splash'"
        require(c.head_dim % 128 == 0, "head_dim", c.head_dim, lanes)
        most = (
            f"attn_impl='pallas' holds a head whole: head_dim={c.head_dim} goes to {kernels.MOST_ENTRIES // c.head_dim}"
        )
        require(c.seq_len * c.head_dim <= kernels.MOST_ENTRIES, "seq_len", c.seq_len, f"{most}, attn_impl='splash' on")


# %% [markdown]
# ## Data
#
# Documents become one endless stream of tokens, each document opened by `<|bos|>`, and a batch is the next piece of
# that stream: nothing is padded, nothing thrown away. A sequence may begin in the middle of a document; with 2048
# tokens of context that costs less than the padding it saves. Beside each batch travels the position behind it: epoch,
# shard, row group, document, and the tokens already made but not yet used. From there another process goes on exactly.


# %%
def token_stream(tokenizer, paths, batch_tokens, state=None, docs_per_call=32):
    """Yields (tokens, state): int32 (batch_tokens + 1,), whose last token opens the next batch, and the state after it.

    The state is {"epoch", "shard", "row_group", "document": ints, "tokens": int32 array of tokens left over}.
    32 documents a call are enough for the encoder's threads, and few enough to have tokens early.
    """
    state = state or {"epoch": 0, "shard": 0, "row_group": 0, "document": 0, "tokens": np.zeros(0, np.int32)}
    epoch, position = state["epoch"], (state["shard"], state["row_group"], state["document"])
    left, seen = np.asarray(state["tokens"], np.int32), None if any(position) else 0
    while True:
        documents = tok.read_documents(paths, start=position)
        while chunk := list(itertools.islice(documents, docs_per_call)):
            position = chunk[-1][0]
            ids = tok.encode_batch(tokenizer, [text for _, text in chunk])
            left = np.concatenate([left, *(np.asarray(i, np.int32) for i in ids)])
            seen = None if seen is None else seen + sum(map(len, ids))
            while len(left) > batch_tokens:
                batch, left = left[: batch_tokens + 1], left[batch_tokens:]
                names = zip(("shard", "row_group", "document"), position, strict=True)
                yield batch, {"epoch": epoch, **dict(names), "tokens": left}
        if seen is not None and seen <= batch_tokens:
            raise UserError(f"the corpus has {seen:,} tokens, too few for one batch of {batch_tokens:,}: add documents")
        epoch, position, seen = epoch + 1, (0, 0, 0), 0


def batches_from(stream, config):
    """Yields ((x, y), state) from a token stream: int32 (total_batch_size, T) each, y being x one token later."""
    for tokens, state in stream:
        yield (tokens[:-1].reshape(-1, config.seq_len), tokens[1:].reshape(-1, config.seq_len)), state


# %% [markdown]
# The loader reads and tokenizes in a thread and puts the next batches on the device while the current one is being
# trained on. A thread is enough: the tokenizer releases the GIL while it works, and a step is one dispatch. Whatever
# goes wrong in it is raised in the training loop at the next batch, with the thread's own traceback.


# %% cellView="form"
# @title The loader: a thread that works ahead
class PrefetchDataLoader:
    """Iterates over (place(item), state) for the (item, state) pairs of `batches`, made ahead in a thread.

    `depth` batches wait on the device, one more is in the making. `close()` (or leaving a `with` block) ends the
    thread and frees what waits. An error in the thread is raised here, at the next batch, before any that waits.
    """

    def __init__(self, batches, place=lambda item: item, depth=2):
        self._batches, self._place = batches, place
        self._ready = queue.Queue(depth)
        self._stop = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def _work(self):
        try:
            for item, state in self._batches:
                self._offer((self._place(item), state))
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._error = error
        finally:
            self._batches.close() if hasattr(self._batches, "close") else None

    def _offer(self, pair):
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(pair, timeout=0.05)

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            if self._error is not None:
                raise self._error
            ended = self._stop.is_set() or not self._thread.is_alive()
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=0 if ended else 0.05)
            if ended and self._error is None:
                raise StopIteration

    def close(self):
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


# %% [markdown]
# The held-out set is a fixed number of tokens, cut into rows once, so that a run with another batch size is scored on
# the very same tokens. It is scored in bits per byte, which another tokenizer cannot flatter, as nanochat does: special
# tokens have no bytes and their loss is left out. The bar to pass is `gzip -9` on the same bytes, at 2.1 to 2.5.


# %%
class HeldOut(NamedTuple):
    """Validation rows x, y (R, T) int32, and the same text's bits per byte under gzip -9, document by document."""

    x: np.ndarray
    y: np.ndarray
    gzip_bpb: float


def load_held_out(tokenizer, corpus, config):
    """The first eval_tokens tokens of the held-out shards as a HeldOut; UserError if there are fewer."""
    rows = max(1, config.eval_tokens // config.seq_len)
    needed = rows * config.seq_len + 1
    parts, total = [], 0
    for _, text in tok.read_documents(corpus.val):
        parts.append(tok.encode_batch(tokenizer, [text])[0])
        if (total := total + len(parts[-1])) >= needed:
            break
    remedy = f"the held-out shards have {total:,} tokens: use at most that, less one sequence"
    require(total >= needed, "eval_tokens", config.eval_tokens, remedy)
    parts[-1] = parts[-1][: len(parts[-1]) - (total - needed)]
    raw = tok.token_byte_strings(tokenizer)
    gzip_bpb = tok.gzip_bits_per_byte(b"".join(raw[i] for i in ids) for ids in parts if len(ids) > 1)
    tokens = np.concatenate(parts).astype(np.int32)
    return HeldOut(tokens[:-1].reshape(rows, -1), tokens[1:].reshape(rows, -1), gzip_bpb)


# %% [markdown]
# ## Model
#
# Parameters are a plain pytree of float32 arrays. Head dimensions are axes of their own, so that an einsum makes heads
# without a reshape. Projections out of a block start at zero: at step 0 the residual stream is the embedding alone and
# the loss is exactly log(V), 10.4 nats at 32,768. RoPE tables ride along as constants; `split_trainable` parts them
# from what is trained, counted and saved.


# %%
def rope_tables(config):
    """Cosines and signed sines of the rotary angles over a whole head, float32 (T, H) each (Su et al., 2021)."""
    frequencies = config.rope_base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.outer(np.arange(config.seq_len), frequencies)
    cos, sin = np.cos(angles), np.sin(angles)
    return jnp.asarray(np.hstack([cos, cos]), jnp.float32), jnp.asarray(np.hstack([sin, -sin]), jnp.float32)


def init_layer(config, key):
    """One layer's weights, float32: inputs uniform with variance 1 / n_embd, outputs zero."""
    D, N, K, H, F = config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.mlp_dim
    bound = math.sqrt(3 / D)
    draw = lambda key, *shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    q, k, v, fc = jax.random.split(key, 4)
    return {
        "c_q": draw(q, D, N, H),
        "c_k": draw(k, D, K, H),
        "c_v": draw(v, D, K, H),
        "c_proj": jnp.zeros((N, H, D)),
        "c_fc": draw(fc, D, F),
        "mlp_proj": jnp.zeros((F, D)),
    }


def init_params(config, key):
    """All parameters, float32: wte (V, D), lm_head (D, V), two lambdas (L,) and layers[i]; and the RoPE tables."""
    embed, head, *layers = jax.random.split(key, config.n_layer + 2)
    return {
        "wte": jax.random.normal(embed, (config.vocab_size, config.n_embd)),
        "lm_head": 0.001 * jax.random.normal(head, (config.n_embd, config.vocab_size)),
        "resid_lambdas": jnp.ones(config.n_layer),
        "x0_lambdas": jnp.full(config.n_layer, 0.1, jnp.float32),
        "layers": [init_layer(config, key) for key in layers],
        "rope": rope_tables(config),
    }


def split_trainable(params):
    """(what is trained, the constants beside it); the optimizer, the count and the checkpoint see only the first."""
    return {k: v for k, v in params.items() if k != "rope"}, {"rope": params["rope"]}


def merge_params(trainable, constants):
    """The inverse of split_trainable."""
    return {**trainable, **constants}


# %% [markdown]
# ### Attention, four times
#
# One function, four implementations. `einsum` is the one to read: scores, mask, softmax, sum, for 256 queries at a time
# (an eighth of a longer context) and the keys that any of them sees: a CPU's step of 8 layers and 1,024 tokens is 1.3
# times as fast as with all T x T at once. Its weights stay in memory for the gradient, 72 MiB a sequence and full layer
# at the default size. `jax` is JAX's own, as XLA operations on any device. `splash` and `pallas` are TPU kernels that
# never write that matrix down and skip the blocks that a window masks: JAX's Splash Attention, and this project's own
# in `kernels.py`, which rotates and norms q and k on the way and takes a step from 709 to 513 ms by the compiler's
# estimate. All take q (B, T, N, H) and k, v (B, T, K, H) as they come out of their products; query head n reads
# key/value head n // (N / K). Tests hold them equal in value and gradient.


# %%
def masked_attention(q, k, v, mask):
    """softmax(q k / sqrt(H)) v over the keys where mask (T, S) is true, softmax in float32; returns (B, T, N, H)."""
    B, T, N, H = q.shape
    q = q.reshape(B, T, k.shape[2], -1, H)  # query heads in groups g that share a key/value head
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def window_mask(queries, keys, window):
    """True where a key position is not after the query's and among its last `window`: (len(queries), len(keys))."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance < window)


def attention_einsum(q, k, v, window):
    T, parts = q.shape[1], []
    block = max(256, -(-T // 8))  # no more than eight: each is compiled by itself
    for start in range(0, T, block):
        end, first = min(start + block, T), max(0, start - window + 1)  # no query of this block sees another key
        mask = window_mask(jnp.arange(start, end), jnp.arange(first, end), window)
        parts.append(masked_attention(q[:, start:end], k[:, first:end], v[:, first:end], mask))
    return jnp.concatenate(parts, axis=1)


def attention_jax(q, k, v, window):
    # A window of all T keys is no window: is_causal says it all, and spares a second mask.
    local = None if window >= q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


def attention_splash(q, k, v, window):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    import kernels

    T, N = q.shape[1], q.shape[2]
    # LocalMask is inclusive: w - 1 keys to the left and none to the right are a causal window of w.
    mask = splash.CausalMask((T, T)) if window >= T else splash.LocalMask((T, T), (window - 1, 0), 0)
    mask = splash.MultiHeadMask([mask] * N)
    block = math.gcd(T, kernels.SPLASH_BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = splash.BlockSizes(**{f"block_{name}": block for name in names} | {"block_kv_compute": math.gcd(T, 512)})

    def kernel(interpret, q, k, v):
        attend = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.vmap(attend)(q, k, v)

    heads_first = [jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v)]  # Splash does not scale by itself
    return jnp.swapaxes(kernels.interpreted_off_tpu(kernel, *heads_first), 1, 2)


def attention_pallas(q, k, v, rope, window):
    import kernels  # here, as Pallas takes 0.3 s to import

    heads_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    return jnp.swapaxes(kernels.fused_attention(*heads_first, *rope, window), 1, 2)


def rotated(attention):
    """The same attention of q and k as they leave their products: RoPE and QK-norm come first."""
    return lambda q, k, v, rope, window: attention(rope_and_norm(q, *rope), rope_and_norm(k, *rope), v, window)


ATTENTIONS = {
    "einsum": rotated(attention_einsum),
    "jax": rotated(attention_jax),
    "splash": rotated(attention_splash),
    "pallas": attention_pallas,
}

# %% [markdown]
# ### Blocks
#
# RoPE comes before QK-norm. A rotation changes no length: either order gives the same numbers, this one is nanochat's
# and both become one pass. Normed queries and keys bound every score by sqrt(H), 11.3 at 128 channels, which is what
# lets a learning rate this high train without divergence. The MLP squares its ReLU (So et al., *Primer*, 2021). Each
# layer mixes in the embedding it started from with a weight of its own, 0.1 at first (modded-nanogpt's x0 lambdas).
#
# Three of these functions bring their own gradient, because autodiff keeps more than it needs: the norm keeps its input
# in bfloat16 only, RoPE with norm likewise, and ReLU squared keeps `relu(u)` where autodiff keeps `u > 0`, a mask that
# the TPU's compiler packs into bits at 0.6 ms a layer. What each saves by the compiler's estimate is in LOG.md.


# %%
def inverse_rms(x):
    """1 / rms over the last axis in float32: (..., D) -> (..., 1)."""
    square = jnp.square(x.astype(jnp.float32))
    return jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + jnp.finfo(jnp.float32).eps)


@jax.custom_vjp
def rms_norm(x):
    """x / rms(x) over the last axis, computed in float32, no parameters (Zhang and Sennrich, 2019)."""
    return (x.astype(jnp.float32) * inverse_rms(x)).astype(x.dtype)


def rms_norm_backward(x, g):
    r = inverse_rms(x)
    y, g = x.astype(jnp.float32) * r, g.astype(jnp.float32)
    return ((r * (g - y * jnp.mean(g * y, axis=-1, keepdims=True))).astype(x.dtype),)


rms_norm.defvjp(lambda x: (rms_norm(x), x), rms_norm_backward)


def rotate_halves(x, cos, sin):
    """The halves of each head are taken apart: x (B, T, heads, H); cos, sin (T, H) -> float32, the shape of x."""
    (a, b), (c, _), (s, _) = (jnp.split(array, 2, axis=-1) for array in (x.astype(jnp.float32), cos, sin))
    c, s = c[:, None], s[:, None]
    return jnp.concatenate([a * c + b * s, b * c - a * s], axis=-1)


def rotate_by_product(x, cos, sin):
    """The same; the halves change places in a product with a permutation, exact in any dtype."""
    swap = jnp.asarray(np.roll(np.eye(x.shape[-1]), x.shape[-1] // 2, axis=1), x.dtype)
    swapped = jnp.einsum("...h,hg->...g", x, swap, preferred_element_type=jnp.float32, precision="highest")
    return x.astype(jnp.float32) * cos[:, None] + swapped * sin[:, None]


def apply_rope(x, cos, sin):
    """Turns channel i of x (B, T, heads, H) against channel i + H / 2, as nanochat does; cos, sin (T, H). float32.

    Half a head is half a TPU register, and slicing it out costs a trip to HBM: by estimate, the product makes a step
    with Splash 8 % shorter there. On a CPU it made a step up to 19 % longer (LOG 2026-11-20).
    """
    return jax.lax.platform_dependent(x, cos, sin, tpu=rotate_by_product, default=rotate_halves)


@jax.custom_vjp
def rope_and_norm(x, cos, sin):
    """rms_norm(apply_rope(x)), (B, T, heads, H) -> the same, in one pass: the rotation leaves the rms as it is."""
    return (apply_rope(x, cos, sin) * inverse_rms(x)).astype(x.dtype)


def rope_and_norm_backward(saved, g):
    x, cos, sin = saved
    r = inverse_rms(x)
    y, g = x.astype(jnp.float32) * r, apply_rope(g, cos, -sin)
    return (r * (g - y * jnp.mean(g * y, axis=-1, keepdims=True))).astype(x.dtype), None, None


rope_and_norm.defvjp(lambda x, cos, sin: (rope_and_norm(x, cos, sin), (x, cos, sin)), rope_and_norm_backward)


@jax.custom_vjp
def relu_squared(u):
    """max(u, 0) ** 2, elementwise."""
    return jnp.square(jax.nn.relu(u))


def relu_squared_forward(u):
    r = jax.nn.relu(u)
    return r * r, r


relu_squared.defvjp(relu_squared_forward, lambda r, g: (2 * r * g,))

# %% [markdown]
# With those, a layer is eight lines and the model twelve.


# %%
def attention_block(layer, x, attend):
    """What attention adds to the residual stream x (B, T, D); attend(q, k, v) -> (B, T, N, H)."""
    x = rms_norm(x)
    q = jnp.einsum("btd,dnh->btnh", x, layer["c_q"])
    k = jnp.einsum("btd,dkh->btkh", x, layer["c_k"])
    v = jnp.einsum("btd,dkh->btkh", x, layer["c_v"])
    return jnp.tensordot(attend(q, k, v), layer["c_proj"], 2)  # einsum contracts (h, n), for which a CPU transposes


def mlp_block(layer, x):
    """What the MLP adds to the residual stream x (B, T, D)."""
    hidden = relu_squared(jnp.einsum("btd,df->btf", rms_norm(x), layer["c_fc"]))
    return jnp.einsum("btf,fd->btd", hidden, layer["mlp_proj"])


def mix(a, x, b, x0):
    """a * x + b * x0 in the dtype of x, for float32 scalars a and b: bfloat16 could not hold a step of 1e-3 at 1."""
    return (a * x.astype(jnp.float32) + b * x0.astype(jnp.float32)).astype(x.dtype)


def cast_params(config, params):
    """Matrices in the compute type, scalars and RoPE tables as they are. Once a step, not once a microbatch."""
    cast = lambda path, p: p if p.ndim < 2 or path[0].key == "rope" else p.astype(config.dtype)
    return jax.tree_util.tree_map_with_path(cast, params)


def choose_attention(config):
    """attend(i, rope, q, k, v) of layer i by attn_impl, each layer with its own window."""
    run_attention = ATTENTIONS[config.attn_impl]
    return lambda i, rope, q, k, v: run_attention(q, k, v, rope, config.windows[i])


def rope_at(params, start, length):
    """Cosines and signed sines, (length, H) each, of the positions start, start + 1, ..."""
    return [jax.lax.dynamic_slice_in_dim(table, start, length) for table in params["rope"]]


def backbone(config, params, tokens, attend=None, start=0):
    """Final hidden states (B, T, D), normed, in the compute type, for tokens (B, T) at positions start, start + 1, ...

    attend(i, rope, q, k, v) is layer i's attention; sampling hands in one that keeps a cache. params are cast already.
    """
    attend = attend or choose_attention(config)
    rope = rope_at(params, start, tokens.shape[1])
    with jax.named_scope("embedding"):
        x = x0 = rms_norm(params["wte"][tokens])
    for i, layer in enumerate(params["layers"]):
        with jax.named_scope(f"layer_{i}/attention"):
            x = mix(params["resid_lambdas"][i], x, params["x0_lambdas"][i], x0)
            x = x + attention_block(layer, x, functools.partial(attend, i, rope))
        with jax.named_scope(f"layer_{i}/mlp"):
            x = x + mlp_block(layer, x)
    return rms_norm(x)


class Model(NamedTuple):
    """What makes one architecture: the functions that `train`, `generate` and the rest take."""

    init_params: Callable
    backbone: Callable


GPT = Model(init_params, backbone)

# %% [markdown]
# ### Counting
#
# A multiplication by a weight costs 2 FLOPs forward and 4 backward, so 6 per parameter and token; the embedding is a
# lookup and costs none. Attention adds 12 per channel and key that a query really sees: on average (T + 1) / 2 in a
# causal layer, three eighths of T in an S layer.
#
# MFU, model FLOPs utilization, is the share of the chip's peak that goes into these FLOPs and nothing else: what is
# computed twice, moved or waited for does not count. A v6e can do 918e12 a second and a token of the default model
# costs 1.57e9, so 100 % would be 584 thousand tokens a second. Many published figures count all T keys, which at the
# default size makes 15 % more of the same speed; both FLOPs are printed, the progress bar shows the smaller MFU.


# %%
def mean_keys(seq_len, window):
    """Keys a query sees on average, under causality and a window of `window` keys."""
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def count_params(config, model=GPT):
    """Trained parameters by group: {"embed", "attention", "mlp", "lm_head", "scalars", "total"} -> int."""
    shapes, _ = split_trainable(jax.eval_shape(functools.partial(model.init_params, config), jax.random.key(0)))
    groups = dict.fromkeys(("embed", "attention", "mlp", "lm_head", "scalars"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else str(path[-1])
        attention = name in ("c_q", "c_k", "c_v", "c_proj")
        kind = {"wte": "embed", "lm_head": "lm_head"}.get(name) or ("attention" if attention else "mlp")
        groups["scalars" if leaf.ndim < 2 else kind] += leaf.size
    return {**groups, "total": sum(groups.values())}


def flops_per_token(config, model=GPT, full_attention=False):
    """Training FLOPs per token; full_attention counts all T keys per query, as many published MFU figures do."""
    count = count_params(config, model)
    spans = [config.seq_len if full_attention else mean_keys(config.seq_len, w) for w in config.windows]
    return 6 * (count["total"] - count["embed"] - count["scalars"]) + 12 * config.n_head * config.head_dim * sum(spans)


def describe_model(config, model=GPT):
    """A table of parameters by group, and FLOPs per token, as text."""
    count = count_params(config, model)
    rows = [f"  {name:<10}{n:>14,}{n / count['total']:>8.1%}" for name, n in count.items() if n]
    flops = flops_per_token(config, model), flops_per_token(config, model, full_attention=True)
    return "\n".join(["parameters", *rows, "FLOPs per token: {:.3g} ({:.3g} counting all T keys)".format(*flops)])


# %% [markdown]
# ## Loss and optimizer
#
# Logits are soft-capped, 15 tanh(z / 15), in float32. That bounds what a confident mistake can cost, 30 + log(V) or 40
# nats, so that no single token dominates a batch. It bounds exp() as well: 32,768 times e^15 is 1e11, far inside
# float32, and the usual subtraction of the maximum, a pass over all logits, can be left out; without a cap it cannot.
#
# Logits are also the largest thing in training: 8,192 tokens by 32,768 words in float32 are 1 GiB, and autodiff would
# keep several of that size. Here the gradient is formed where the logits are, slice by slice in the forward pass, so
# that no slice outlives its turn (the idea of Liger's fused loss and of cut cross-entropy, Wijmans et al., 2024).


# %%
def cap_logits(config, z):
    """Logits z (..., V) in float32, within +-softcap if there is one; and the slope of that, d capped / d z."""
    z = z.astype(jnp.float32)
    if not config.softcap:
        return z, 1.0
    t = jnp.tanh(z / config.softcap)
    return config.softcap * t, 1 - t * t


def logits_of(config, params, hidden):
    """Logits (..., V), soft-capped, in float32 for hidden states (..., D)."""
    with jax.named_scope("lm_head"):
        z = jnp.einsum("...d,dv->...v", hidden, params["lm_head"], preferred_element_type=jnp.float32)
        return cap_logits(config, z)[0]


def forward(config, params, tokens, model=GPT):
    """Logits (B, T, V) in float32 for tokens (B, T) int32."""
    params = cast_params(config, params)
    return logits_of(config, params, model.backbone(config, params, tokens))


def slice_losses(config, h, lm_head, y):
    """Losses in nats, float32 (M,), of hidden states h (M, D) and targets y (M,); and what their gradient needs."""
    with jax.named_scope("lm_head"):
        z = jnp.einsum("md,dv->mv", h, lm_head)  # in the compute type, as nanochat's: float32 doubles the traffic
    with jax.named_scope("loss"):
        z, slope = cap_logits(config, z)
        hit = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == y[:, None]  # a comparison fuses, a scatter does not
        lse = jnp.log(jnp.sum(jnp.exp(z), axis=-1)) if config.softcap else jax.nn.logsumexp(z, axis=-1)
        return lse - jnp.sum(jnp.where(hit, z, 0), axis=-1), (z, slope, hit, lse)


def slice_grads(config, h, lm_head, y, scale):
    """(sum of the losses, d/dh (M, D), d/dlm_head (D, V) float32), the gradients times `scale`."""
    losses, (z, slope, hit, lse) = slice_losses(config, h, lm_head, y)
    with jax.named_scope("loss"):
        dz = (jnp.exp(z - lse[:, None]) - hit) * slope * scale
        dz = dz.astype(h.dtype)
    with jax.named_scope("lm_head"):
        dh = jnp.einsum("mv,dv->md", dz, lm_head)
        return losses.sum(), dh, jnp.einsum("md,mv->dv", h, dz, preferred_element_type=jnp.float32)


def in_slices(config, h, y):
    """h (B, T, D) and y (B, T) as (slices, loss_slice or less, ...)."""
    count = next(n for n in itertools.count(-(-y.size // config.loss_slice)) if y.size % n == 0)
    return h.reshape(count, -1, h.shape[-1]), y.reshape(count, -1)


# %%
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(config, h, lm_head, y):
    """Mean cross-entropy in nats, float32, of hidden states h (B, T, D), lm_head (D, V) and targets y (B, T)."""
    return head_loss_forward(config, h, lm_head, y)[0]


def head_loss_forward(config, h, lm_head, y):
    """The loss, with its gradients ready: the backward pass only scales them."""

    def add(total, hy):
        loss, dh, d_head = slice_grads(config, hy[0], lm_head, hy[1], 1 / y.size)
        return (total[0] + loss, total[1] + d_head), dh

    zero = jnp.zeros(()), jnp.zeros(lm_head.shape, jnp.float32)
    (loss, d_head), dh = jax.lax.scan(add, zero, in_slices(config, h, y))
    return loss / float(y.size), (dh.reshape(h.shape), d_head.astype(lm_head.dtype))


head_loss.defvjp(head_loss_forward, lambda config, grads, g: (*(d * g.astype(d.dtype) for d in grads), None))


def loss_fn(config, params, x, y, model=GPT):
    """Mean cross-entropy in nats per token, float32 scalar, for x, y (B, T) int32."""
    params = cast_params(config, params)
    return head_loss(config, model.backbone(config, params, x), params["lm_head"], y)


def token_losses(config, params, x, y, model=GPT):
    """Cross-entropy in nats of every token: float32 (B, T), for x, y (B, T) int32."""
    params = cast_params(config, params)
    hidden = model.backbone(config, params, x)
    one_slice = lambda hy: slice_losses(config, hy[0], params["lm_head"], hy[1])[0]
    return jax.lax.map(one_slice, in_slices(config, hidden, y)).reshape(y.shape)


# %% [markdown]
# AdamW (Loshchilov and Hutter, 2019) is eight lines over a pytree. Weight decay falls on matrices only: a decayed
# scalar would just be pulled from the value it was set to. The learning rate rises over the first 2 % of the steps,
# stays, and falls linearly over the last half, nanochat's trapezoid: most of the gain in loss comes in that fall.


# %%
def learning_rate_at(config, step):
    """The learning rate of a 0-based step: linear warm-up, constant, linear warm-down to final_lr_frac. float32."""
    warmup = max(1, round(config.warmup_ratio * config.num_iterations))
    warmdown = max(1, round(config.warmdown_ratio * config.num_iterations))
    rise = jnp.minimum(1.0, (step + 1) / warmup)
    left = jnp.clip((config.num_iterations - step) / warmdown, 0.0, 1.0)
    return config.learning_rate * rise * (left + (1 - left) * config.final_lr_frac)


def adamw_init(trainable):
    """Zero first and second moments, float32, shaped as the parameters."""
    zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
    return {"mu": zeros(), "nu": zeros()}


def adamw_update(config, trainable, moments, grads, step):
    """(parameters, moments) after 0-based step `step`; decoupled weight decay on arrays of two and more axes."""
    rate = learning_rate_at(config, step)
    b1, b2, t = config.beta1, config.beta2, step + 1.0
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments["mu"], grads)
    nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, moments["nu"], grads)

    def update(p, m, n):
        direction = (m / (1 - b1**t)) / (jnp.sqrt(n / (1 - b2**t)) + config.eps)
        return p - rate * (direction + (config.weight_decay * p if p.ndim > 1 else 0))

    return jax.tree.map(update, trainable, mu, nu), {"mu": mu, "nu": nu}


def global_norm(tree):
    """Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


# %% [markdown]
# A step is one program: microbatches in a `lax.scan` that sums float32 gradients, one mean over the devices, AdamW.
# Parameters and moments are donated, so the new ones take the old ones' memory: 3.2 GB at the default size that would
# otherwise exist twice. Each device runs the same code on its share of the batch (`shard_map` over a mesh of one axis)
# and the gradients meet once a step, not once a microbatch. One chip is the mesh of one.
#
# Why microbatches of four, when memory would hold sixteen? A v6e keeps 128 MiB on the chip. The widest activation of
# four sequences, 4 x 2048 x 4096 in bfloat16, is 64 MiB and stays there; that of sixteen goes out to HBM and back. The
# same batch of 64 as 16 x 4 reached 48.3 % MFU on a v6e where 4 x 16 reached 42.6 (the ancestor's timings, all T keys
# counted).


# %%
def make_mesh(devices=None):
    """A one-dimensional mesh, axis "data", over the given or all local devices."""
    return jax.sharding.Mesh(np.asarray(devices or jax.local_devices()), ("data",))


def accumulate_grads(config, model, trainable, constants, x, y):
    """Mean loss and float32 gradients over the microbatches of x, y (accumulation * device_batch_size, T)."""
    weights = cast_params(config, merge_params(trainable, constants))  # the float32 masters are read once a step
    weights, constants = split_trainable(weights)

    def micro_grads(xy):
        loss = lambda weights: loss_fn(config, merge_params(weights, constants), *xy, model)
        return jax.tree.map(lambda g: g.astype(jnp.float32), jax.value_and_grad(loss)(weights))

    micro = [a.reshape(-1, config.device_batch_size, a.shape[-1]) for a in (x, y)]
    if len(micro[0]) == 1:
        return micro_grads([a[0] for a in micro])
    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), trainable))
    total, _ = jax.lax.scan(lambda total, xy: (jax.tree.map(jnp.add, total, micro_grads(xy)), None), zero, micro)
    return jax.tree.map(lambda t: t / len(micro[0]), total)


def new_state(config, model, key):
    """(state, constants) of step 0; state is {"params", "mu", "nu", "step"}."""
    trainable, constants = split_trainable(model.init_params(config, key))
    return {"params": trainable, **adamw_init(trainable), "step": jnp.zeros((), jnp.int32)}, constants


def init_state(config, mesh, model=GPT):
    """(state, constants) of step 0 from param_seed, replicated over the mesh."""
    init = jax.jit(functools.partial(new_state, config, model), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return init(jax.random.key(config.param_seed))


def make_train_step(config, mesh=None, model=GPT):
    """The jitted step: (state, constants, x, y) -> (state, {"loss", "grad_norm", "lr"}), with the old state donated.

    x, y: int32 (total_batch_size, T), sharded over the mesh's axis. A factory, because a module-level `jax.jit` would
    go on running the old function after its cell was edited.
    """
    mesh = mesh or make_mesh()
    check_mesh(config, mesh)
    whole, split = PartitionSpec(), PartitionSpec("data")

    def device_grads(trainable, constants, x, y):
        return jax.lax.pmean(accumulate_grads(config, model, trainable, constants, x, y), "data")

    all_grads = jax.shard_map(
        device_grads, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=whole, check_vma=False
    )

    def train_step(state, constants, x, y):
        loss, grads = all_grads(state["params"], constants, x, y)
        with jax.named_scope("optimizer"):
            norm = global_norm(grads)
            if config.grad_clip:
                grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, config.grad_clip / (norm + 1e-6)), grads)
            params, moments = adamw_update(config, state["params"], state, grads, state["step"])
        metrics = {"loss": loss, "grad_norm": norm, "lr": learning_rate_at(config, state["step"])}
        return {"params": params, **moments, "step": state["step"] + 1}, metrics

    return jax.jit(train_step, donate_argnums=0)


def check_mesh(config, mesh):
    """Raises UserError unless total_batch_size divides into microbatches over the mesh's devices."""
    unit = config.device_batch_size * mesh.size
    remedy = f"must be a multiple of device_batch_size * devices = {config.device_batch_size} * {mesh.size}"
    require(config.total_batch_size % unit == 0, "total_batch_size", config.total_batch_size, remedy)


# %% [markdown]
# ### Will it fit, and how fast?
#
# The compiler for a TPU needs no TPU. `compile_for_chip` runs it on the real step, donation, accumulation, kernels and
# all, on any Linux machine with libtpu, in about a minute for 16 layers. What it says of memory is what the chip will
# use, to the byte; what it says of time is an estimate. `preflight` does the same for the device that is here, before
# anything is downloaded, and refuses a config that does not fit with the nearest one that does.


# %%
def chip_mesh(topology):
    """A mesh over the devices of a TPU topology such as "v6e:1x1" or "v5e:2x4", none of which need be attached.

    Over those that are attached where the topology is empty.
    """
    from jax.experimental import topologies

    if not topology:
        return make_mesh()

    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        return make_mesh(topologies.get_topology_desc(topology, platform="tpu", **bounds).devices)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology={topology!r}: {reason} (libtpu, the compiler: pip install 'jax[tpu]')") from None


def compile_step(config, mesh, model=GPT):
    """The training step compiled for the devices of a mesh, as a jax.stages.Compiled; nothing is run."""

    def placed(tree, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    state, constants = jax.eval_shape(functools.partial(new_state, config, model), jax.random.key(0))
    batch = jax.ShapeDtypeStruct((config.total_batch_size, config.seq_len), jnp.int32)
    tokens = placed(batch, "data")
    lowered = make_train_step(config, mesh, model).lower(placed(state), placed(constants), tokens, tokens)
    with warnings.catch_warnings():  # the cache on disk gives back no program for a chip that is not attached
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        return lowered.compile()


def compile_for_chip(config, topology="v6e:1x1", model=GPT):
    """The training step compiled ahead of time for a TPU topology, as a jax.stages.Compiled; nothing is run."""
    return compile_step(config, chip_mesh(topology), model)


# %%
class DoesNotFit(UserError):
    """A config whose step needs more memory than its device has."""


def measure_fit(config, mesh, model=GPT):
    """The chip.Fit of a config on the devices of a mesh, whether it fits or not."""
    device, start, compiled = mesh.devices.flat[0], time.perf_counter(), None
    try:
        compiled = compile_step(config, mesh, model)
        peak = chip.peak_bytes(compiled, device.platform)
    except jax.errors.JaxRuntimeError as error:
        if (peak := chip.bytes_needed(error)) is None:
            raise
    seconds = time.perf_counter() - start
    parts = chip.memory_parts(config, count_params(config, model)["total"], peak)
    moved = compiled and (compiled.cost_analysis() or {}).get("bytes accessed")
    return chip.Fit(
        chip.name_of(mesh), peak, chip.memory_limit(device), parts, flops_per_token(config, model),
        moved and moved / (config.device_batch_size * config.seq_len),
        compiled and chip.step_seconds(config, compiled, device), seconds, compiled,
    )  # fmt: skip


def preflight(config, topology="", model=GPT):
    """The chip.Fit of a config on a TPU topology, or on the devices attached here; DoesNotFit if it does not."""
    mesh = chip_mesh(topology)
    fit = measure_fit(config, mesh, model)
    if not fit.fits:
        count = lambda config: count_params(config, model)["total"]
        measure = lambda config: measure_fit(config, mesh, model)
        raise DoesNotFit(chip.explain_refusal(config, fit, count, measure, mesh.size))
    return fit


def look_before(config, topology="", model=GPT):
    """Prints what a step needs, or refuses it. With a topology, or "here" for the attached devices, that is all:
    other microbatches and the largest batch are looked for as far as the device is known, and the program ends."""
    where = "" if topology == "here" else topology
    fit, mesh = preflight(config, where, model), chip_mesh(where)
    peak = peak_rate(config, mesh, model)
    print(chip.describe_fit(config, fit, peak))
    if topology:
        measure = lambda config: measure_fit(config, mesh, model)
        for line in chip.look_further(config, fit, mesh.size, measure, peak):
            say(line)
        raise SystemExit


# %% [markdown]
# ## Sampling
#
# A sampled token costs one pass over one position: keys and values of the past wait in a cache. The model's code is the
# training code; only its attention is swapped for one that writes to the cache and reads from it. Prompt, loop and
# choice of the next token are one program, so that 128 tokens cost one dispatch and not 128.


# %%
def pick_token(logits, key, temperature, top_k):
    """Next tokens (B,) int32 from logits (B, V): the likeliest at temperature 0, else drawn from the top_k (0: all)."""
    if temperature == 0:
        best = logits == jnp.max(logits, axis=-1, keepdims=True)
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        return jnp.min(jnp.where(best, ids, ids[-1]), axis=-1)  # argmax, a seventh of its time on a CPU
    if top_k:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def run_cached(config, model, params, cache, tokens, start):
    """Hidden states of tokens (B, t) at positions start, ..., and the cache with their keys and values added.

    cache: per layer k (B * K, S, H) and v (B * K, H, S), as the two products take them: from any other form XLA makes
    them anew for each token. Positions after start + t may hold anything: no query sees them.
    """
    (B, t), (_, S, H) = tokens.shape, cache[0][0].shape
    queries, keys = start + jnp.arange(t), jnp.arange(S)
    add = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start)
    cache = list(cache)

    def attend(i, rope, q, k, v):
        q, k = rope_and_norm(q, *rope), rope_and_norm(k, *rope)
        k = add(cache[i][0], k.transpose(0, 2, 1, 3).reshape(-1, t, H), axis=1)
        v = add(cache[i][1], v.transpose(0, 2, 3, 1).reshape(-1, H, t), axis=2)
        cache[i] = k, v
        k, v = k.reshape(B, -1, S, H).transpose(0, 2, 1, 3), v.reshape(B, -1, H, S).transpose(0, 3, 1, 2)
        return masked_attention(q, k, v, window_mask(queries, keys, config.windows[i]))

    hidden = model.backbone(config, params, tokens, attend, start)
    return hidden, tuple(cache)


def make_sampler(config, max_new_tokens, temperature=0.0, top_k=0, model=GPT):
    """A jitted (params, prompt, length, key) -> (B, max_new_tokens) int32.

    prompt is (B, P) int32 of which the first `length` tokens count: a few padded sizes P serve all prompts without
    compiling again.
    """

    def sample(params, prompt, length, key):
        params = cast_params(config, params)
        (B, P), K, H = prompt.shape, config.n_kv_head, config.head_dim
        k, v = (
            jnp.zeros((B * K, *shape), config.dtype) for shape in ((P + max_new_tokens, H), (H, P + max_new_tokens))
        )
        cache = ((k, v),) * config.n_layer
        choose = lambda hidden, key: pick_token(logits_of(config, params, hidden), key, temperature, top_k)

        def next_token(carry, key):
            cache, token, position = carry
            hidden, cache = run_cached(config, model, params, cache, token[:, None], position)
            token = choose(hidden[:, 0], key)
            return (cache, token, position + 1), token

        hidden, cache = run_cached(config, model, params, cache, prompt, 0)
        first_key, *keys = jax.random.split(key, max_new_tokens)
        first = choose(jax.lax.dynamic_index_in_dim(hidden, length - 1, 1, keepdims=False), first_key)
        _, rest = jax.lax.scan(
            next_token, (cache, first, length), jnp.stack(keys) if keys else None, max_new_tokens - 1
        )
        return jnp.concatenate([first[:, None], rest.T], axis=1)

    return jax.jit(sample)


def generate(config, params, prompt, max_new_tokens, temperature=0.0, top_k=0, seed=0, model=GPT, sampler=None):
    """max_new_tokens token ids that go on from the token ids in `prompt`; hand in a `make_sampler` to compile once."""
    room = config.seq_len - len(prompt)
    require(len(prompt) > 0, "prompt", prompt, "give at least one token, such as <|bos|>")
    require(0 < max_new_tokens <= room, "max_new_tokens", max_new_tokens, f"seq_len leaves room for 1 to {room}")
    require(0 <= top_k <= config.vocab_size, "top_k", top_k, f"use 0 (all) to vocab_size={config.vocab_size}")
    require(temperature >= 0, "temperature", temperature, "use 0 (greedy) or more")
    sampler = sampler or make_sampler(config, max_new_tokens, temperature, top_k, model)
    padded = min(max(16, 1 << (len(prompt) - 1).bit_length()), config.seq_len - max_new_tokens)
    tokens = np.zeros((1, padded), np.int32)
    tokens[0, : len(prompt)] = prompt
    return np.asarray(sampler(params, tokens, len(prompt), jax.random.key(seed))[0]).tolist()


# %% [markdown]
# ## Checkpoint
#
# A checkpoint is the whole state: parameters, moments, step, the position in the data with its left-over tokens, the
# metrics so far and what the run was made from. Nothing random happens after the weights are drawn, so there is no
# generator to save. It is safetensors and JSON, which no reader has to trust; 1.1 GB of weights and 2.1 GB of moments
# at the default size. The one pause is the copy from the device; a thread writes, syncs and hashes.
#
# It is always the state from before what falls due at its step, an evaluation say: whoever goes on from there makes
# that first. So the files of a run that was killed and resumed are those of a run that was not. A run may go on with
# another learning rate, batch per device or machine, and says so. It may not go on with another model or other batches:
# the config's `fixed` fields are refused, with both values.


# %% cellView="form"
# @title Checkpoints, written and read
def checkpoint_files(config, state, stream, notes, metrics=""):
    """A checkpoint's files, {name: bytes or arrays}, copied from the device: the state is donated to the next step."""
    shared = jax.default_backend() == "cpu"  # where NumPy would see the device's own memory
    flat = common.flatten(jax.device_get(state)).items()
    arrays = {name: np.array(a, copy=shared or None, order="C") for name, a in flat}  # safetensors takes C for granted
    part = lambda key: {n.removeprefix(f"{key}."): a for n, a in arrays.items() if n.startswith(f"{key}.")}
    position = {name: value for name, value in stream.items() if name != "tokens"}
    as_bytes = lambda value: json.dumps(value, indent=2).encode()
    return {
        **{f"{key}.safetensors": part(key) for key in ("params", "mu", "nu")},
        "stream.safetensors": {"tokens": np.asarray(stream["tokens"], np.int32)},
        "state.json": as_bytes({"step": int(arrays["step"]), "stream": position, **notes}),
        "config.json": as_bytes(dataclasses.asdict(config)),
        "metrics.jsonl": metrics.encode(),
    }


def save_checkpoint(run_dir, config, state, stream, notes, metrics=""):
    """Writes run_dir/checkpoints/step_NNNNNNNN, whole or not at all, and returns its path.

    state is the train state, stream the data stream's state behind it, notes a dict that JSON can hold, metrics the
    text of metrics.jsonl up to here.
    """
    path = Path(run_dir) / "checkpoints" / f"step_{int(state['step']):08d}"
    common.write_checkpoint(path, checkpoint_files(config, state, stream, notes, metrics))
    return path


def load_checkpoint(path, config, mesh, model=GPT):
    """(state, stream, notes) of a checkpoint folder, the state replicated over the mesh."""
    path = Path(path)
    template = jax.eval_shape(functools.partial(new_state, config, model), jax.random.key(0))[0]
    notes = json.loads((path / "state.json").read_text())
    arrays = {"step": np.asarray(notes.pop("step"), np.int32)}
    for key in ("params", "mu", "nu"):
        arrays |= {f"{key}.{name}": a for name, a in load_file(path / f"{key}.safetensors").items()}
    state = common.unflatten(template, arrays)
    stream = {**notes.pop("stream"), **load_file(path / "stream.safetensors")}
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec())), stream, notes


# %% [markdown]
# ## Train
#
# What a step cost and what it learned is read from the device every ten steps and one step late, so that the chip
# always has the next step queued while the host looks at the last: a `float(loss)` every step leaves it idle in
# between. That is also where a loss that is no longer a number stops the run, with the last good checkpoint in place.


# %%
def peak_rate(config, mesh, model=GPT):
    """Tokens per second if every FLOP the mesh's devices can do went into the model; None for an unknown device."""
    device = chip.CHIPS.get(mesh.devices.flat[0].device_kind)
    return device and device.peak_flops * mesh.size / flops_per_token(config, model)


# %% cellView="form"
# @title The held-out score
def make_evaluator(config, mesh, held_out, token_bytes, model=GPT):
    """A function of (trainable, constants) -> (mean loss in nats per token, bits per byte) on the held-out rows.

    Rows that fill the last batch up count nothing, so the score does not depend on the batch size.
    """
    rows = config.device_batch_size * mesh.size
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))

    def sums(trainable, constants, x, y):
        losses = token_losses(config, merge_params(trainable, constants), x, jnp.maximum(y, 0), model)
        size = jnp.where(y >= 0, jnp.asarray(token_bytes)[jnp.maximum(y, 0)], 0)
        parts = losses * (y >= 0), losses * (size > 0), size
        return jax.lax.psum(jnp.stack([part.sum().astype(jnp.float32) for part in parts]), "data")

    split = PartitionSpec("data")
    specs = (PartitionSpec(), PartitionSpec(), split, split)
    step = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))

    def evaluate(trainable, constants):
        totals = []
        for i in range(0, len(held_out.x), rows):
            missing = max(0, i + rows - len(held_out.x))
            fill = lambda a, value, i=i, missing=missing: np.pad(
                a[i : i + rows], ((0, missing), (0, 0)), constant_values=value
            )
            totals.append(step(trainable, constants, place(fill(held_out.x, 0)), place(fill(held_out.y, -1))))
        nats, counted, size = np.sum(jax.device_get(totals), axis=0, dtype=np.float64)
        return nats / held_out.y.size, counted / math.log(2) / size

    return evaluate


# %% cellView="form"
# @title Where a run comes from, and its samples
def check_tokenizer(config, tokenizer):
    """Raises UserError unless the tokenizer has exactly vocab_size tokens."""
    size = tokenizer.get_vocab_size()
    require(size == config.vocab_size, "vocab_size", config.vocab_size, f"the tokenizer has {size} tokens: use {size}")


def describe_origin(corpus, tokenizer, mesh):
    """What a run is made from beside its config: nothing secret, nothing of the user's machine but its device."""
    return {
        "data": {"name": corpus.name, "revision": corpus.revision, "shards": len(corpus.train)},
        "tokenizer_sha256": tok.tokenizer_hash(tokenizer),
        "commit": common.git_commit(),
        "jax": jax.__version__,
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }


SAMPLE_TOKENS = 64


def make_sample_writer(config, tokenizer, prompts, model=GPT):
    """A function of params -> [(prompt, continuation)]: 64 tokens at most, temperature 0.8, top 50, up to a <|bos|>."""
    count = min(SAMPLE_TOKENS, config.seq_len // 2)
    sampler = make_sampler(config, count, temperature=0.8, top_k=50, model=model)
    bos = tokenizer.token_to_id(tok.SPECIAL_TOKENS[0])

    def write(params, prompt, seed):
        ids = tok.encode_batch(tokenizer, [prompt])[0][: config.seq_len - count]
        new = generate(config, params, ids, count, seed=seed, model=model, sampler=sampler)
        return prompt, tokenizer.decode(new[: new.index(bos)] if bos in new else new)

    return lambda params: [write(params, prompt, seed) for seed, prompt in enumerate(prompts)]


# %% [markdown]
# A `Trainer` is a run between two steps: the state on the device, the position in the data behind it, and what can be
# done with both. State and position change hands together, so that whatever is saved belongs together.


# %% cellView="form"
# @title A run between two steps
class Result(NamedTuple):
    """What `train` returns. params is the trained pytree on the device; the losses are of the last evaluation."""

    params: dict
    step: int
    val_loss: float | None
    val_bpb: float | None
    gzip_bpb: float
    samples: list
    run_dir: Path


def all_finite(tree):
    """Whether every number in a pytree is finite: bool scalar."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


class Trainer:
    """A run: built from the newest checkpoint in its folder or from the seed; `train` says what the arguments are."""

    def __init__(self, config, corpus, tokenizer, run_dir, model, mesh, prompts, on_log, mirror, remember):
        check_tokenizer(config, tokenizer)
        self.config, self.run_dir, self.mesh, self.model, self.mirror = config, Path(run_dir), mesh, model, mirror
        self.train_step = make_train_step(config, mesh, model)
        self.held_out = load_held_out(tokenizer, corpus, config)
        self._evaluate = make_evaluator(config, mesh, self.held_out, tok.token_byte_lengths(tokenizer), model)
        self._all_finite = jax.jit(all_finite)
        self._write_samples = make_sample_writer(config, tokenizer, prompts, model)
        self.state, self.constants = init_state(config, mesh, model)
        self.stream, self.scores, self.samples = None, (None, None), []
        self.notes = {"best_step": None, "best_val_bpb": None, "remember": remember}
        rows = self._resume(describe_origin(corpus, tokenizer, mesh))
        batch_tokens, peak = config.total_batch_size * config.seq_len, peak_rate(config, mesh, model)
        metrics = self.run_dir / "metrics.jsonl"
        self.log = common.RunLog(metrics, config.num_iterations, self.step, batch_tokens, peak, on_log, rows=rows)
        self.profile = common.ProfileWindow(self.run_dir / "profile", config.num_iterations - self.step)
        self.writer = common.CheckpointWriter(self.run_dir / "checkpoints", config.keep, mirror and mirror.offer)
        tokens = token_stream(tokenizer, corpus.train, batch_tokens, self.stream)
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
        self.loader = PrefetchDataLoader(batches_from(tokens, config), place)
        self._saved_step, self._saved_at, self.torn = self.step, time.monotonic(), False

    @property
    def step(self):
        """Steps complete."""
        return int(self.state["step"])

    def _resume(self, origin):
        """Goes on from the newest whole checkpoint, writes config.json and returns the rows of metrics so far."""
        checkpoints, rows = self.run_dir / "checkpoints", []
        common.clear_leftovers(checkpoints)
        if self.mirror:
            self.mirror.restore(checkpoints)
        if path := common.newest_checkpoint(checkpoints):
            common.compare_with_checkpoint(path, self.config, origin)  # first: it names the field, not an array's shape
            self.state, self.stream, notes = load_checkpoint(path, self.config, self.mesh, self.model)
            self.notes = {**notes, "remember": self.notes["remember"] or notes["remember"]}
            rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            say(f"resuming: {self.run_dir} goes on behind step {self.step:,} of {self.config.num_iterations:,}")
        self.notes["made_from"] = origin
        description = {
            "config": dataclasses.asdict(self.config),
            **origin,
            "gzip_bits_per_byte": self.held_out.gzip_bpb,
        }
        with common.atomic_write(self.run_dir / "config.json") as part:
            part.write_text(json.dumps(description, indent=2) + "\n")
        return rows

    def advance(self, done):
        """Trains on the next batch; `done` is the number of steps that this process has made."""
        self.writer.check()
        (x, y), position = next(self.loader)
        self.torn = True  # the old state is donated, the new one and its position are not both here yet
        with self.profile.before(done):
            self.state, metrics = self.train_step(self.state, self.constants, x, y)
        self.stream, self.torn = position, False
        self.profile.after(done, metrics)
        return metrics

    def save_is_due(self, step):
        """Whether save_every steps or save_minutes minutes have passed."""
        minutes = self.config.save_minutes
        late = minutes and time.monotonic() - self._saved_at > 60 * minutes
        return late or is_due(self.config, self.config.save_every, step)

    def save(self):
        """Hands a checkpoint to the writer's thread, unless this step has one."""
        with self.log.pause():
            if self.step == self._saved_step:
                return
            if not self._all_finite(self.state["params"]):  # a step too long, not a bad gradient: its loss comes next
                raise common.NonFiniteLoss(
                    f"step {self.step} left parameters that are not finite: lower learning_rate; "
                    "the last good checkpoint is in place"
                )
            self.writer.wait()  # before the copy: the host must not hold two
            files = checkpoint_files(self.config, self.state, self.stream, self.notes, self.log.text())
            self.writer.save(self.step, files, self.notes["best_step"])
            self._saved_step, self._saved_at = self.step, time.monotonic()

    def save_apart(self):
        """Writes the state as nonfinite_NNNNNNNN, for whoever wants to know why; nothing resumes from it."""
        path = self.run_dir / "checkpoints" / f"nonfinite_{self.step:08d}"
        if not path.exists():
            files = checkpoint_files(self.config, self.state, self.stream, self.notes, self.log.text())
            common.write_checkpoint(path, files)

    def evaluate(self):
        """Scores the held-out set and redraws loss.png."""
        self.save()
        with self.log.pause():
            loss, bpb = self.scores = self._evaluate(self.state["params"], self.constants)
            if self.notes["best_val_bpb"] is None or bpb < self.notes["best_val_bpb"]:
                self.notes |= {"best_step": self.step, "best_val_bpb": bpb}
            self.log.show(val=f"{bpb:.3f} bpb")
            self.log.write({"step": self.step, "val_loss": loss, "val_bpb": bpb})
            common.plot_losses(self.log.rows, self.held_out.gzip_bpb, self.run_dir / "loss.png")
            common.show_picture(self.run_dir / "loss.png")

    def sample(self):
        """Lets the model go on from each prompt."""
        self.save()
        with self.log.pause():
            self.samples = self._write_samples(merge_params(self.state["params"], self.constants))

    def do_what_is_due(self, step):
        """Evaluates and samples if `step` is one for that."""
        if is_due(self.config, self.config.eval_every, step):
            self.evaluate()
        if is_due(self.config, self.config.sample_every, step):
            self.sample()
            for prompt, text in self.samples:
                self.log.say(f"step {step}: {prompt!r} -> {text!r}")

    def result(self):
        """What the run has come to."""
        params = merge_params(self.state["params"], self.constants)
        return Result(params, self.step, *self.scores, self.held_out.gzip_bpb, self.samples, self.run_dir)

    def close(self):
        """Ends every thread; the last checkpoint is written, and on the Hub, before this returns."""
        with contextlib.ExitStack() as stack:  # each of them, whatever another raises
            if self.mirror:
                stack.callback(self.mirror.finish)
            stack.callback(self.writer.wait)
            for resource in (self.log, self.profile, self.loader):
                stack.callback(resource.close)


def is_due(config, every, step):
    """Whether something done every `every` steps is due behind `step`; what ends the run is done by itself."""
    return every > 0 and step % every == 0 and step < config.num_iterations


# %% [markdown]
# The loop. Its order at the end of a step is not a matter of taste: save first, then evaluate, then sample, because the
# latter two need memory that training did not, and a run of 29 hours has been lost to an evaluation that ran out of it
# (nanochat#446). An interrupt, Colab's stop button or a SIGTERM, is noted and obeyed between two steps.


# %%
def train(
    config, corpus, tokenizer, run_dir, *, model=GPT, mesh=None, prompts=(), on_log=None, mirror=None, remember=None
):
    """Trains from where `run_dir` stands to config.num_iterations and returns a Result.

    on_log(row) gets every row of metrics.jsonl as a dict; mirror, a common.HubMirror, keeps checkpoints elsewhere;
    remember, JSON such as a wandb run's id, travels in them. KeyboardInterrupt and SIGTERM save what was reached and
    return it. UserError: bad input, or a loss that is not finite; the last good checkpoint stays.
    """
    trainer = Trainer(config, corpus, tokenizer, run_dir, model, mesh or make_mesh(), prompts, on_log, mirror, remember)
    with common.deferred_interrupt() as interrupt, contextlib.closing(trainer):
        try:
            run_steps(trainer, interrupt)
            trainer.save()
        except KeyboardInterrupt:
            if interrupt.insisted or trainer.torn:
                raise
            trainer.save()
        except common.NonFiniteLoss:
            trainer.save_apart()
            raise
        if trainer.step < config.num_iterations:
            trainer.log.say(f"interrupted behind step {trainer.step:,}; the same command goes on from there")
        else:
            trainer.evaluate()
            trainer.sample()
        return trainer.result()


def run_steps(trainer, interrupt):
    """The loop itself: from where the trainer stands to the last step, or to an interrupt."""
    first, last = trainer.step, trainer.config.num_iterations
    if first:
        trainer.do_what_is_due(first)
    for step in range(first + 1, last + 1):
        if interrupt.requested:
            break
        trainer.log.add(step, trainer.advance(step - first - 1))
        if trainer.save_is_due(step):
            trainer.save()
        trainer.do_what_is_due(step)


# %% [markdown]
# ## Run
#
# What runs is decided by what is here, said in a line each, and yours to change: write `OVERRIDES` the way it would
# stand on a command line, `"--preset laptop --num_iterations 200"`, or pass the same words to `uv run 02_train.py`. The
# laptop preset is the same code at 1/37 of the size. A run is named after its settings, so that running all cells
# again goes on where it stopped, and a changed setting starts a new run.

# %%
PRESETS = {
    "chip": {},
    "gpu": {"attn_impl": "jax", "device_batch_size": 16},
    "laptop": {
        "n_head": 4,
        "head_dim": 64,
        "vocab_size": 8192,
        "seq_len": 256,
        "attn_impl": "einsum",
        "dtype": "float32",
        "device_batch_size": 8,
        "total_batch_size": 8,
        "num_iterations": 300,
        "learning_rate": 3e-3,
        "eval_every": 100,
        "eval_tokens": 1 << 16,
        "sample_every": 0,
        "loss_slice": 512,
    },
}
PROMPTS = {
    "stdlib": ("import ", "def __init__(self", '    """Return '),
    "default": ("The capital of France is", "If yesterday was Friday, then", "The chemical symbol of gold is"),
}


# %%
def train_run(run, config, hub_token=None, model=GPT):
    """Fetches what a Run needs, its corpus and tokenizer, and trains; returns (Result, tokenizer, mirror)."""
    mirror = common.open_mirror(run, hub_token)
    corpus = tok.get_corpus(run.data, run.num_shards)
    tokenizer = tok.get_tokenizer(corpus, config.vocab_size)
    prompts, run_dir = PROMPTS.get(corpus.name, PROMPTS["default"]), Path(run.out) / run.name
    return train(config, corpus, tokenizer, run_dir, model=model, prompts=prompts, mirror=mirror), tokenizer, mirror


# %%
OVERRIDES = ""  # @param ["", "--preset laptop", "--n_head 6 --num_iterations 2000"] {allow-input: true}

if __name__ == "__main__":
    common.keep_freed_memory()
    common.keep_compiled()
    run, config = common.choose(Config, PRESETS, OVERRIDES)
    print(describe_model(config))
    look_before(config, run.preflight)

# %% [markdown]
# Nothing has been downloaded yet, and a config that does not fit has been refused. The curve below grows with every
# evaluation.


# %%
if __name__ == "__main__":
    hub_token = common.read_secret("HF_TOKEN")
    result, tokenizer, mirror = train_run(run, config, hub_token)

# %% [markdown]
# ## Look
#
# A model of 7 million parameters that has read Python's own sources for two minutes writes Python-shaped nonsense, but
# predicts the next byte better than gzip does. That comparison is what to look at first; the samples are for pleasure.


# %%
if __name__ == "__main__":
    print(common.describe_result(result, config))

# %% [markdown]
# Where did the time go? TensorBoard has the curves of the run and, in its tab Profile, a trace of five steps. On a TPU
# or GPU every operation stands there under the name that its scope gave it: `layer_3/attention`, `lm_head`,
# `optimizer`. On a laptop: `uv run tensorboard --logdir runs`. What to look for is in README. The frame below stays
# blank where third-party cookies are blocked; the folder can be downloaded and looked at elsewhere.


# %%
if __name__ == "__main__":
    common.open_tensorboard(result.run_dir)

# %% [markdown]
# ## Save
#
# Colab's disk goes with its session, after a day at the latest and often after four hours. With a token (HF_TOKEN, in
# the environment or as a Colab secret) checkpoints have gone to a private repository of your own on the Hub all along,
# and a new machine goes on from there. What is left to add is a model that a stranger can use: weights, config,
# tokenizer, curve and a card with the five lines that load it, in one commit. Without a token the same folder stays
# here, as `model/` in the run's.


# %% cellView="form"
# @title A model read back
LOADING = """
import importlib
train = importlib.import_module("02_train")  # in a clone of {repository}
config, params, tokenizer = train.load_model({source!r})
[(prompt, text)] = train.make_sample_writer(config, tokenizer, [{prompt!r}])(params)
print(prompt + text)
"""


def load_model(source, model=GPT, config_class=Config):
    """(config, params, tokenizer) of what export_model left in a folder or a Hub repository; UserError if it is none.

    A private repository asks for HF_TOKEN in the environment.
    """
    folder = Path(source)
    if not folder.is_dir():
        fetch = lambda: common.load_hub().snapshot_download(source, ignore_patterns="checkpoints/*")
        folder = Path(common.try_again(fetch, f"{source}: no folder, and cannot be downloaded"))
    require((folder / "tokenizer.json").exists(), "model", source, "has no tokenizer.json: is its training complete?")
    about = json.loads((folder / "config.json").read_text())
    config = config_class(**about.get("config", about))  # a checkpoint's holds nothing else
    make = lambda: split_trainable(model.init_params(config, jax.random.key(0)))
    params = common.unflatten(jax.eval_shape(make)[0], load_file(folder / "params.safetensors"))
    constants = jax.jit(lambda: make()[1])()
    return config, merge_params(jax.device_put(params), constants), tok.load_tokenizer(folder / "tokenizer.json")


# %% cellView="form"
# @title The folder for the Hub
def name_dataset(about):
    """The Hub's name of what a run was trained on, from its config.json; empty where that is no dataset of the Hub."""
    return tok.FINEWEB_REPO if about["data"]["name"] == "fineweb-edu" else ""


def export_model(result, tokenizer, source="", loading=LOADING, notes=common.PLAIN_WEIGHTS, repository=REPOSITORY):
    """Leaves in run_dir/model all that a stranger needs: weights, config, tokenizer, curve, card; returns the folder.

    source: the Hub repository that it will be uploaded to, for the card; the folder itself if there is none.
    """
    folder, checkpoint = result.run_dir / "model", common.newest_checkpoint(result.run_dir / "checkpoints")
    folder.mkdir(exist_ok=True)
    about = json.loads((result.run_dir / "config.json").read_text())
    described = (result.run_dir / name for name in ("config.json", "loss.png"))
    for path in (checkpoint / "params.safetensors", *filter(Path.exists, described)):
        with common.atomic_write(folder / path.name) as part:
            shutil.copyfile(path, part)
    tok.export_tokenizer(tokenizer, folder)
    size = sum(leaf.size for leaf in jax.tree.leaves(split_trainable(result.params)[0]))
    prompt = result.samples[0][0] if result.samples else "The "
    lines = loading.format(repository=repository, source=source or str(folder), prompt=prompt)
    dataset = name_dataset(about)
    with common.atomic_write(folder / "README.md") as part:
        part.write_text(common.model_card(result, about, size, lines, dataset, notes), encoding="utf-8")
    return folder


# %% [markdown]
# An idle machine costs as much as a busy one. With `GIVE_BACK` ticked before *Run all*, Colab's machine is given back
# as soon as everything is on the Hub; without a token it stays, because its disk is then the only home of the model.

# %%
GIVE_BACK = False  # @param {type:"boolean"}

if __name__ == "__main__":
    folder = export_model(result, tokenizer, mirror.repo if mirror else "")
    uploaded = common.upload_folder(folder, sorted(os.listdir(folder)), hub_token, run.hub_repo, f"onechip-{run.name}")
    if GIVE_BACK:
        common.give_back_machine(uploaded)
