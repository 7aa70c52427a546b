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
# One function, `train`, takes documents and a `Config` and leaves a trained GPT behind: a transformer in the manner of
# nanochat, four interchangeable attentions, AdamW, a prefetching loader, sampling, a profile and a checkpoint, all of
# it raw JAX that fits one screen at a time. The same file runs on a TPU v6e, a GPU, several chips and a laptop.
#
# | where | model | time | memory | cost |
# |---|---|---|---|---|
# | laptop, two cores, no network | 7M parameters, Python's own sources | 2.5 minutes | under 2 GB | nothing |
# | Colab, TPU v6e | 268M parameters, FineWeb-Edu | hours; resumes where it stopped | under 31.25 GiB | compute units |

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
# ## A whole training, in one cell
#
# This is all there is to it: a pytree of parameters, a loss, `jax.value_and_grad`, an update, one jitted step in a
# loop. The toy below predicts the next byte of Python's own sources from the bytes before it, and its loss falls from
# log(256) = 5.55 nats in two seconds. The rest of the notebook is the same loop at scale: a real model, a loss and an
# optimizer that fit the chip, data that never runs out, and nothing lost when Colab disconnects.


# %%
import inspect

import onechip  # noqa: F401  (before jax: it keeps an idle libtpu quiet)

# isort: split
import jax
import jax.numpy as jnp

from onechip.machine import prepare, wants_a_look

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them


def train_toy(steps=60):
    """Trains one layer of causal attention on bytes for a few seconds; prints its loss in nats per byte."""
    T, D = 64, 32
    text = jnp.frombuffer(inspect.getsource(inspect).encode(), jnp.uint8).astype(jnp.int32)  # Python that all have
    shapes = {"embed": (256, D), "query": (D, D), "key": (D, D), "value": (D, D), "head": (D, 256)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    params = {name: 0.1 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}

    def loss(params, tokens):
        x = params["embed"][tokens[:, :-1]]
        scores = jnp.einsum("btd,bsd->bts", x @ params["query"], x @ params["key"])
        weights = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf))  # nobody sees a later byte
        x = x + weights @ (x @ params["value"])
        log_probabilities = jax.nn.log_softmax(x @ params["head"])
        return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))

    @jax.jit
    def step(params, key):
        starts = jax.random.randint(key, (16,), 0, len(text) - T - 1)
        value, grads = jax.value_and_grad(loss)(params, text[starts[:, None] + jnp.arange(T + 1)])
        return jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, grads), value  # signSGD is enough for a toy

    for i in range(steps):
        params, value = step(params, jax.random.key(i))
        if i % 20 == 0 or i == steps - 1:
            print(f"toy: step {i:2}: loss {value:.2f} nats per byte")


if LOOK:
    prepare()
    train_toy()

# %% [markdown]
# ## Setup
#
# Importing this file defines things and does nothing else: what runs is under `if __name__ == "__main__":`, small
# checks under `if LOOK:`, which a script with flags skips. Documents and tokens come from `01_tokenizer`, plumbing
# from `onechip/`. Shapes are written with nine letters, in lower case in einsums, as in *How to Scale Your Model*
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
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from onechip import fit
from onechip.card import PLAIN_WEIGHTS, describe_result
from onechip.chips import topology_devices
from onechip.doors import Model, Optimizer, Task, config_with
from onechip.errors import UserError, require, say, stop_here
from onechip.export import (
    config_of,
    export_weights,
    find_model,
    find_model_files,
    find_optimizer,
    names_of_files,
    write_card,
)
from onechip.hosts import is_first, spread
from onechip.hub import upload_folder
from onechip.layers import head_loss, head_losses, relu_squared, rms_norm, rope_and_norm, soft_cap, tokens_in_lanes
from onechip.lock import RunLock
from onechip.machine import give_back_machine, open_tensorboard, read_secret
from onechip.mesh import (
    AXES,
    UNSHARED,
    Spread,
    as_shares,
    build_mesh,
    bytes_on_device,
    compiler_options,
    describe_mesh,
    gather,
    gather_all_but,
    has_shares,
    keep_no_gathered,
    mean_over_devices,
    meshes_of,
)
from onechip.mirror import check_mirror, open_mirror
from onechip.questions import Text
from onechip.resume import bring_back, describe_machine, find_data, find_tokenizer
from onechip.rows import Embeddings, lookup
from onechip.runfolder import TOKENIZER, RunFolder
from onechip.scoring import make_scorer
from onechip.session import Session
from onechip.settings import Run, check_fields, choose, name_run, peek, setting, settle
from onechip.stages import stages_of
from onechip.weights import (
    Weight,
    bytes_of,
    cast_weights,
    constant,
    count_by_kind,
    draw_weights,
    normal,
    place_like,
    stored_like,
    uniform,
    widened,
)

tok = importlib.import_module("01_tokenizer")

# %% [markdown]
# ## Config
#
# Every number that you may want to change is a field here, with its rule and its help: `--help` prints them. Bad
# values are refused at once, with the field, the value and what would be right.
#
# - **One knob scales it**: `n_head`. The width is `n_head * head_dim`, with a layer per `aspect_ratio` channels of
#   width: 8 heads give 1024 channels, 16 layers and 268.4M parameters.
# - **It is static to `jit`**: change a field and the step is compiled again.
# - **A run refuses to resume if a `fixed` field has changed.**


# %%
ATTENTION_NAMES = ("einsum", "jax", "splash", "pallas")
REMAT_NAMES = ("none", "dots", "all")
PACKING_NAMES = ("stream", "best-fit")
GATHER_NAMES = ("layer", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What training needs of any model. A model's Config adds n_head, n_kv_head, head_dim, n_embd, n_layer, mlp_dim,
    and is registered with jax.tree_util.register_static; it may override check_sizes and smaller_models."""

    vocab_size: int = setting(32768, "tokens in the vocabulary, the nine special ones included", fixed=True, at_least=1)
    seq_len: int = setting(2048, "tokens of context", fixed=True, at_least=2)
    window_pattern: str = setting("SSSL", "per layer, tiled: S sees half the context, L all; last: L", fixed=True)
    softcap: float = setting(
        15.0, "logits are bounded to +-softcap by tanh; 0 for no bound", fixed=True, at_least=0, at_most=60,
        why="exp(softcap) summed must fit float32",
    )  # fmt: skip
    rope_base: float = setting(10000.0, "longest rotary wavelength, in units of 2 pi tokens", fixed=True, above=0)
    attn_impl: str = setting("pallas", "einsum, jax: any device; splash, pallas: TPU", choices=ATTENTION_NAMES)
    dtype: str = setting("bfloat16", "compute type; master weights stay float32", choices=("bfloat16", "float32"))
    device_batch_size: int = setting(2, "sequences per microbatch and device", at_least=1)
    total_batch_size: int = setting(64, "sequences per step, on all devices, accumulated", fixed=True, at_least=1)
    num_iterations: int = setting(20000, "optimizer steps", at_least=1)
    learning_rate: float = setting(7e-4, "peak learning rate", above=0)
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only", at_least=0)
    beta1: float = setting(0.9, "AdamW: decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW: decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "AdamW: added to the root of the second moment", above=0)
    steps_before: int = setting(0, "steps of the run whose moments this one begins with", fixed=True, at_least=0)
    grad_clip: float = setting(1.0, "largest global norm of the gradient; 0 for no clipping", at_least=0)
    warmup_ratio: float = setting(0.02, "share of the steps in which the learning rate rises", at_least=0, at_most=1)
    warmup_steps: int = setting(0, "steps in which it rises; 0: by warmup_ratio", at_least=0)
    warmdown_ratio: float = setting(0.5, "share of the steps, the last ones, in which it falls", at_least=0, at_most=1)
    final_lr_frac: float = setting(0.0, "what it falls to, as a share of learning_rate", at_least=0, at_most=1)
    eval_every: int = setting(250, "steps between evaluations; 0 for one at the end only", at_least=0)
    eval_tokens: int = setting(1 << 20, "held-out tokens of an evaluation, whatever the batch size", at_least=1)
    eval_core_every: int = setting(0, "steps between evaluations on tasks, as 06_eval's; 0 for none", at_least=0)
    eval_core_examples: int = setting(200, "examples a task that such an evaluation asks; 0 for all", at_least=0)
    sample_every: int = setting(1000, "steps between samples; 0 for those at the end only", at_least=0)
    save_every: int = setting(1000, "steps between checkpoints; 0: by the clock and before the above", at_least=0)
    save_minutes: float = setting(15.0, "minutes between checkpoints at most; 0 for no such limit", at_least=0)
    keep: int = setting(2, "newest checkpoints that stay; the best one stays as well", at_least=1)
    stages: str = setting(
        "", "smaller batches first, STEP:ROWSxTOKENS up to that step: '500:128x512 1000:256x1024'", fixed=True
    )
    packing: str = setting(
        "stream", "rows cut from one stream, or each begun by a document", fixed=True, choices=PACKING_NAMES
    )
    param_seed: int = setting(42, "seed of the initial weights", fixed=True)
    loss_slice: int = setting(8192, "tokens whose logits exist at one time", at_least=1)
    gather: str = setting(
        "layer", "weights split over devices are whole: by layer, or all, once a step: faster, takes more memory",
        choices=GATHER_NAMES,
    )  # fmt: skip
    remat: str = setting(
        "none",
        "what gradients need of a layer and compute again: dots: all but products; all: all of it",
        choices=REMAT_NAMES,
    )

    @property
    def windows(self):
        """Keys that a query sees in each layer, itself included: (n_layer,) ints."""
        span = {"S": max(1, self.seq_len // 2), "L": self.seq_len}
        pattern = itertools.islice(itertools.cycle(self.window_pattern), self.n_layer - 1)
        return (*(span[letter] for letter in pattern), self.seq_len)

    @property
    def long_windows(self):
        """The same in texts longer than seq_len, which only an evaluation has."""
        return self.windows

    @property
    def score_scale(self):
        """What attention's scores, products of normed queries and keys, are multiplied by."""
        return self.head_dim**-0.5

    @property
    def gated_layers(self):
        """Which layers add something to their values, as `attend` takes it: (n_layer,) bools, for estimates of time."""
        return (False,) * self.n_layer

    @property
    def sizes(self):
        """{letter: size} of the axes that a weight can have."""
        sizes = {"D": self.n_embd, "N": self.n_head, "K": self.n_kv_head, "H": self.head_dim, "F": self.mlp_dim}
        return {**sizes, "L": self.n_layer, "V": self.vocab_size}

    def check_sizes(self):
        """Raises UserError for sizes that cannot work; a model's Config says which."""

    def recomputing(self):
        """Configs that keep less of a layer for its gradient, most first: slower, and smaller in memory."""
        for name in REMAT_NAMES[REMAT_NAMES.index(self.remat) + 1 :]:
            yield dataclasses.replace(self, remat=name)

    def smaller_models(self):
        """Configs of smaller models, nearest first: what to propose where this one does not fit."""
        return ()

    def __post_init__(self):
        check_fields(self)
        self.check_sizes()
        check_relations(self)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Model and training parameters."""

    n_head: int = setting(8, "query heads; scales the model: n_embd = n_head * head_dim", fixed=True, at_least=1)
    n_kv_head: int = setting(0, "key/value heads, dividing n_head; 0: as many as n_head", fixed=True, at_least=0)
    head_dim: int = setting(128, "channels per head; a v6e matrix unit is 256 wide", fixed=True, at_least=1)
    aspect_ratio: int = setting(64, "channels per layer: n_layer = n_embd // aspect_ratio", fixed=True, at_least=1)

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
        width = f"must be a multiple of aspect_ratio={self.aspect_ratio}, so that n_layer is whole"
        require(self.n_embd % self.aspect_ratio == 0, "n_embd = n_head * head_dim", self.n_embd, width)

    def smaller_models(self):
        """Configs of fewer heads, nearest first: what to propose where this one does not fit."""
        step = self.aspect_ratio // math.gcd(self.head_dim, self.aspect_ratio)  # so that n_layer stays whole
        for n in range(self.n_head - step, 0, -step):
            kv = n if self.n_kv_head == self.n_head else math.gcd(n, self.n_kv_head)
            yield dataclasses.replace(self, n_head=n, n_kv_head=kv)


# %% [markdown]
# A preset is what suits a device; the laptop's is the same code at 1/37 of the size.

# %%
PRESETS = {
    "chip": {},
    "gpu": {"attn_impl": "jax", "device_batch_size": 16},
    "laptop": {
        "n_head": 4, "head_dim": 64, "vocab_size": 8192, "seq_len": 256, "attn_impl": "einsum", "dtype": "float32",
        "device_batch_size": 8, "total_batch_size": 8, "num_iterations": 300, "learning_rate": 3e-3,
        "eval_every": 100, "eval_tokens": 1 << 16, "sample_every": 0, "loss_slice": 512,
    },
}  # fmt: skip

# %% [markdown]
# Some rules relate two fields.


# %% cellView="form"
# @title Relations between fields
MOST_LAYERS = 4096  # far beyond any model; a table of billions would take the machine's memory before it is refused


def check_relations(config):
    """Raises UserError for the first relation between a Config's fields that cannot work."""
    c = config
    require(c.n_layer <= MOST_LAYERS, "n_layer", c.n_layer, f"must be at most {MOST_LAYERS}")
    require(c.num_iterations < 2**31, "num_iterations", c.num_iterations, "must fit into 32 bits")
    ramps = (0 if c.warmup_steps else c.warmup_ratio) + c.warmdown_ratio
    require(ramps <= 1, "warmup_ratio + warmdown_ratio", ramps, "must not exceed 1")
    require(c.n_head % c.n_kv_head == 0, "n_kv_head", c.n_kv_head, f"must divide n_head={c.n_head}")
    require(c.head_dim % 2 == 0, "head_dim", c.head_dim, "must be even: RoPE turns pairs of channels")
    letters = bool(c.window_pattern) and set(c.window_pattern) <= {"S", "L"}
    require(letters, "window_pattern", c.window_pattern, 'use the letters S and L, such as "SSSL" or "L"')
    batches = f"must be a multiple of device_batch_size={c.device_batch_size}"
    require(c.total_batch_size < 2**31, "total_batch_size", c.total_batch_size, "must fit into 32 bits")
    require(c.total_batch_size % c.device_batch_size == 0, "total_batch_size", c.total_batch_size, batches)
    stages_of(c)
    if c.attn_impl in ("splash", "pallas"):
        from onechip.kernels import check_kernel  # here, as Pallas takes 0.3 s to import

        check_kernel(c.attn_impl, c.seq_len, c.head_dim)
        largest = c.head_dim * c.score_scale  # of a score; the kernels subtract no maximum before exp
        bound = "must not exceed 80, or exp() overflows in attn_impl='pallas': use attn_impl='splash'"
        require(c.attn_impl == "splash" or largest <= 80, "head_dim * score_scale", largest, bound)


# %%
if LOOK:
    toy = Config(
        n_head=2, head_dim=16, aspect_ratio=16, vocab_size=512, seq_len=64, attn_impl="einsum", dtype="float32",
        device_batch_size=2, total_batch_size=4, loss_slice=64, num_iterations=20, learning_rate=1e-2,
    )  # fmt: skip
    print(f"{toy.n_layer} layers of {toy.n_embd} channels; windows {toy.windows}")
    try:
        Config(learning_rate=-1.0)
    except UserError as error:
        print(f"refused: {error}")

# %% [markdown]
# ## Model
#
# ### Weights
#
# A model is a table of its weights and three functions. The table gives, of each array:
#
# - **its axes**, by their letters: `"D->NH"` is a matrix from D inputs to N heads of H outputs. Heads are axes of
#   their own, so that an einsum makes them without a reshape.
# - **how it starts**: projections out of a block at zero, so that at step 0 the residual stream is the embedding,
#   scaled. lm_head starts at 0.001, so the first loss is log(V) to within 0.001: 10.4 nats at 32,768.
# - **its kind**: how it is counted, whether it decays, in which type it computes. Whatever the type at rest, float32
#   here, the optimizer computes in float32.
#
# Initialization, counting, casting, sharding and the optimizer all read this table. The parameters themselves are a
# plain pytree of float32 arrays with the same keys.


# %%
def gpt_weights(config):
    """GPT's table: wte (V, D), lm_head (D, V), layers[i], and two lambdas (L,) that mix the residual stream."""
    layer = {
        "c_q": Weight("D->NH", uniform, "attention"),
        "c_k": Weight("D->KH", uniform, "attention"),
        "c_v": Weight("D->KH", uniform, "attention"),
        "c_fc": Weight("D->F", uniform, "mlp"),
        "c_proj": Weight("NH->D", constant(0.0), "attention"),
        "mlp_proj": Weight("F->D", constant(0.0), "mlp"),
    }
    return {
        "wte": Weight("V->D", normal(1.0), "embed"),
        "lm_head": Weight("D->V", normal(0.001), "lm_head"),
        "layers": [layer] * config.n_layer,
        "resid_lambdas": Weight("L", constant(1.0), "scalar", "resid_lambdas"),
        "x0_lambdas": Weight("L", constant(0.1), "scalar", "x0_lambdas"),
    }


def init_params(config, key):
    """GPT's parameters, float32, as its table says."""
    return draw_weights(config, gpt_weights(config), key)


# %%
if LOOK:
    toy_params = init_params(toy, jax.random.key(0))
    print({name: toy_params[name].shape for name in ("wte", "lm_head")}, toy_params["layers"][0]["c_q"].shape)

# %% [markdown]
# ### Norm, rotation, ReLU squared
#
# Three small functions come from `onechip/layers.py`, each with a gradient of its own, because autodiff keeps more
# than it needs.
#
# - **RMSNorm**, x / rms(x), has no parameters (Zhang and Sennrich, 2019).
# - **RoPE** (Su et al., 2021) turns channel i against channel i + H / 2, by minus the angle as nanochat does.
#   **QK-norm** follows in the same pass: a rotation changes no length, so the order does not matter. Normed queries
#   and keys bound every score by sqrt(H), 11.3 at 128 channels. That is why a learning rate this high does not
#   diverge.
# - **ReLU squared** is from *Primer* (So et al., 2021).


# %%
@functools.lru_cache(maxsize=4)
def rope_tables(config, length=0):
    """Cosines and signed sines of the rotary angles over a whole head: NumPy float32 (length or seq_len, H) each."""
    frequencies = config.rope_base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.outer(np.arange(length or config.seq_len), frequencies)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.hstack([cos, cos]).astype(np.float32), np.hstack([sin, -sin]).astype(np.float32)


def rope_at(config, start, length):
    """Cosines and signed sines (length, H) of the positions start, start + 1, ..."""
    return tuple(jax.lax.dynamic_slice_in_dim(jnp.asarray(table), start, length) for table in rope_tables(config))


# %%
if LOOK:
    x = jax.random.normal(jax.random.key(1), (1, toy.seq_len, 2, toy.head_dim))
    turned = rope_and_norm(x, *rope_at(toy, 0, toy.seq_len))
    print(f"rms of rotated, normed heads: {jnp.sqrt(jnp.mean(turned**2)):.4f}; relu_squared(3) = {relu_squared(3.0)}")

# %% [markdown]
# ### Attention, four times
#
# One function, four implementations. All take q (B, T, N, H) and k, v (B, T, K, H) as they leave their products,
# rotate and norm q and k, and let query head n read key/value head n // (N / K). Tests hold them equal in value and
# gradient.
#
# - `einsum` is the one to read: scores, mask, softmax, sum. It takes 256 queries at a time (an eighth of a longer
#   context), and only the keys that some of them see: on a CPU a step of 1,024 tokens is 1.3 times as fast as with all
#   T x T at once. Its weights stay in memory for the gradient, 72 MiB a sequence and full layer at the default size.
# - `jax` is JAX's own, as XLA operations on any device.
# - `splash` is JAX's Splash Attention, a TPU kernel that never writes the T x T matrix and skips what a window masks.
# - `pallas` is our own pair of TPU kernels in `onechip/kernels.py`. They rotate and norm on the way: 513 ms a step by
#   the compiler's estimate, 709 with Splash.


# %%
def masked_attention(q, k, v, mask, scale):
    """softmax(scale * q k) v over the keys where mask (T, S) is true, softmax in float32; returns (B, T, N, H)."""
    B, T, N, H = q.shape
    q = q.reshape(B, T, k.shape[2], -1, H)  # query heads in groups g that share a key/value head
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def window_mask(queries, keys, window):
    """True where a key position is not after the query's and among its last `window`: (len(queries), len(keys))."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance < window)


def attention_einsum(q, k, v, rope, window, scale):
    q, k = rope_and_norm(q, *rope), rope_and_norm(k, *rope)
    T, parts = q.shape[1], []
    block = max(256, -(-T // 8))  # no more than eight: each is compiled by itself
    for start in range(0, T, block):
        end, first = min(start + block, T), max(0, start - window + 1)  # no query of this block sees an earlier key
        mask = window_mask(jnp.arange(start, end), jnp.arange(first, end), window)
        parts.append(masked_attention(q[:, start:end], k[:, first:end], v[:, first:end], mask, scale))
    return jnp.concatenate(parts, axis=1)


def attention_jax(q, k, v, rope, window, scale):
    q, k = rope_and_norm(q, *rope), rope_and_norm(k, *rope)
    # A window of all T keys is no window: is_causal says it all, and spares a second mask.
    local = None if window >= q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, local_window_size=local)


def attention_splash(q, k, v, rope, window, scale):
    from onechip.splash import splash_attention

    return splash_attention(rope_and_norm(q, *rope), rope_and_norm(k, *rope), v, window, scale)


def attention_pallas(q, k, v, rope, window, scale, more=None):
    from onechip.kernels import pallas_attention

    return pallas_attention(q, k, v, *rope, window, scale, more)


ATTENTIONS = dict(
    zip(ATTENTION_NAMES, (attention_einsum, attention_jax, attention_splash, attention_pallas), strict=True)
)

# %%
if LOOK:
    q, k, v = jax.random.normal(jax.random.key(2), (3, 1, toy.seq_len, 2, toy.head_dim))
    cases = rope_at(toy, 0, toy.seq_len), 32, toy.score_scale
    einsum, other = (attention(q, k, v, *cases) for attention in (attention_einsum, attention_jax))
    print(f"attention {einsum.shape}: einsum and jax differ by {jnp.max(jnp.abs(einsum - other)):.1e}")

# %% [markdown]
# While a model writes, the keys and values of the past wait in a cache, and only the new positions are computed. The
# cache goes in and comes out like everything else; training has none.


# %%
class Cache(NamedTuple):
    """What a model that writes keeps of the tokens so far.

    start: how many there are, int32; before: the last of them (B, 1) int32, -1 if there is none; layers: for each, k
    (B * K, S, H) and v (B * K, H, S), in the layout that its two products take: any other, XLA would convert for each
    token. Positions from `start` on may hold anything: no query sees them.
    """

    start: jax.Array
    before: jax.Array
    layers: tuple


def empty_cache(config, rows, length):
    """A Cache for `length` positions of `rows` texts."""
    K, H = config.n_kv_head, config.head_dim
    k, v = (jnp.zeros((rows * K, *shape), config.dtype) for shape in ((length, H), (H, length)))
    return Cache(jnp.zeros((), jnp.int32), jnp.full((rows, 1), -1, jnp.int32), ((k, v),) * config.n_layer)


def attend(config, i, rope, start, past, q, k, v, more=None):
    """Layer i's attention over q, k, v and, if there is one, its part of a cache: (out (B, T, N, H), that part).

    more: what is added to v, a gate (B, T, K) float32 for each head and rows (B, T, K * H); `pallas` adds it on the
    way, which saves copies.
    """
    if more is not None and (past is not None or config.attn_impl != "pallas"):
        gate, rows = more
        v, more = v + gate.astype(v.dtype)[..., None] * rows.reshape(v.shape), None
    if past is None:
        added = {} if more is None else {"more": more}
        return ATTENTIONS[config.attn_impl](q, k, v, rope, config.windows[i], config.score_scale, **added), None
    (B, T, _, H), S = q.shape, past[0].shape[1]
    q, k = rope_and_norm(q, *rope), rope_and_norm(k, *rope)
    append = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start)
    keys = append(past[0], k.transpose(0, 2, 1, 3).reshape(-1, T, H), axis=1)
    values = append(past[1], v.transpose(0, 2, 3, 1).reshape(-1, H, T), axis=2)
    k, v = keys.reshape(B, -1, S, H).transpose(0, 2, 1, 3), values.reshape(B, -1, H, S).transpose(0, 3, 1, 2)
    mask = window_mask(start + jnp.arange(T), jnp.arange(S), config.windows[i])
    return masked_attention(q, k, v, mask, config.score_scale), (keys, values)


# %% [markdown]
# ### Blocks
#
# A model's three functions: `embed` makes the residual stream, `block` is a layer, `readout` makes the final hidden
# states. They see the streams so far, from the embedding on: GPT's layer mixes in the first with a weight of its own,
# 0.1 at the start (modded-nanogpt's x0 lambdas); another model may subtract a middle one before the head.


# %%
def gpt_embed(config, params, tokens, before):
    """The residual stream (B, T, D) of tokens (B, T); before (B, 1): the token just before them, -1 or None if none."""
    return rms_norm(lookup(params["wte"], tokens))


def attention_block(layer, x, attend, more_v=None):
    """(what attention adds to the residual stream x (B, T, D), its part of the cache).

    more_v(normed x): what is added to the values, as `attend` takes it.
    """
    x = rms_norm(x)
    q = jnp.einsum("btd,dnh->btnh", x, layer["c_q"])
    k = jnp.einsum("btd,dkh->btkh", x, layer["c_k"])
    v = jnp.einsum("btd,dkh->btkh", x, layer["c_v"])
    y, past = attend(q, k, v) if more_v is None else attend(q, k, v, more_v(x))
    return jnp.tensordot(y, layer["c_proj"], 2), past  # einsum contracts (h, n), for which a CPU transposes


def mlp_block(layer, x):
    """What the MLP adds to the residual stream x (B, T, D)."""
    hidden = relu_squared(jnp.einsum("btd,df->btf", rms_norm(x), layer["c_fc"]))
    return jnp.einsum("btf,fd->btd", hidden, layer["mlp_proj"])


def mix(a, x, b, x0):
    """a * x + b * x0 in the dtype of x, for float32 scalars a and b: bfloat16 could not hold a step of 1e-3 at 1."""
    return (a * x.astype(jnp.float32) + b * x0.astype(jnp.float32)).astype(x.dtype)


def gpt_block(config, params, i, streams, tokens, attend):
    """(the residual stream (B, T, D) after layer i, its part of the cache).

    streams: the residual stream after the embedding and after each layer so far; tokens (B, T): their ids;
    attend(q, k, v, more=None): this layer's attention, (B, T, N, H) and its part of the cache.
    """
    layer, x = params["layers"][i], streams[-1]
    with jax.named_scope(f"layer_{i}/attention"):
        x = mix(params["resid_lambdas"][i], x, params["x0_lambdas"][i], streams[0])
        y, past = attention_block(layer, x, attend)
        x = x + y
    with jax.named_scope(f"layer_{i}/mlp"):
        return x + mlp_block(layer, x), past


def gpt_readout(config, params, streams):
    """Final hidden states (B, T, D), normed, which lm_head multiplies."""
    return rms_norm(streams[-1])


GPT = Model("02_train.GPT", Config, gpt_weights, gpt_embed, gpt_block, gpt_readout, presets=PRESETS)


# Rematerialization (Chen et al., 2016): what of a layer is kept for its gradient; the rest is computed once more.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


def backbone(config, model, params, tokens, cache=None):
    """(final hidden states (B, T, D) in the compute type, the cache with these tokens added) for tokens (B, T) int32.

    params: matrices in the compute type already. Without a cache the tokens begin a text, and None comes back.
    """
    start, before, past = (0, None, [None] * config.n_layer) if cache is None else cache
    rope = rope_at(config, start, tokens.shape[1])
    params = gather_all_but(params, "layers", "lm_head")
    policy = REMAT_POLICIES.get(config.remat, keep_no_gathered if has_shares(params) else None)
    with jax.named_scope("embedding"):
        streams, added = [model.embed(config, params, tokens, before)], []

    def run_layer(i, params, streams):
        layers = [gather(layer) if n == i else layer for n, layer in enumerate(params["layers"])]
        attend_here = functools.partial(attend, config, i, rope, start, past[i])
        return model.block(config, params | {"layers": layers}, i, streams, tokens, attend_here)

    for i in range(config.n_layer):
        block = functools.partial(run_layer, i)
        x, kv = (jax.checkpoint(block, policy=policy) if policy else block)(params, streams)
        streams.append(tokens_in_lanes(x))
        added.append(kv)
    hidden = model.readout(config, params, streams)
    grown = None if cache is None else Cache(start + tokens.shape[1], tokens[:, -1:], tuple(added))
    return hidden, grown


def logits_of(config, params, hidden):
    """Logits (..., V), soft-capped, in float32 for hidden states (..., D)."""
    with jax.named_scope("lm_head"):
        z = jnp.einsum("...d,dv->...v", hidden, params["lm_head"], preferred_element_type=jnp.float32)
        return soft_cap(config.softcap, z)[0]


def forward(config, params, tokens, model=GPT):
    """Logits (B, T, V) in float32 for tokens (B, T) int32."""
    params = cast_weights(model.weights(config), params, config.dtype)
    return logits_of(config, params, backbone(config, model, params, tokens)[0])


# %%
if LOOK:
    toy_tokens = jnp.arange(2 * 16).reshape(2, 16)
    logits = forward(toy, toy_params, toy_tokens)
    print(f"logits {logits.shape} {logits.dtype}, {logits.std():.4f} wide at the start")

# %% [markdown]
# ### Counting
#
# A multiplication by a weight costs 2 FLOPs forward and 4 backward, so 6 per parameter and token; an embedding is a
# lookup and costs none. Attention adds 12 per channel and key that a query really sees: on average (T + 1) / 2 in a
# causal layer, three eighths of T in an S layer.
#
# MFU, model FLOPs utilization, is the share of the chip's peak that goes into these FLOPs and nothing else. A v6e can
# do 918e12 a second and a token of the default model costs 1.57e9, so 100 % would be 584 thousand tokens a second.
# Many published figures count all T keys, 15 % more at the default size. Both are printed; the bar shows the smaller
# MFU.


# %%
def mean_keys(seq_len, window):
    """Keys a query sees on average, under causality and a window of `window` keys."""
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def count_params(config, model=GPT):
    """Parameters by kind: {"embed", "attention", "mlp", "lm_head", "scalar", "total"} -> int."""
    return count_by_kind(config, model.weights(config))


def flops_per_token(config, model=GPT, full_attention=False):
    """Training FLOPs per token; full_attention counts all T keys per query, as many published MFU figures do."""
    counts = count_params(config, model)
    spans = [config.seq_len if full_attention else mean_keys(config.seq_len, w) for w in config.windows]
    matrices = counts["attention"] + counts["mlp"] + counts["lm_head"]
    return 6 * matrices + 12 * config.n_head * config.head_dim * sum(spans)


def describe_model(config, model=GPT):
    """A table of parameters by kind, and FLOPs per token, as text."""
    counts = count_params(config, model)
    rows = [f"  {name:<10}{n:>14,}{n / counts['total']:>8.1%}" for name, n in counts.items() if n]
    flops = flops_per_token(config, model), flops_per_token(config, model, full_attention=True)
    return "\n".join(["parameters", *rows, "FLOPs per token: {:.3g} ({:.3g} counting all T keys)".format(*flops)])


# %%
if LOOK:
    print(f"toy: {count_params(toy)['total']:,} parameters; default: {count_params(Config())['total']:,}")

# %% [markdown]
# ## Loss
#
# Logits are soft-capped, 15 tanh(z / 15), in float32. That bounds what a confident mistake can cost, 40 nats, so that
# no single token dominates a batch. It bounds exp() as well, so that the usual subtraction of the maximum, a pass over
# all logits, can be left out.
#
# Logits are also the largest thing in training: 8,192 tokens by 32,768 words in float32 would be 1 GiB, and autodiff
# would keep several of that size. `head_loss` of `onechip/layers.py` is the mean of logsumexp(z) - z[y], no more, but
# forms its gradient where the logits are, slice by slice in the forward pass (the idea of Liger's fused loss and of
# cut cross-entropy, Wijmans et al., 2024). The check below holds it to the plain version.


# %%
def cross_entropy(config, model, params, batch):
    """Mean cross-entropy in nats per target, float32 scalar: the loss of pretraining.

    batch: {"x", "y": (B, T) int32} and, if not every target counts, {"mask": (B, T)}; params: cast already.
    """
    hidden, _ = backbone(config, model, params, batch["x"])
    lm_head = gather(params["lm_head"])
    return head_loss(config.softcap, config.loss_slice, hidden, lm_head, batch["y"], batch.get("mask"))


def token_losses(config, model, params, x, y):
    """Cross-entropy in nats of every token: float32 (B, T), for x, y (B, T) int32; params: cast already."""
    hidden, _ = backbone(config, model, params, x)
    return head_losses(config.softcap, config.loss_slice, hidden, params["lm_head"], y)


# %%
if LOOK:
    toy_batch = {"x": toy_tokens, "y": toy_tokens + 1}
    loss, grads = jax.value_and_grad(functools.partial(cross_entropy, toy, GPT))(toy_params, toy_batch)
    hits = jnp.take_along_axis(logits, toy_batch["y"][..., None], axis=-1)[..., 0]
    print(f"loss {loss:.3f}, log({toy.vocab_size}) = {math.log(toy.vocab_size):.3f}; "
          f"the plain version gives {jnp.mean(jax.nn.logsumexp(logits, axis=-1) - hits):.3f}")  # fmt: skip

# %% [markdown]
# ## Optimizer
#
# AdamW (Loshchilov and Hutter, 2019) is eight lines over a pytree. An optimizer is two functions, `init` and `update`;
# both see the table of weights, so that nothing is guessed from a name or a number of axes. Its state is one pytree of
# any form, saved under one key. `--optimizer muon` takes that of `05_speedrun` instead, with settings of its own.
#
# - **Weight decay** falls on matrices only: a decayed scalar would just be pulled from the value it was set to.
# - **The learning rate** rises over the first 2 % of the steps, stays, and falls linearly over the last half,
#   nanochat's trapezoid: most of the gain in loss comes in that fall.


# %%
def learning_rate_at(config, step):
    """The learning rate of a 0-based step: linear warm-up, constant, linear warm-down to final_lr_frac. float32."""
    warmup = config.warmup_steps or max(1, round(config.warmup_ratio * config.num_iterations))
    warmdown = max(1, round(config.warmdown_ratio * config.num_iterations))
    left = jnp.clip((config.num_iterations - step) / warmdown, 0.0, 1.0)
    fall = left + (1 - left) * config.final_lr_frac
    return config.learning_rate * jnp.where(step < warmup, (step + 1) / warmup, fall)


def adamw_init(config, weights, params):
    """Zero first and second moments, of the shapes and dtypes of the parameters."""
    return {"mu": jax.tree.map(jnp.zeros_like, params), "nu": jax.tree.map(jnp.zeros_like, params)}


def adamw_update(config, weights, params, state, grads, step, spread=UNSHARED):
    """(parameters, moments) after 0-based step `step`; decoupled weight decay, on all but scalars."""
    rate = learning_rate_at(config, step)
    b1, b2, t = config.beta1, config.beta2, config.steps_before + step + 1.0
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state["mu"], grads)
    nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, state["nu"], grads)

    def update(w, p, m, n):
        direction = (m / (1 - b1**t)) / (jnp.sqrt(n / (1 - b2**t)) + config.eps)
        return p - rate * (direction + (0 if w.kind == "scalar" else config.weight_decay * p))

    return jax.tree.map(update, weights, params, mu, nu), {"mu": mu, "nu": nu}


ADAMW = Optimizer("adamw", adamw_init, adamw_update)
# What --optimizer and 03's --model can name: a constant of a notebook next to this one.
MODELS = {"gpt": GPT.name, "swiglu": "04_maxtext.SWIGLU", "nanochat": "05_speedrun.NANOCHAT"}
OPTIMIZERS = {"adamw": ADAMW.name, "muon": "05_speedrun.MUON"}


def model_named(name):
    """The Model that --model names; UserError if there is none."""
    require(name in MODELS, "model", name, f"use one of {', '.join(MODELS)}")
    return find_model(MODELS[name], Path(tok.__file__).parent, GPT)


def optimizer_named(name):
    """The Optimizer that --optimizer names; UserError if there is none."""
    require(name in OPTIMIZERS, "optimizer", name, f"use {' or '.join(OPTIMIZERS)}")
    return find_optimizer(OPTIMIZERS[name], Path(tok.__file__).parent, ADAMW)


def global_norm(tree):
    """Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


# %%
if LOOK:
    rates = {step: float(learning_rate_at(Config(), step)) for step in (0, 399, 10_000, 15_000, 19_999)}
    print("learning rate by step:", ", ".join(f"{step}: {rate:.1e}" for step, rate in rates.items()))

# %% [markdown]
# ## Step
#
# A step is one program: microbatches in a `lax.scan` that sums float32 gradients, one mean over the devices, the
# update. Parameters and optimizer state are donated, so the new ones take the old ones' memory, 3.2 GB at the default
# size. Each device runs the same code on its share of the batch (`shard_map` over a mesh of two axes, `data` and
# `fsdp`), and the gradients meet once a step, not once a microbatch. One chip is the mesh of one.
#
# Why microbatches of two, when memory would hold sixteen? A v6e keeps 128 MiB on the chip, for all that is in use at a
# time. The widest activation of two sequences, 2 x 2048 x 4096 in bfloat16, is 32 MiB and stays there; that of four
# goes out to HBM and back, and by the compiler's estimate the step takes 13 % longer. On a v6e, larger ones were tried:
# the same batch of 64 reached 48.3 % MFU as 16 x 4 and 42.6 % as 4 x 16, all T keys counted (timings of
# [vorushin/tpuchat](https://github.com/vorushin/tpuchat), the project that this one began as).
#
# `SHARDING` says which axis of an array is split over which axis of the mesh: the batch over both, `D`, which every
# matrix has, over `fsdp`. With `--mesh data=8` each device has all weights, as on one chip. With `--mesh data=2,fsdp=4`
# it has a quarter of the weights, of their gradients and of the optimizer's state: a layer is gathered when its turn
# comes, and once more for its gradient, or all of them once a step (`--gather step`). `onechip/mesh.py` has the
# mechanism, docs/slices.md the rest: several hosts, what it costs, how to start.


# %%
SHARDING = {"B": AXES, "D": "fsdp", "W": "fsdp"}


def make_mesh(devices=None, shape=""):
    """A mesh with the axes "data" and "fsdp" over the given or all devices; shape: as --mesh has it."""
    return build_mesh(devices or jax.devices(), shape)


def sharding_of(mesh, axes):
    """Where an array lies whose axes are these letters, "DNH" or "BT"; "" for one that is whole everywhere."""
    axis_of = lambda letter: None if mesh.shape.get(SHARDING.get(letter)) == 1 else SHARDING.get(letter)
    return NamedSharding(mesh, PartitionSpec(*map(axis_of, axes)))


def check_mesh(config, mesh):
    """Raises UserError unless a mesh divides the batch and what SHARDING splits of the weights."""
    remedy = f"must be a multiple of device_batch_size * devices = {config.device_batch_size} * {mesh.size}"
    divides = config.total_batch_size % (config.device_batch_size * mesh.size) == 0
    require(divides, "total_batch_size", config.total_batch_size, remedy)
    for letter, size in config.sizes.items():
        parts = mesh.shape.get(SHARDING.get(letter), 1)
        remedy = f"must divide n_embd={config.n_embd}" if letter == "D" else f"must divide {letter}={size}"
        require(size % parts == 0, "mesh", describe_mesh(mesh), f"fsdp={parts} {remedy}")


def new_state(config, model, optimizer, key):
    """The state of step 0: {"params", "opt", "step"}, the optimizer's state under "opt"."""
    weights = model.weights(config)
    params = draw_weights(config, weights, key)
    return {"params": params, "opt": optimizer.init(config, weights, params), "step": jnp.zeros((), jnp.int32)}


def state_shapes(config, mesh, model=GPT, optimizer=ADAMW):
    """The state as jax.ShapeDtypeStruct with shardings: weights as the table says, moments like their weights."""
    shapes = jax.eval_shape(functools.partial(new_state, config, model, optimizer), jax.random.key(0))
    places = jax.tree.map(lambda weight: sharding_of(mesh, weight.letters), model.weights(config))
    return place_like(shapes, shapes["params"], places, sharding_of(mesh, ""))


def init_state(config, mesh, model=GPT, optimizer=ADAMW):
    """The state of step 0 from param_seed, on the devices of a mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(config, mesh, model, optimizer))
    init = jax.jit(functools.partial(new_state, config, model, optimizer), out_shardings=shardings)
    return init(jax.random.key(config.param_seed))


# %% [markdown]
# Every target counts the same: a microbatch whose mask leaves fewer of them counts less than another, on any device.
#
# Embeddings are looked up before the loss is differentiated, so that their gradients are those of the rows that a
# microbatch has. Autodiff's would be whole tables, nearly all zeros: a fifth of a step of `05_speedrun` on a v6e, by
# estimate. `onechip/rows.py` adds the rows to where they belong.


# %%
def shares_of_targets(batch, rows):
    """How much each microbatch of `rows` sequences counts, float32, 1 on average; None without a mask."""
    if "mask" not in batch:
        return None
    counts = jnp.sum(batch["mask"].reshape(-1, rows * batch["mask"].shape[1]), axis=1, dtype=jnp.float32)
    mean = jax.lax.pmean(jnp.mean(counts), AXES)
    return counts / jnp.where(mean > 0, mean, 1.0)


def once_a_step(config, weight):
    """Whether a weight that is split over devices is gathered once a step, not for each microbatch."""
    return weight.kind == "embed" or config.gather == "step"


def accumulate_grads(config, weights, loss, params, batch):
    """Mean loss and float32 gradients over this device's microbatches; loss(params, batch) -> float32 scalar."""
    cast_once = cast_weights(weights, params, config.dtype)  # the float32 masters are read once a step
    # Any token may need any row: tables are gathered once a step, layers then as well, or when their turn comes.
    cast_once = jax.tree.map(lambda w, p: gather(p) if once_a_step(config, w) else p, weights, cast_once)
    embeddings, kernel = Embeddings(weights, cast_once), config.attn_impl in ("splash", "pallas")
    shares = shares_of_targets(batch, config.device_batch_size)
    microbatches = jax.tree.map(lambda a: a.reshape(-1, config.device_batch_size, *a.shape[1:]), batch)
    count = len(microbatches["x"])

    def grads_of(batch, share):
        """(loss, float32 gradients of all but embeddings, gradients of the embeddings' rows)."""
        weight = 1.0 if share is None else share  # before the gradient: that of a split weight is a sum over devices
        loss_of = lambda others, rows: weight * loss(embeddings.join(rows, others), batch)
        value, (others, rows) = jax.value_and_grad(loss_of, (0, 1))(embeddings.others, embeddings.rows(batch["x"]))
        return value, jax.tree.map(lambda g: g.astype(jnp.float32), others), rows

    if count == 1:
        batch, share = jax.tree.map(lambda a: a[0], (microbatches, shares))
        value, others, rows = grads_of(batch, share)
        return value, embeddings.join(embeddings.gradients_of(batch["x"], rows), others)

    def add(total, one):
        (batch, share), (loss_sum, sums, row_sums) = one, total
        value, others, rows = grads_of(batch, share)
        row_sums = embeddings.add(row_sums, batch["x"], rows, kernel)
        return (loss_sum + value, jax.tree.map(jnp.add, sums, others), row_sums), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), embeddings.others)
    total, _ = jax.lax.scan(add, (jnp.zeros(()), zeros, embeddings.no_sums()), (microbatches, shares))
    value, others, row_sums = jax.tree.map(lambda t: t / count, total)
    return value, embeddings.join(embeddings.gradients(row_sums), others)


def make_train_step(config, mesh=None, model=GPT, optimizer=ADAMW, loss=cross_entropy):
    """The jitted step: (state, batch) -> (state, {"loss", "grad_norm", "lr"}), with the old state donated.

    batch: a dict of arrays (total_batch_size, ...), split over the mesh. A factory, because a module-level `jax.jit`
    would keep running the old function after its cell was edited.
    """
    mesh = mesh or make_mesh()
    check_mesh(config, mesh)
    weights = model.weights(config)
    whole, split = PartitionSpec(), sharding_of(mesh, "B").spec
    specs = jax.tree.map(lambda weight: sharding_of(mesh, weight.letters).spec, weights)
    spread = Spread(mesh, lambda weight: sharding_of(mesh, weight.letters).spec)

    def device_grads(params, batch):
        loss_here = functools.partial(loss, config, model)
        value, grads = accumulate_grads(config, weights, loss_here, as_shares(specs, params), batch)
        return jax.lax.pmean(value, AXES), mean_over_devices(specs, grads)

    # check_vma=False: the kernels' outputs do not say over which axes they vary.
    places = {"in_specs": (specs, split), "out_specs": (whole, specs)}
    all_grads = jax.shard_map(device_grads, mesh=mesh, check_vma=False, **places)

    def train_step(state, batch):
        params, step = state["params"], state["step"]
        value, grads = all_grads(params, batch)
        with jax.named_scope("optimizer"):
            norm = global_norm(grads)
            if config.grad_clip:
                grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, config.grad_clip / (norm + 1e-6)), grads)
            before = params, state["opt"]
            after = optimizer.update(config, weights, *widened(before), grads, step, spread)
            params, opt = stored_like(after, before)
        metrics = {"loss": value, "grad_norm": norm, "lr": learning_rate_at(config, step)}
        return {"params": params, "opt": opt, "step": step + 1}, metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(config, mesh, model, optimizer))
    places = {"out_shardings": (shardings, sharding_of(mesh, "")), "compiler_options": compiler_options(mesh)}
    return jax.jit(train_step, donate_argnums=0, **places)


# %%
if LOOK:
    toy_mesh = make_mesh(jax.local_devices()[:1])
    toy_state, toy_step = init_state(toy, toy_mesh), make_train_step(toy, toy_mesh)
    for _ in range(5):
        toy_state, metrics = toy_step(toy_state, jax.tree.map(lambda a: jnp.tile(a, (2, 1)), toy_batch))
        print(", ".join(f"{name} {float(value):.3g}" for name, value in metrics.items()))

# %% [markdown]
# ### Will it fit, and how fast?
#
# The compiler for a TPU needs no TPU: it compiles the real step, donation, accumulation, kernels and all, on any Linux
# machine with libtpu, in about a minute for 16 layers. What it says of memory is what the chip will use, to the byte;
# what it says of time is an estimate. `preflight` asks it before anything is downloaded, about the device that is here
# or a TPU that is not, and refuses a config that does not fit, naming the nearest one that does. The search is in
# `onechip/fit.py`; all that it needs of this notebook is the step, lowered.


# %%
def lower_step(config, mesh, model=GPT, optimizer=ADAMW, loss=cross_entropy, batch=("x", "y")):
    """The training step, traced for the devices of a mesh, as a jax.stages.Lowered; nothing is run.

    batch: the names of its arrays, each (total_batch_size, seq_len) int32.
    """
    rows = (config.total_batch_size, config.seq_len)
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=sharding_of(mesh, "B"))
    step = make_train_step(config, mesh, model, optimizer, loss)
    return step.lower(state_shapes(config, mesh, model, optimizer), dict.fromkeys(batch, tokens))


def workload(mesh, model=GPT, optimizer=ADAMW, loss=cross_entropy, batch=("x", "y")):
    """What fit.py has to know of a training step on a mesh: how to lower it, and what it counts."""

    def count(config):
        state, weights = state_shapes(config, mesh, model, optimizer), model.weights(config)
        split = lambda w, p: math.prod(p.shape if once_a_step(config, w) else p.sharding.shard_shape(p.shape))
        held = sum(jax.tree.leaves(jax.tree.map(split, weights, state["params"])))
        sizes = {"param_bytes": bytes_on_device(state["params"]), "state_bytes": bytes_on_device(state["opt"])}
        whole = bytes_of(state["params"]) + bytes_of(state["opt"])
        return {"params": count_params(config, model)["total"], "held": held, "whole_bytes": whole, **sizes}

    return fit.Workload(
        mesh=mesh,
        lower=lambda config: lower_step(config, mesh, model, optimizer, loss, batch),
        count=count,
        flops=lambda config: flops_per_token(config, model),
    )


def compile_for_chip(config, topology="v6e:1x1", model=GPT, mesh="", **parts):
    """The training step compiled ahead of time for a TPU topology, as a jax.stages.Compiled; nothing is run.

    mesh: in words, as --mesh has it; parts, here and below: the optimizer, loss and batch of `workload`.
    """
    return fit.compile_step(workload(make_mesh(topology_devices(topology), mesh), model, **parts), config)


def preflight(config, topology="", model=GPT, **parts):
    """The fit.Fit of a config on a TPU topology, or on the devices attached here; fit.DoesNotFit if it does not."""
    return fit.require_fit(workload(make_mesh(topology_devices(topology)), model, **parts), config)


def show_fit(config, run, model=GPT, **parts):
    """Prints what a Run's step needs, or refuses it, on the devices attached here or the topology in --preflight.

    Returns the Run with its mesh: of those that --mesh leaves open, the one that splits least and fits. With a topology
    or "here": also compares microbatches, searches for the largest batch, then exits.
    """
    devices = topology_devices("" if run.preflight == "here" else run.preflight)
    split = [size for letter, size in config.sizes.items() if SHARDING.get(letter) == "fsdp"]
    meshes = [run.mesh] if run.mesh else meshes_of(len(devices), math.gcd(*split))
    works = [workload(make_mesh(devices, mesh), model, **parts) for mesh in meshes]
    check_mesh(config, works[0].mesh)
    work = fit.show(works, config, bool(run.preflight), run.units_per_hour)
    return dataclasses.replace(run, mesh=describe_mesh(work.mesh))


# %% [markdown]
# ## Data
#
# `tok.token_stream` (01) turns documents into one endless stream of tokens, and a batch is the next piece of it:
# nothing is padded, nothing thrown away, and a sequence may begin in the middle of a document. With
# `packing="best-fit"` each begins with one, as nanochat has it (`tok.packed_rows`); what that drops is in the log. Each
# batch comes with its position in the data, so that another process can resume at the very next token. A thread
# (`onechip/loader.py`) keeps the next batches ready on the device.
#
# The score is **bits per byte** on held-out rows, always the same ones. Another tokenizer cannot flatter it. The bar
# to pass is `gzip -9` on the same bytes, 2.1 to 2.5.


# %%
def batch_of(tokens, seq_len):
    """{"x", "y"} int32 (B, T), y being x one token later, of a piece of a stream (B * T + 1,) or of rows (B, T + 1)."""
    return {"x": tokens[..., :-1].reshape(-1, seq_len), "y": tokens[..., 1:].reshape(-1, seq_len)}


def pretraining_batches(config, corpus, tokenizer, position=None):
    """(batch, position after it) without end, of a corpus from a position on, by the config's packing and stages.

    The last stage has no end here: what ends it is the run. With stages, a position also has the "step" that is next.
    UserError, at once, for what cannot be a position.
    """
    tok.check_position(position, tokenizer.get_vocab_size(), config.packing == "best-fit")
    return batches_from(config, corpus, tokenizer, position)


def batches_from(config, corpus, tokenizer, position):
    """The generator of pretraining_batches."""
    step = (position or {}).get("step", 0)
    for end, c in stages_of(config):
        B, T = c.total_batch_size, c.seq_len
        if c.packing == "best-fit":
            pieces = tok.packed_rows(tokenizer, corpus.train, B, T + 1, position)
        else:
            pieces = tok.token_stream(tokenizer, corpus.train, B * T, position)
        whole_run = end == config.num_iterations
        with contextlib.closing(pieces):
            for tokens, after in pieces if whole_run else itertools.islice(pieces, max(0, end - step)):
                step += 1
                position = after | {"step": step} if config.stages else after
                yield batch_of(tokens, T), position


def make_caster(config, model, mesh):
    """A jitted function of params -> the parameters in the compute type, whole on every device of a mesh."""
    weights = model.weights(config)
    cast = functools.partial(cast_weights, weights, dtype=config.dtype)
    return jax.jit(cast, out_shardings=sharding_of(mesh, ""))


def make_evaluator(config, model, mesh, held_out, token_bytes):
    """A function of params -> {"val_loss": nats per token, "val_bpb": bits per byte} on the held-out rows."""

    rows, losses = config.device_batch_size * mesh.size, functools.partial(token_losses, config, model)
    score = make_scorer(losses, sharding_of(mesh, "B"), rows, held_out.x, held_out.y, token_bytes)
    cast = make_caster(config, model, mesh)
    return lambda params: score(cast(params))


# %% [markdown]
# An evaluation such as CORE asks for more: the loss of some tokens of each text, and whether each is the likeliest one,
# in prompts of 20 to 4,000 tokens. `onechip/answers.py` pads them to few lengths and computes once what the answers to
# a question share. Here it gets what it needs of a model: rotary angles as far as a prompt goes, and an attention
# for each length. Texts longer than `seq_len` are not cut: windows stay those of training.


# %%
def attention_for(config, length):
    """The attention for texts of that many tokens: the config's, or Splash where a head is too long for `pallas`."""
    if config.attn_impl == "pallas":
        from onechip.kernels import MOST_ENTRIES

        return ATTENTIONS["pallas" if length * config.head_dim <= MOST_ENTRIES else "splash"]
    return ATTENTIONS[config.attn_impl]


def attention_parts(config):
    """Rotation and attention of a config, as onechip/answers.py and onechip/engine.py take them."""
    from onechip.answers import Parts

    return Parts(functools.partial(rope_tables, config), functools.partial(attention_for, config), masked_attention)


def make_answerer(config, model, mesh):
    """The Answerer of a model: a function of params -> score(questions), the Scores of Texts (onechip/questions.py)."""
    from onechip.answer_rows import BatchSizes
    from onechip.answers import Answerer

    parts = attention_parts(config)
    kernel = config.attn_impl in ("splash", "pallas")  # their programs take longer to compile, and chips are faster
    sizes = BatchSizes(128 if kernel else 32, config.device_batch_size * config.seq_len, 1 << (22 if kernel else 17))
    return Answerer(config, model, sharding_of(mesh, "B"), parts, sizes)


def suite_for(corpus):
    """(name, EvalTasks) of what a model of that corpus is asked: CORE, or tasks made from the offline corpus where the
    data is not of the Hub and there may be no network."""
    if corpus.name in [dataset.name for dataset in tok.DATASETS.values()]:
        from onechip.bundle import open_bundle

        return "CORE", open_bundle()
    from onechip.made_tasks import make_tasks

    return "made", make_tasks(text for _, text in tok.read_documents(tok.offline_corpus().val))


def make_asker(corpus, tokenizer, config, model, mesh):
    """A function of params -> {"tasks/core": mean centred accuracy, "tasks/<label>": accuracy}, for Task.ask.

    Of eval_core_examples a task; the first name says "core_subset" where that leaves any out, or "made".
    """
    from onechip.core import ask
    from onechip.verdicts import accuracy, core

    (suite, tasks), answerer = suite_for(corpus), make_answerer(config, model, mesh)
    bos, limit = tok.opening_id(tokenizer), config.eval_core_examples
    encode = lambda texts: [ids[1:] for ids in tok.encode_batch(tokenizer, texts)]
    whole = limit == 0 or all(len(task.items) <= limit for task in tasks)
    name = f"tasks/{suite.lower()}" if whole else f"tasks/{suite.lower()}_subset"

    def figures(params):
        score = answerer(params)
        outcomes = [ask(task, encode, bos, score, limit) for task in tasks]
        return {name: core(outcomes), **{f"tasks/{outcome.label}": accuracy(outcome) for outcome in outcomes}}

    return figures


# %%
if LOOK:
    question = [Text([*range(40), *answer], 40, 40 + len(answer)) for answer in ([40, 41], [7])]
    (scores,) = make_answerer(toy, GPT, toy_mesh)(toy_state["params"])([question])
    print("nats of two answers to a question:", ", ".join(f"{score.nats:.2f} of {score.count}" for score in scores))


# %% [markdown]
# What a model learns from is a `Task`: where its batches come from, their loss, and how the model is scored. This one
# is pretraining; fine-tuning on conversations differs in the mask, reinforcement learning in the loss, and its batches
# are made by the model itself: `roll` makes them of what the loader brings, with the parameters of that very step.


# %%
def check_vocabulary(config, tokenizer):
    """Raises UserError unless the tokenizer has exactly vocab_size tokens."""
    size = tokenizer.get_vocab_size()
    require(size == config.vocab_size, "vocab_size", config.vocab_size, f"the tokenizer has {size} tokens: use {size}")


def pretraining(config, corpus, tokenizer):
    """The Task of predicting each next token of a corpus; UserError if corpus, tokenizer and config do not agree."""
    check_vocabulary(config, tokenizer)
    held_out = tok.load_held_out(tokenizer, corpus, config.eval_tokens, config.seq_len)
    lengths = tok.token_byte_lengths(tokenizer)
    data = {"name": corpus.name, "revision": corpus.revision, "shards": len(corpus.train)}
    dataset = next((dataset.repo for dataset in tok.DATASETS.values() if dataset.name == corpus.name), "")
    return Task(
        batches=functools.partial(pretraining_batches, config, corpus, tokenizer),
        loss=cross_entropy,
        score=lambda config, model, mesh: make_evaluator(config, model, mesh, held_out, lengths),
        metric="val_bpb",
        ask=functools.partial(make_asker, corpus, tokenizer),
        origin={"data": data, "tokenizer_sha256": tok.tokenizer_hash(tokenizer)},
        facts={"gzip_bits_per_byte": held_out.gzip_bpb, "dataset": dataset},
        files={TOKENIZER: tokenizer.to_str(pretty=True).encode()},
    )


# %%
if LOOK:
    batch = batch_of(np.arange(toy.total_batch_size * toy.seq_len + 1, dtype=np.int32) % 512, toy.seq_len)
    print({name: array.shape for name, array in batch.items()}, "y is x one token later:", batch["y"][0, :4])

# %% [markdown]
# ## Train
#
# `train` is the one loop of the series. The order of what it does between two steps is no matter of taste: **save,
# then evaluate, then sample**, because the latter two need memory that training did not, and a run of 29 hours has
# been lost to an evaluation that ran out of it (nanochat#446).
#
# - **A checkpoint** is the whole state: parameters, optimizer state, step, the position in the data, the metrics so
#   far. Nothing random happens after the weights are drawn, so there is no generator to save. It is safetensors and
#   JSON, 3.2 GB at the default size. It leaves the chip array by array; a thread writes, hashes and syncs. Training
#   waits until the last array is on the host, which holds 2 GiB of them at most: the rest waits for the disk.
# - **A disk that is full or away**, as Google Drive is at times, ends nothing: a line says so, and it is tried again
#   every minute. What it does not take at the end stays on the machine's own disk until the next start.
# - **Resuming is exact.** The checkpoint of step N is taken before the evaluation or sampling due at step N; a resumed
#   run does those first. So the files of a run that was killed and resumed are those of a run that was not.
# - **The chip is never idle.** Losses are read from the device every ten steps and one step late, so that the next
#   step is always queued.
# - **An interrupt**, Colab's stop button or a SIGTERM, is noted and obeyed between two steps.


# %% [markdown]
# A run may begin with fewer or shorter sequences than it ends with: `--stages "500:128x512 1000:256x1024"` takes 128
# sequences of 512 tokens up to step 500. Early steps learn as much from them, and cost less (batch and sequence
# warm-up, as modded-nanogpt's records have it). Each stage is a Config of its own (`onechip/stages.py`), and so a
# program of its own; the stream of tokens goes through all of them.


# %%
def make_steps(config, mesh, model, optimizer, task):
    """The training step (state, batch) -> (state, metrics) of a run: in a run of stages, the batch's shape says which.

    All steps of a run of stages are compiled here, so that none makes the chip wait later.
    """
    configs = {(c.total_batch_size, c.seq_len): c for _, c in stages_of(config)}
    if len(configs) == 1:
        step = make_train_step(config, mesh, model, optimizer, task.loss)
        return with_rollouts(step, task.roll(config, model, mesh)) if task.roll else step
    say(f"stages: compiling steps of {', '.join(f'{rows} x {tokens}' for rows, tokens in configs)} tokens")
    parts = {"model": model, "optimizer": optimizer, "loss": task.loss, "batch": task.arrays}
    steps = {shape: lower_step(c, mesh, **parts).compile() for shape, c in configs.items()}
    return lambda state, batch: steps[batch[task.arrays[0]].shape](state, batch)


def with_rollouts(step, roll):
    """A training step whose batches are made of the loader's by `roll`, with the parameters that it begins with.

    Several batches are several updates of one step: at its learning rate, and with one row of metrics.
    """

    def roll_and_train(state, asked):
        number = state["step"]
        batches, figures = roll(state["params"], asked)
        for batch in batches:
            state, metrics = step({**state, "step": number + 0}, batch)  # a copy: the step's state is donated
        return state, {**metrics, **figures}

    return roll_and_train


def train(config, task, run_dir, *, model=GPT, optimizer=ADAMW, mesh=None, sample=None, start=None, **session):
    """Trains from the newest checkpoint in `run_dir`, or from the seed, to config.num_iterations; returns a Result.

    start(the state as jax.ShapeDtypeStructs) -> the state of step 0 on their devices, in place of the seed's.
    sample(params) -> [(prompt, continuation)]; session: Session's keywords, such as on_log(row), which gets every row
    of metrics.jsonl as a dict, mirror, a Mirror that keeps checkpoints elsewhere, and notes, JSON such as a wandb
    run's id, which travel in them. KeyboardInterrupt and SIGTERM save what was reached and return it. UserError: bad
    input, or a loss that is not finite.
    """
    mesh = mesh or make_mesh()
    train_step = make_steps(config, mesh, model, optimizer, task)
    score = task.score(config, model, mesh)
    ask = task.ask(config, model, mesh) if config.eval_core_every else None
    cast = make_caster(config, model, mesh)
    write_samples = lambda params: sample(cast(params)) if sample else []
    origin = {"model": model.name, "optimizer": optimizer.name, **task.origin, **describe_machine(mesh)}
    with Session(run_dir, config, origin, metric=task.metric, **session) as run:
        shapes = state_shapes(config, mesh, model, optimizer)
        state = run.restore(shapes) or (start(shapes) if start else init_state(config, mesh, model, optimizer))
        place = functools.partial(spread, sharding=sharding_of(mesh, "B"))
        work, stages = workload(mesh, model, optimizer), [c for _, c in stages_of(config)]
        paces = {(c.total_batch_size, c.seq_len): fit.peak_rate(work, c) for c in stages}
        run.begin(state, task.batches, place, paces=paces, facts=task.facts, files=task.files)
        with run.saving():
            while run.continues():
                if run.due("save"):
                    run.save()
                if run.due("eval"):
                    run.save()
                    run.record(score(run.state["params"]))
                if run.due("eval_core"):
                    run.save()
                    run.record(ask(run.state["params"]))
                if run.due("sample"):
                    run.save()
                    run.show(write_samples(run.state["params"]))
                run.advance(train_step)
            run.save()
        if run.is_complete:
            run.record(score(run.state["params"]))
            if config.eval_core_every:
                run.record(ask(run.state["params"]))
            run.samples = write_samples(run.state["params"])
        return run.result()


# %%
if LOOK:
    toy_loss = lambda params: {"val_loss": float(cross_entropy(toy, GPT, params, batch))}
    toy_task = Task(lambda position: itertools.repeat((batch, {})), cross_entropy, lambda config, model, mesh: toy_loss)
    with tempfile.TemporaryDirectory() as folder:
        print(f"toy, after {toy.num_iterations} steps of train: loss {train(toy, toy_task, folder).val_loss:.3f}")

# %% [markdown]
# ## Sample
#
# A sampled token costs one pass over one position. The model's code is the training code, with a cache. Prompt, loop
# and choice of the next token are one program, so that 128 tokens cost one dispatch and not 128.


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


def make_sampler(config, max_new_tokens, temperature=0.0, top_k=0, model=GPT):
    """A jitted (params, prompt, length, key) -> (B, max_new_tokens) int32.

    prompt is (B, P) int32 of which the first `length` tokens count: a few padded sizes P serve all prompts without
    compiling again.
    """

    def sample(params, prompt, length, key):
        params = cast_weights(model.weights(config), params, config.dtype)
        choose = lambda hidden, key: pick_token(logits_of(config, params, hidden), key, temperature, top_k)
        last_of = functools.partial(jax.lax.dynamic_index_in_dim, index=length - 1, axis=1)

        def next_token(carry, key):
            cache, token = carry
            hidden, cache = backbone(config, model, params, token[:, None], cache)
            token = choose(hidden[:, 0], key)
            return (cache, token), token

        cache = empty_cache(config, len(prompt), prompt.shape[1] + max_new_tokens)
        hidden, cache = backbone(config, model, params, prompt, cache)
        cache = cache._replace(start=length, before=last_of(prompt))  # what follows `length` is padding
        keys = jax.random.split(key, max_new_tokens)
        first = choose(last_of(hidden)[:, 0], keys[0])
        _, rest = jax.lax.scan(next_token, (cache, first), keys[1:])
        return jnp.concatenate([first[:, None], rest.T], axis=1)

    return jax.jit(sample)


def generate(config, params, prompt, max_new_tokens, temperature=0.0, top_k=0, seed=0, model=GPT, sampler=None):
    """max_new_tokens token ids that continue the token ids in `prompt`; hand in a `make_sampler` to compile once."""
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


SAMPLE_TOKENS, SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 64, 0.8, 50


def make_sample_writer(config, tokenizer, prompts, model=GPT):
    """A function of params -> [(prompt, continuation)]: 64 tokens at most, temperature 0.8, top 50, up to a <|bos|>."""
    count = min(SAMPLE_TOKENS, config.seq_len // 2)
    sampler = make_sampler(config, count, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, model)
    bos = tok.opening_id(tokenizer)

    def write(params, prompt, seed):
        ids = tok.encode_batch(tokenizer, [prompt])[0][: config.seq_len - count]
        new = generate(config, params, ids, count, seed=seed, model=model, sampler=sampler)
        return prompt, tokenizer.decode(new[: new.index(bos)] if bos in new else new)

    return lambda params: [write(params, prompt, seed) for seed, prompt in enumerate(prompts)]


# %%
if LOOK:
    print("eight tokens of the toy:", generate(toy, toy_state["params"], [1, 2, 3], 8))

# %% [markdown]
# ## Check the chip
#
# What this series says of a TPU's speed is a compiler's estimate. Tick `CHECK` and see for the chip that is attached:
# is each attention right, how long does a step take next to its estimate, is training the same to the last bit? Five
# minutes, twelve the first time; on a laptop one, at tiny sizes. It prints a table and leaves `chip_check.json`, with
# nothing private in it; put into `docs/chips/`, that corrects everybody's estimates. `uv run tools/chip_check.py` is
# the same.


# %% cellView="form"
# @title What is checked
# Of each model: the optimizer, depth 12, and what a laptop takes instead.
CHECKED = {
    "gpt": ("adamw", {"n_head": 6}, {"n_head": 2, "aspect_ratio": 16}),
    "swiglu": (
        "adamw", {"n_layer": 12}, {"n_head": 2, "n_kv_head": 1, "n_embd": 48, "n_layer": 2, "mlp_dim": 80, "tile": 16}
    ),
    "nanochat": ("muon", {"depth": 12}, {"depth": 2}),
}  # fmt: skip
SMALL_CHECK = {"head_dim": 16, "vocab_size": 512, "seq_len": 64, "device_batch_size": 2, "total_batch_size": 4}


def what_to_check(preset):
    """The onechip.check.Given of these notebooks, for a preset: every model, every attention, Muon's products."""
    from onechip.check import Given, Subject

    muon, subjects = inspect.getmodule(optimizer_named("muon").update), {}
    for name, (optimizer, deep, small) in CHECKED.items():
        model, optimizer = model_named(name), optimizer_named(optimizer)
        fields = model.presets[preset] | optimizer.presets.get(preset, {})
        fields |= SMALL_CHECK | small if preset == "laptop" else deep
        config = config_with(model.config, optimizer.settings)(**fields)
        subjects[name] = Subject(model, optimizer, config)

    def rope(T, H):
        return rope_tables(Config(n_head=1, head_dim=H, aspect_ratio=H, seq_len=T, attn_impl="einsum"))

    def batches(config):
        corpus = tok.get_corpus("offline", 0)
        return pretraining_batches(config, corpus, tok.get_tokenizer(corpus, config.vocab_size))

    return Given(
        ATTENTIONS, attention_einsum, rope, subjects, batches, make_mesh, workload, init_state, sharding_of,
        make_sampler, flops_per_token, orthogonalize=muon.orthogonalize,
        child=(sys.executable, str(Path(tok.__file__).parent / "tools" / "chip_check.py"), "--resume"),
    )  # fmt: skip


# %%
CHECK = False  # @param {type:"boolean"}

if __name__ == "__main__" and CHECK:
    from onechip.check import check_chip
    from onechip.check_sizes import sizes_for

    prepare()
    sizes = sizes_for(jax.local_devices()[0].platform)
    check_chip(what_to_check(sizes.preset), sizes)

# %% [markdown]
# ## Open
#
# `open_model` opens any run or export, whatever notebook trained it: `config.json` keeps the model's name, and only a
# notebook next to this one is ever imported for it.


# %%
class Opened(NamedTuple):
    """A trained model: what `generate` and the others take."""

    config: TrainConfig
    params: dict
    tokenizer: object
    model: Model


ADOPTED = {"qwen3": "04_maxtext.SWIGLU", "nanochat": "05_speedrun.NANOCHAT"}  # transformers' classes that are ours


def open_model(source, model=None):
    """Opens a run's folder, an export or a Hub repository as Opened; UserError if it is no model, or not whole.

    A folder of transformers' Qwen3 or NanoChat is opened as the notebook's model that computes the same.

    model: only for one that no notebook here defines. A private repository asks for HF_TOKEN in the environment.
    """
    files, folder = find_model_files(source), Path(tok.__file__).parent
    name = ADOPTED.get(files.about.get("model_type"), GPT.name)
    model = model or find_model(files.about.get("model", name), folder, GPT)
    if files.about.get("model_type") in ADOPTED and model.adopt:
        config = model.config(**model.adopt(files.about))
    else:
        config = files.make_config(config_of(files.about, model, folder))
    params, tokenizer = files.load_params(config, model), tok.load_tokenizer(files.tokenizer)
    check_vocabulary(config, tokenizer)
    return Opened(config, params, tokenizer, model)


def open_base(source, wanted=""):
    """(ModelFiles, Model, Optimizer, Config) of a trained model that another training begins with.

    wanted: what the user set as the optimizer; UserError unless that is the model's own, or empty.
    """
    files, folder = find_model_files(source), Path(tok.__file__).parent
    model = find_model(files.about.get("model", GPT.name), folder, GPT)
    names = {path: name for name, path in OPTIMIZERS.items()}
    used = names.get(files.about.get("optimizer"), "adamw")
    same = wanted in ("", used)
    require(same, "optimizer", wanted, f"the model was trained with {used}, which continues: leave it out")
    return files, model, optimizer_named(used), files.make_config(config_of(files.about, model, folder))


def names_for_sweep(source, model, optimizer, wanted):
    """What --model and --optimizer call the parts of a sweep's base; UserError if they have no name for the model.

    wanted: what the user set as the model, which must be the base's own, or empty.
    """
    names = {path: name for name, path in (MODELS | OPTIMIZERS).items()}
    require(model.name in names, "base", source, f"a sweep has no name for its model {model.name}")
    same = wanted in ("", names[model.name])
    require(same, "model", wanted, f"the base is {names[model.name]}: leave it out")
    return names[model.name], names.get(optimizer.name, "adamw")


# %% [markdown]
# Other programs have formats of their own. `--export FORMAT --run FOLDER` (or `export_as`, here) writes one of them to
# `FOLDER/exports/FORMAT`, and to the Hub with a token: README.md has the table of readers, and how far each agrees.


# %%
def export_if_asked(overrides=""):
    """With --export, writes that and ends the program: for the cell that chooses what runs."""
    if wanted := peek("export", overrides):
        export_as(wanted, peek("run", overrides), peek("out", overrides) or Run.out, peek("hub_repo", overrides))
        stop_here()


def export_as(name, source, out="runs", hub_repo=""):
    """Writes a trained model for another reader, by open_model's name for it; returns the folder.

    name: a format of onechip/exports.py; source: as open_model's; hub_repo: where to upload.
    UserError for a format that is not there, or lacks a part of this model.
    """
    from onechip import exports  # here, as nothing else needs it

    exports.check_format(name)
    require(source, "run", source, "name the trained run: --export FORMAT --run FOLDER")
    about = find_model_files(source).about
    opened = open_model(source)
    chat = "mixture" in about or "rollouts" in about
    folder = exports.export_folder(source, out, name)
    parts = exports.Leaving(opened, forward, tok.opening_id(opened.tokenizer), chat)
    exports.write_export(name, parts, folder, lambda place: tok.export_tokenizer(opened.tokenizer, place, chat))
    upload_folder(folder, names_of_files(folder), read_secret("HF_TOKEN"), hub_repo, f"onechip-{name}")
    return folder


# %% [markdown]
# ## Run
#
# What runs is decided by what is here, reported in a line each, and yours to change: write `OVERRIDES` the way it
# would be on a command line, `"--preset laptop --num_iterations 200"`, or pass the same words to `uv run 02_train.py`.
# A run is named after its settings: Run all again resumes it, and a changed setting starts a new run.
#
# **Several hosts** train one model if the same command is started on each. A TPU slice and Slurm say who is there;
# elsewhere add `--coordinator 10.0.0.2:8476 --hosts 4 --host 0`, and `--host 1` to 3 on the others. `--out` is a folder
# that all of them share. The batch is that of one host, so a run may resume with another number of them. Host 0 prints
# and writes; when a host is gone, the others say which, end, and the same command resumes.

# %%
PROMPTS = {
    "stdlib": ("import ", "def __init__(self", '    """Return '),
    "default": ("The capital of France is", "If yesterday was Friday, then", "The chemical symbol of gold is"),
}


# %%
def presets_of(model, optimizer):
    """{preset: fields} that suit a model with an optimizer, whose fields win."""
    return {name: fields | optimizer.presets.get(name, {}) for name, fields in model.presets.items()}


def choose_parts(model, overrides="", run_class=Run, optimizer=ADAMW):
    """(Run, config, optimizer) with nothing left open, for the optimizer that --optimizer names, or this one.

    The config has the optimizer's settings too. Prints what and why; UserError for what cannot be. With --export,
    writes that and ends the program.
    """
    export_if_asked(overrides)
    wanted = peek("optimizer", overrides)
    if wanted and OPTIMIZERS.get(wanted) != optimizer.name:
        optimizer = optimizer_named(wanted)
    run, config = choose(
        config_with(model.config, optimizer.settings), presets_of(model, optimizer), overrides, run_class
    )
    check_mirror(run)
    return run, config, optimizer


def prepare_pretraining(run, config, folder, model):
    """(tokenizer, what `train` is handed besides: task and sample) of a Run with its RunFolder."""
    corpus = tok.get_corpus(run.data, run.num_shards, find_data(folder))
    kept = find_tokenizer(folder)  # a run keeps the one it began with: its ids are what the model has learned
    tokenizer = tok.load_tokenizer(kept) if kept else tok.get_tokenizer(corpus, config.vocab_size)
    task = pretraining(config, corpus, tokenizer)
    sample = make_sample_writer(config, tokenizer, PROMPTS.get(corpus.name, PROMPTS["default"]), model)
    return tokenizer, {"task": task, "sample": sample}


def train_run(run, config, hub_token=None, model=GPT, optimizer=ADAMW, prepare_task=prepare_pretraining):
    """Fetches what a Run needs, as `prepare_task` does, and trains; returns (Result, tokenizer, mirror)."""
    mirror, folder = open_mirror(run, hub_token) if is_first() else None, RunFolder(Path(run.out) / run.name)
    accept = [name for name, given in (("data", run.other_data), ("owner", run.take_over)) if given]
    session = {"mirror": mirror, "accept": accept, "hours": run.session_hours}
    with RunLock(folder.lock, run.take_over) as lock:
        bring_back(folder, mirror)
        tokenizer, more = prepare_task(run, config, folder, model)
        parts = {"model": model, "optimizer": optimizer, "mesh": make_mesh(shape=run.mesh), **more}
        result = train(config, run_dir=folder.path, **parts, lock=lock, **session)
    return result, tokenizer, mirror


def train_first(out, model=GPT, optimizer=ADAMW):
    """Trains a model of the laptop preset, as its own notebook does, for who needs one; returns the run's folder."""
    say(f"model: no run in {out} yet, so the laptop preset of {model.name} is trained first")
    config_class, presets = config_with(model.config, optimizer.settings), presets_of(model, optimizer)
    run, config = settle(Run(preset="laptop", data="offline", out=out), config_class, presets, {})
    run = dataclasses.replace(run, name=name_run(run, config))
    return str(train_run(run, config, model=model, optimizer=optimizer)[0].run_dir)


# %%
OVERRIDES = ""  # @param ["", "--preset laptop", "--n_head 6 --num_iterations 2000"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    run, config, optimizer = choose_parts(GPT, OVERRIDES)
    print(describe_model(config))
    run = show_fit(config, run, optimizer=optimizer)

# %% [markdown]
# Nothing has been downloaded yet, and a config that does not fit has been refused. The curve below grows with every
# evaluation.


# %%
if __name__ == "__main__":
    hub_token = read_secret("HF_TOKEN")
    result, tokenizer, mirror = train_run(run, config, hub_token, optimizer=optimizer)

# %% [markdown]
# ## Look
#
# A model of 7 million parameters that has read Python's own sources for two minutes writes Python-shaped nonsense, but
# predicts the next byte better than gzip does. Look at that comparison first; the samples are for pleasure.


# %%
if __name__ == "__main__":
    print(describe_result(result, config))

# %% [markdown]
# Where did the time go? TensorBoard has the curves of the run and, in its tab Profile, a trace of five steps. On a TPU
# or GPU every operation is listed under the name that its scope gave it: `layer_3/attention`, `lm_head`, `optimizer`.
# On a laptop: `uv run tensorboard --logdir runs`. What to look for is in docs/profile.md. The frame below stays blank
# where third-party cookies are blocked; the folder can be downloaded and opened elsewhere.


# %%
if __name__ == "__main__":
    open_tensorboard(result.run_dir)

# %% [markdown]
# ## Save
#
# Colab's disk is gone with its session, after a day at the latest and often after four hours. With a token (HF_TOKEN,
# in the environment or as a Colab secret) checkpoints have gone to a private repository of your own on the Hub all
# along, and a new machine resumes from there. What is left to add is a model that a stranger can use: weights, config,
# tokenizer, curve and a card with the lines that load it. Without a token the same folder stays here, as `model/`.


# %%
LOADING = """
import importlib
train = importlib.import_module("02_train")  # in a clone of {repository}
config, params, tokenizer, model = train.open_model({source!r})
[(prompt, text)] = train.make_sample_writer(config, tokenizer, [{prompt!r}], model)(params)
print(prompt + text)
"""


def export_model(result, tokenizer, source="", notes=PLAIN_WEIGHTS, chat=False, loading=LOADING, **style):
    """Leaves in run_dir/model all that a stranger needs: weights, config, tokenizer, curve, card; returns the folder.

    source: the Hub repository that it will be uploaded to, for the card; the folder itself if there is none. chat:
    whether the tokenizer goes with the template of conversations. loading, style: of write_card.
    """
    folder = export_weights(result)
    tok.export_tokenizer(tokenizer, folder, chat)
    write_card(folder, result, loading, source=source, repository=REPOSITORY, notes=notes, **style)
    return folder


# %% [markdown]
# An idle machine costs as much as a busy one. With `GIVE_BACK` ticked before *Run all*, Colab's machine is given back
# as soon as everything is on the Hub; without a token it stays, because its disk is then the only home of the model.

# %%
GIVE_BACK = False  # @param {type:"boolean"}

if __name__ == "__main__" and is_first():
    folder = export_model(result, tokenizer, mirror.repo if mirror else "")
    uploaded = upload_folder(folder, names_of_files(folder), hub_token, run.hub_repo, f"onechip-{run.name}")
    if GIVE_BACK:
        give_back_machine(uploaded)
