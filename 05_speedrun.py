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
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/05_speedrun.ipynb)
# # One number decides the rest
#
# The model and the optimizer that learn fastest of what is published, on the trainer of `02_train`: nanochat's model of
# July 2026, Muon for its matrices, and a dial. `--depth 12` says how large; width, batch, length of the run, learning
# rates and weight decay follow. The laptop's 300 steps end at 1.77 bits per byte, where 02's AdamW is after some 1,100.
#
# | where | model | time | memory | cost |
# |---|---|---|---|---|
# | laptop, two cores, no network | depth 4: 11M parameters, Python's own sources | 2 minutes | under 2 GB | nothing |
# | Colab, TPU v6e | depth 12: 286M parameters, FineWeb-Edu | 40 minutes by estimate | 5 of 31.25 GiB | compute units |
# | the same, `--preset day` | depth 24: 1.38B parameters, ClimbMix | 15 h by estimate | 20 of 31.25 GiB | a Colab day |

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
# ## What Muon does to a gradient
#
# A matrix's gradient is nearly of low rank: a few directions get almost all of the change, however small the step.
# Muon replaces it by the nearest matrix whose singular values are all about one, so that every direction moves alike.
# Five steps of a polynomial do that, nothing but products of matrices. Below: singular values of a sum of 32
# outer products, as a gradient is one, before and after.

# %%
import onechip  # noqa: F401  (before jax: it keeps an idle libtpu quiet)

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from onechip.machine import prepare, wants_a_look

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them

# a, b, c of x -> a x + b x^3 + c x^5 on the singular values, five times in a row
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(X):
    """Matrices (S, in, out) with their singular values, within a factor of 1000 of the largest, brought near 1.

    Polar Express (Amsel et al., 2025, arXiv 2505.16932): the best odd polynomials of degree 5 for five steps, with a
    margin of 1 % for rounding. All products are in the dtype of X; the smaller side is squared.
    """
    norm = jnp.linalg.norm(X.astype(jnp.float32), axis=(1, 2), keepdims=True)
    X = X / (1.01 * norm + 1e-6).astype(X.dtype)
    wide = X.shape[1] < X.shape[2]

    def step(X, coefficients):
        a, b, c = coefficients.astype(X.dtype)
        A = X @ X.mT if wide else X.mT @ X
        B = b * A + c * (A @ A)
        return a * X + (B @ X if wide else X @ B), None

    return jax.lax.scan(step, X, jnp.asarray(POLAR_EXPRESS))[0]  # a loop: one step to compile, not five


def show_orthogonalize(rows=96, columns=64, rank=32):
    """Prints singular values of a toy's gradient before and after."""
    key_x, key_d = jax.random.split(jax.random.key(0))
    sizes = 0.8 ** jnp.arange(rank)
    gradient = (jax.random.normal(key_x, (rows, rank)) * sizes) @ jax.random.normal(key_d, (rank, columns))
    for name, matrix in (("gradient", gradient), ("update", orthogonalize(gradient[None])[0])):
        values = np.asarray(jnp.linalg.svd(matrix, compute_uv=False))[:rank]
        print(f"{name}: singular values", ", ".join(f"{v / values[0]:.3f}" for v in values[:: rank // 6]))


if LOOK:
    prepare()
    show_orthogonalize()

# %% [markdown]
# ## Setup
#
# Letters are those of 02, and three more: E, the value embeddings' gate reads 12 channels; S, the smear's reads 24;
# W, all key/value heads side by side.
# Whatever is spelled `train.something` is explained there.

# %%
import dataclasses
import functools
import importlib
import math
from typing import NamedTuple

from onechip.card import describe_result
from onechip.doors import config_with
from onechip.errors import UserError, require
from onechip.export import names_of_files
from onechip.hosts import is_first
from onechip.hub import upload_folder
from onechip.layers import rms_norm
from onechip.machine import open_tensorboard, read_secret
from onechip.rows import lookup
from onechip.settings import change_default, check_fields, setting
from onechip.tables import table
from onechip.torch_export import read_nanochat
from onechip.weights import Weight, constant, normal, uniform

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

# %% [markdown]
# ## The dial
#
# One number, the depth, decides the rest. Width grows with depth, tokens with parameters, and the batch with tokens:
#
# - **width** 64 channels a layer, rounded up to whole heads;
# - **tokens** `ratio` times N, which counts the matrices of the blocks and lm_head, and no embeddings: scaling laws fit
#   that best, nanochat found;
# - **batch** 2^19 tokens at depth 12 and D^0.383 from there (*Power Lines*, Bergsma et al., 2025, arXiv 2505.13738),
#   as a power of two. Learning rates follow the batch's square root, below.
#
# A field that is 0 follows the depth; each can be set. All of it is printed before a run begins.

# %%
REFERENCE_DEPTH, REFERENCE_TOKENS = 12, 2**19  # where the rates were tuned: depth and tokens a batch
GATE_INPUTS, SMEAR_INPUTS = 12, 24  # channels that the two gates read


def width_at(depth, head_dim):
    """Channels of the residual stream: 64 a layer, rounded up to whole heads."""
    return -(-64 * depth // head_dim) * head_dim


def has_value_embedding(layer, n_layer):
    """Every other layer has one, the last one always."""
    return layer % 2 == (n_layer - 1) % 2


def scaling_params(depth, width, kv_width, vocab_size, gates):
    """N: the matrices of the blocks, `gates` numbers in their gates, and lm_head."""
    return depth * (2 * width * width + 2 * width * kv_width + 8 * width * width) + gates + width * vocab_size


def reference_params(head_dim, vocab_size):
    """N of the reference, depth 12 with all its value embeddings, heads of this size and this vocabulary."""
    width = width_at(REFERENCE_DEPTH, head_dim)
    gates = sum(has_value_embedding(i, REFERENCE_DEPTH) for i in range(REFERENCE_DEPTH)) * GATE_INPUTS
    return scaling_params(REFERENCE_DEPTH, width, width, vocab_size, gates * (width // head_dim))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train.TrainConfig):
    """The model, how much of it there is, and what training needs of any model."""

    depth: int = setting(12, "layers; decides whatever below is 0", fixed=True, at_least=1, at_most=256)
    n_embd: int = setting(0, "channels of the residual stream; 0: 64 a layer, in whole heads", fixed=True, at_least=0)
    head_dim: int = setting(128, "channels per head", fixed=True, at_least=1)
    n_kv_head: int = setting(0, "key/value heads, dividing the heads; 0: as many", fixed=True, at_least=0)
    total_batch_size: int = setting(0, "sequences per step, accumulated; 0: by depth", fixed=True, at_least=0)
    num_iterations: int = setting(0, "optimizer steps; 0: by target_flops, else by ratio", at_least=0)
    ratio: float = setting(12.0, "tokens per parameter of the matrices and lm_head", above=0, at_most=1e6)
    target_flops: float = setting(
        0.0, "training FLOPs in all, every key of a window counted; 0: by ratio", at_least=0, at_most=1e30
    )
    value_embeds: bool = setting(True, "a second embedding, added to the values of every other layer", fixed=True)
    smear: bool = setting(True, "mix the previous token's embedding into each", fixed=True)
    backout: bool = setting(True, "subtract the middle layer's stream before the head", fixed=True)
    lambdas: bool = setting(True, "learned weights of the stream and of the embedding in each layer", fixed=True)
    qk_scale: float = setting(1.2, "what normed queries and keys are multiplied by", fixed=True, above=0, at_most=2)
    fc_init: float = setting(
        0.4, "deviation of the MLP's first matrix, in units of 1 / sqrt(n_embd)", fixed=True, above=0
    )
    compatible: bool = setting(
        False, "only what transformers' NanoChat computes: no value_embeds, smear, backout or lambdas, qk_scale 1, "
        "full windows; its cost in bits per byte is not measured", fixed=True,
    )  # fmt: skip
    embed_dtype: str = setting(
        "float32", "how embeddings and their moments are stored", fixed=True, choices=("bfloat16", "float32")
    )
    save_minutes: float = change_default(train.TrainConfig, "save_minutes", 30.0)
    rope_base: float = change_default(train.TrainConfig, "rope_base", 100_000.0)
    grad_clip: float = change_default(train.TrainConfig, "grad_clip", 0.0)
    warmup_steps: int = change_default(train.TrainConfig, "warmup_steps", 40)
    warmdown_ratio: float = change_default(train.TrainConfig, "warmdown_ratio", 0.65)
    final_lr_frac: float = change_default(train.TrainConfig, "final_lr_frac", 0.05)

    n_layer = property(lambda self: self.depth)
    n_head = property(lambda self: self.n_embd // self.head_dim)
    mlp_dim = property(lambda self: 4 * self.n_embd)

    @property
    def sizes(self):
        """02's, and three more letters."""
        more = {"W": self.n_kv_head * self.head_dim, "E": GATE_INPUTS, "S": SMEAR_INPUTS}
        return {**super().sizes, **more}

    @property
    def long_windows(self):
        """Keys that a query sees in each layer: S a quarter of the context, in whole 128s, L all, and its own."""
        keys = {"S": -(-self.seq_len // 512) * 128 + 1, "L": self.seq_len + 1}
        return tuple(keys[letter] for letter in (self.window_pattern * self.depth)[: self.depth - 1] + "L")

    @property
    def windows(self):
        """The same in texts of at most seq_len tokens."""
        return tuple(min(keys, self.seq_len) for keys in self.long_windows)

    @property
    def gated_layers(self):
        """Those that have value embeddings."""
        return tuple(self.value_embeds and has_value_embedding(i, self.depth) for i in range(self.depth))

    @property
    def score_scale(self):
        """Of queries and keys times qk_scale each."""
        return self.qk_scale**2 * super().score_scale

    @property
    def scaling_params(self):
        """N, which tokens and weight decay are reckoned from."""
        gates = sum(self.gated_layers) * self.n_kv_head * GATE_INPUTS
        return scaling_params(self.depth, self.n_embd, self.n_kv_head * self.head_dim, self.vocab_size, gates)

    def __post_init__(self):
        check_fields(self)
        for name, value in COMPATIBLE.items() if self.compatible else ():
            object.__setattr__(self, name, value)
        for name in DIALED:
            if getattr(self, name) == 0:
                object.__setattr__(self, name, by_depth(self, name))
            self.check_sizes()
        super().__post_init__()

    def check_sizes(self):
        """Raises UserError unless there is a whole number of heads."""
        heads = f"must be a multiple of head_dim={self.head_dim}"
        require(self.n_embd % self.head_dim == 0, "n_embd", self.n_embd, heads)
        inputs = max(GATE_INPUTS * self.value_embeds, SMEAR_INPUTS * self.smear)
        require(self.n_embd >= inputs, "n_embd", self.n_embd, f"the gates read {inputs} channels")

    def smaller_models(self):
        """Configs of less depth, nearest first; what followed the depth still does."""
        follows = {name: 0 for name in DIALED if getattr(self, name) == by_depth(self, name)}
        for depth in range(self.depth - 1, 0, -1):
            try:
                smaller = dataclasses.replace(self, depth=depth, **follows)
            except UserError:  # what was set does not go with this depth
                continue
            yield smaller


# The model as transformers has it.
COMPATIBLE = {
    "value_embeds": False, "smear": False, "backout": False, "lambdas": False, "qk_scale": 1.0, "window_pattern": "L",
}  # fmt: skip
DIALED = ("n_embd", "n_kv_head", "total_batch_size", "num_iterations")  # in this order: each may need those before


def by_depth(config, name):
    """What the dial says of one of the fields in DIALED, the ones before it being known."""
    c = config
    if name == "n_embd":
        return width_at(c.depth, c.head_dim)
    if name == "n_kv_head":
        return c.n_embd // c.head_dim
    tokens = int(c.ratio * c.scaling_params)
    if name == "total_batch_size":
        share = tokens / (c.ratio * reference_params(c.head_dim, c.vocab_size))
        batch = 2 ** round(math.log2(REFERENCE_TOKENS * share**0.383))
        return max(1, batch // (c.seq_len * c.device_batch_size)) * c.device_batch_size
    batch = c.total_batch_size * c.seq_len
    if c.target_flops:
        return max(1, round(c.target_flops / (window_flops(c) * batch)))
    return max(1, tokens // batch)


def window_flops(config):
    """FLOPs per token as nanochat counts them: 6 a parameter of a product, and every key of a window."""
    smear = SMEAR_INPUTS if config.smear else 0
    keys = sum(min(window - 1, config.seq_len) if window < config.seq_len else window for window in config.windows)
    return 6 * (config.scaling_params + smear) + 12 * config.n_embd * keys


# GPT-2's quality by nanochat's figures: depth 24, 8 tokens a parameter of its N.
DAY = {
    "data": "climbmix", "packing": "best-fit", "depth": 24, "ratio": 8.0, "device_batch_size": 1,
    "embed_dtype": "bfloat16",
}  # fmt: skip
# modded-nanogpt's target, a loss of 3.28 on FineWeb: its data, held-out tokens, width and depth, and as many tokens as
# the 3,250 steps of 524,288 that Muon takes in its comparison of optimizers, the first of them in smaller batches.
FINEWEB_328 = {
    "data": "fineweb10b", "vocab_size": 50257, "depth": 12, "value_embeds": False, "seq_len": 1024,
    "device_batch_size": 4, "total_batch_size": 512, "num_iterations": 4000, "stages": "600:256x512 1200:256x1024",
    "eval_tokens": 20 * 2**19, "embed_dtype": "bfloat16",
}  # fmt: skip
PRESETS = {
    "chip": {"embed_dtype": "bfloat16"},
    "day": DAY,
    "3.28": FINEWEB_328,
    "gpu": train.PRESETS["gpu"] | {"embed_dtype": "bfloat16"},
    "laptop": {name: value for name, value in train.PRESETS["laptop"].items() if name != "n_head"} | {"depth": 4},
}


# %%
if LOOK:
    for depth in (4, 12, 24):
        c = Config(depth=depth)
        print(f"depth {depth}: {c.n_embd} channels, N {c.scaling_params / 1e6:.0f}M; {c.num_iterations:,} steps of "
              f"{c.total_batch_size} x {c.seq_len} tokens; windows {c.windows[:4]} ...")  # fmt: skip

# %% [markdown]
# ## Model
#
# 02's transformer with what nanochat has added to it by July 2026. Each part is a row or two of the table and a line of
# one function, and can be switched off by its field.
#
# - **Value embeddings**: every other layer has a second embedding, of the width of its values, added to them in an
#   amount that a gate decides for each head (modded-nanogpt; after *Value Residual Learning*, Zhou et al., 2024). They
#   are most of the parameters and cost no FLOPs: at depth 12, 151M of them against 85M in the blocks. On a chip they
#   are stored in bfloat16, as nanochat's are, and so are their moments.
# - **Smear**: a gate mixes the previous token's embedding into each token's, so that the first layer sees pairs of
#   tokens. It starts at nothing.
# - **Backout**: a fifth of the middle layer's stream is subtracted before the head: what that layer knew, the next
#   token's logits need not.
# - **Lambdas**: weights of the stream and of the embedding in each layer, 02's, with starts that fall with depth.
# - **Sharper attention**: normed queries and keys times 1.2, so scores up to 16.3.
# - **Windows** of a quarter of the context in three of four layers.


# %%
def nanochat_weights(config):
    """02's table with nanochat's starts, and with value embeddings, smear and backout where the config has them."""
    matrix = lambda factor: lambda key, shape, fan_in: factor * uniform(key, shape, config.n_embd)
    gate = lambda key, shape, fan_in: jax.random.uniform(key, shape, maxval=0.02)
    line = lambda first, last: lambda key, shape, fan_in: jnp.linspace(first, last, *shape)
    base = train.gpt_weights(config)
    layer = {**base["layers"][0], "c_fc": Weight("D->F", matrix(config.fc_init), "mlp")}
    values = {
        "value_embeds": Weight("V->W", matrix(1.0), "embed", "value_embeds", config.embed_dtype),
        "value_gate": Weight("E->K", gate, "attention"),
    }
    weights = {
        "wte": Weight("V->D", normal(0.8), "embed", dtype=config.embed_dtype),
        "lm_head": base["lm_head"],
        "layers": [layer | values if gated else layer for gated in config.gated_layers],
    }
    if config.lambdas:
        weights["resid_lambdas"] = Weight("L", line(1.15, 1.05), "scalar", "resid_lambdas")
        weights["x0_lambdas"] = Weight("L", line(0.2, 0.05), "scalar", "x0_lambdas")
    if config.smear:
        weights["smear_gate"] = Weight("S->", gate, "attention", "smear")
        weights["smear_lambda"] = Weight("", constant(0.0), "scalar", "smear")
    if config.backout:
        weights["backout_lambda"] = Weight("", constant(0.2), "scalar", "backout")
    return weights


def nanochat_embed(config, params, tokens, before):
    """The residual stream (B, T, D): normed embeddings, each with some of the one before it (`before` at the start)."""
    x = rms_norm(lookup(params["wte"], tokens))
    if not config.smear:
        return x
    if before is None:
        first = jnp.zeros_like(x[:, :1])
    else:
        first = jnp.where(before[..., None] >= 0, rms_norm(params["wte"][before]), 0)
    gate = jax.nn.sigmoid((x[..., :SMEAR_INPUTS] @ params["smear_gate"]).astype(jnp.float32))
    amount = params["smear_lambda"] * gate[..., None]
    return train.mix(1.0, x, amount, jnp.concatenate([first, x[:, :-1]], axis=1))


def gated_values(layer, tokens, x):
    """What value embeddings add to a layer's values: a gate (B, T, K) for each head, from its normed input x (B, T, D),
    and rows (B, T, W)."""
    # All of x times a matrix that is zero but for these rows: a slice of x would have to be written down first.
    weights = jnp.pad(layer["value_gate"], ((0, x.shape[-1] - GATE_INPUTS), (0, 0)))
    gate = 3 * jax.nn.sigmoid((x @ weights).astype(jnp.float32))
    return gate, lookup(layer["value_embeds"], tokens)


def nanochat_block(config, params, i, streams, tokens, attend):
    """(the residual stream (B, T, D) after layer i, its part of the cache); the arguments are 02's."""
    layer, x = params["layers"][i], streams[-1]
    with jax.named_scope(f"layer_{i}/attention"):
        if config.lambdas:
            x = train.mix(params["resid_lambdas"][i], x, params["x0_lambdas"][i], streams[0])
        more_v = functools.partial(gated_values, layer, tokens) if "value_embeds" in layer else None
        y, past = train.attention_block(layer, x, attend, more_v)
        x = x + y
    with jax.named_scope(f"layer_{i}/mlp"):
        return x + train.mlp_block(layer, x), past


def nanochat_readout(config, params, streams):
    """Final hidden states (B, T, D), normed; the middle one is the stream after layer n_layer // 2."""
    x = streams[-1]
    if config.backout:
        x = train.mix(1.0, x, -params["backout_lambda"], streams[config.n_layer // 2 + 1])
    return rms_norm(x)


def adopt_nanochat(about):
    """Fields of a compatible Config for the config.json of a transformers NanoChat; UserError for what it cannot be."""
    width, heads = about["hidden_size"], about["num_attention_heads"]
    head_dim = about.get("head_dim") or width // heads
    require(about.get("hidden_act", "relu2") == "relu2", "hidden_act", about.get("hidden_act"), "must be relu2")
    require(
        about["intermediate_size"] == 4 * width, "intermediate_size", about["intermediate_size"], f"must be {4 * width}"
    )
    require(heads * head_dim == width, "head_dim", head_dim, f"times num_attention_heads={heads} must be {width}")
    rope = about.get("rope_parameters") or {}
    return {
        "compatible": True, "depth": about["num_hidden_layers"], "n_embd": width, "head_dim": head_dim,
        "n_kv_head": about.get("num_key_value_heads") or heads, "vocab_size": about["vocab_size"],
        "seq_len": about["max_position_embeddings"], "softcap": about.get("final_logit_softcapping") or 0.0,
        "rope_base": about.get("rope_theta") or rope.get("rope_theta", 10000.0), "attn_impl": "einsum",
        "dtype": "float32",
    }  # fmt: skip


NANOCHAT = train.Model(
    "05_speedrun.NANOCHAT", Config, nanochat_weights, nanochat_embed, nanochat_block, nanochat_readout,
    read=read_nanochat, adopt=adopt_nanochat, presets=PRESETS,
)  # fmt: skip

# %%
if LOOK:
    print(train.describe_model(Config(), NANOCHAT))

# %% [markdown]
# ## Muon
#
# Muon (Jordan et al., 2024) orthogonalizes the momentum of each matrix inside the blocks; everything else is AdamW's,
# in groups with a rate each. The table of weights says what is what: a matrix of kind `attention` or `mlp` is Muon's,
# with all its input axes as one side and all its output axes as the other, so that heads make one matrix. Matrices of
# one shape are stacked and orthogonalized together.
#
# What was added to Muon since, in the order in which it is done here:
#
# - **Nesterov**: the gradient is mixed with the momentum that it has just changed.
# - **Equilibration** (MuonEq, arXiv 2603.28254): all outputs get gradients of one length first.
# - **Polar Express** instead of Newton and Schulz's polynomial, and in bfloat16 where the model computes in it.
# - **Renormalization** (Muon+, arXiv 2602.21545): the update gets the norm that an orthogonal matrix of its shape has.
# - **NorMuon** (arXiv 2510.05491): what an output's update usually measures is divided out, one number an output.
# - **Cautious decay**: weights decay only where the update shrinks them as well.
#
# The defaults are nanochat's of July 2026 (karpathy/nanochat 92d63d4). Rates are tuned at depth 12 and batches of 2^19
# tokens; they follow the square root of the batch, and those of the embeddings and lm_head one over that of the width.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """What Muon needs, and AdamW for the rest. Rates are those at 2^19 tokens a step and 768 channels."""

    learning_rate: float = setting(1.0, "all rates below but gate_lr, times this", above=0)
    matrix_lr: float = setting(0.02, "Muon: matrices inside the blocks", above=0)
    lm_head_lr: float = setting(0.008, "AdamW: lm_head", above=0)
    embed_lr: float = setting(0.3, "AdamW: wte", above=0)
    value_embed_lr: float = setting(0.15, "AdamW: value embeddings", above=0)
    resid_lr: float = setting(0.005, "AdamW: weights of the stream", above=0)
    x0_lr: float = setting(0.5, "AdamW: weights of the embedding", above=0)
    gate_lr: float = setting(0.2, "AdamW: smear, backout and other scalars; the same at any batch", above=0)
    weight_decay: float = setting(0.28, "Muon: decoupled, cautious; falls to 0 along a cosine", at_least=0)
    beta1: float = setting(0.97, "Muon: momentum in the middle of the run", at_least=0, below=1)
    momentum_start: float = setting(0.85, "Muon: momentum of the first step", at_least=0, below=1)
    momentum_end: float = setting(0.90, "Muon: momentum that the warm-down ends with", at_least=0, below=1)
    momentum_warmup: int = setting(400, "Muon: steps in which it rises to beta1", at_least=0)
    beta2: float = setting(0.9, "NorMuon: decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-10, "AdamW: added to the root; NorMuon: the smallest second moment", above=0)


class Group(NamedTuple):
    """How AdamW treats a group of weights. rate: a field; by_width, by_batch: whether it follows those."""

    rate: str
    beta1: float
    beta2: float
    decay: float
    by_width: bool = False
    by_batch: bool = True


GROUPS = {
    "lm_head": Group("lm_head_lr", 0.8, 0.96, 0.01, by_width=True),
    "embed": Group("embed_lr", 0.8, 0.995, 0.001, by_width=True),
    "value_embeds": Group("value_embed_lr", 0.8, 0.995, 0.01, by_width=True),
    "resid_lambdas": Group("resid_lr", 0.8, 0.95, 0.05),
    "x0_lambdas": Group("x0_lr", 0.96, 0.95, 0.0),
}
OTHERS = Group("gate_lr", 0.8, 0.95, 0.0, by_batch=False)


def is_muons(weight):
    """Whether a weight is a matrix inside a block."""
    return weight.is_matrix and weight.group in ("attention", "mlp")


def batch_share(config):
    """Tokens a step, as a share of the reference's."""
    return config.total_batch_size * config.seq_len / REFERENCE_TOKENS


def group_rate(config, group):
    """A group's learning rate at the top of the schedule; group None: Muon's."""
    rate = getattr(config, group.rate if group else "matrix_lr")
    if group and group.by_width:
        rate *= (config.n_embd / 768) ** -0.5
    return rate * config.learning_rate * batch_share(config) ** 0.5 if group is None or group.by_batch else rate


def peak_decay(config, weights):
    """Muon's weight decay at the first step: it falls with the tokens of the run, by N, and rises with the batch."""
    sizes = [math.prod(w.shape(config)) for w in jax.tree.leaves(weights) if w.group in ("attention", "mlp", "lm_head")]
    share = reference_params(config.head_dim, config.vocab_size) / sum(sizes)
    return config.weight_decay * batch_share(config) ** 0.5 * share


# %% [markdown]
# Three schedules: 02's for the rates, with 40 steps of warm-up and 65 % of warm-down to a twentieth; the momentum rises
# in 400 steps and falls again with the rates; weight decay falls along a cosine.


# %%
def momentum_at(config, step):
    """Muon's momentum at a 0-based step, float32; while it rises nothing else counts."""
    start, peak, end = config.momentum_start, config.beta1, config.momentum_end
    rise = start + (peak - start) * step / max(1, config.momentum_warmup)
    warmdown = max(1, round(config.warmdown_ratio * config.num_iterations))
    fallen = jnp.clip((step - config.num_iterations + warmdown) / warmdown, 0.0, 1.0)
    return jnp.where(step < config.momentum_warmup, rise, peak + (end - peak) * fallen)


def decay_at(config, weights, step):
    """Muon's weight decay at a 0-based step."""
    left = 1 - step / config.num_iterations
    return peak_decay(config, weights) * jnp.sin(0.5 * math.pi * left) ** 2  # (1 + cos) / 2, exact where it is small


# %%
if LOOK:
    c = config_with(Config, MuonSettings)()
    for step in (0, 40, 400, c.num_iterations // 2, c.num_iterations - 1):
        share = train.learning_rate_at(c, step)
        print(f"step {step}: rates times {share:.3f}, momentum {momentum_at(c, step):.3f}")

# %% [markdown]
# The state is AdamW's, a first and a second moment of each weight; of a matrix of Muon's the second is one number for
# each output, or for each input where there are more of those.


# %%
def matrix_shape(config, weight):
    """(inputs, outputs) of a matrix, whatever its axes."""
    inputs = weight.fan_in(config)
    return inputs, math.prod(weight.shape(config)) // inputs


def per_neuron_shape(config, weight):
    """The shape of NorMuon's second moment: the weight's, with 1 for the axes of its shorter side."""
    (inputs, outputs), split = matrix_shape(config, weight), len(weight.axes.partition("->")[0])
    shape = weight.shape(config)
    return (1,) * split + shape[split:] if outputs >= inputs else shape[:split] + (1,) * (len(shape) - split)


def muon_init(config, weights, params):
    """Zero moments, each in the dtype of its parameter."""
    second = lambda w, p: jnp.zeros(per_neuron_shape(config, w) if is_muons(w) else p.shape, p.dtype)
    return {"mu": jax.tree.map(jnp.zeros_like, params), "nu": jax.tree.map(second, weights, params)}


def norm_of(X):
    """Frobenius norms (S, 1, 1), float32, of matrices (S, in, out)."""
    return jnp.linalg.norm(X.astype(jnp.float32), axis=(1, 2), keepdims=True)


def muon_directions(U, without=()):
    """Updates (S, in, out) float32 from momenta U (S, in, out) in the compute type; without: steps left out."""
    if "equilibrate" not in without:
        lengths = jnp.linalg.norm(U.astype(jnp.float32), axis=1, keepdims=True)
        U = U * (norm_of(U) / math.sqrt(U.shape[2]) / jnp.maximum(lengths, 1e-6)).astype(U.dtype)
    X = orthogonalize(U).astype(jnp.float32)
    if "renormalize" not in without:
        X = X * (math.sqrt(min(X.shape[1:])) / jnp.maximum(norm_of(X), 1e-6))
    return X


def per_neuron(config, X, V):
    """(X, V) with what each longer side's line of X (S, in, out) usually measures divided out, at the same norm."""
    square = jnp.mean(X * X, axis=1 if X.shape[2] >= X.shape[1] else 2, keepdims=True)
    V = config.beta2 * V + (1 - config.beta2) * square
    Y = X * jax.lax.rsqrt(jnp.maximum(V, config.eps))
    return Y * (norm_of(X) / jnp.maximum(norm_of(Y), 1e-10)), V


def muon_stack(config, U, V, without=()):
    """(updates (S, in, out) float32, second moments V) from a stack's momenta U (S, in, out) in the compute type."""
    X = muon_directions(U, without)
    return (X, V) if "per_neuron" in without else per_neuron(config, X, V)


def muon_apply(p, x, rate, decay, shape, without=()):
    """A weight after a step: p, float32, and its update x in its shape, a matrix of `shape` (in, out) to Muon."""
    if "shape" not in without:
        rate = rate * math.sqrt(max(1.0, shape[1] / shape[0]))
    shrinks = x * p >= 0 if "cautious" not in without else True
    return p - rate * (x + decay * jnp.where(shrinks, p, 0))


def adam_step(config, group, p, m, v, g, rate, step):
    """(p, m, v) after 0-based step `step` of AdamW with a group's betas and decay."""
    m = group.beta1 * m + (1 - group.beta1) * g
    v = group.beta2 * v + (1 - group.beta2) * g * g
    t = config.steps_before + step + 1.0
    direction = (m / (1 - group.beta1**t)) / (jnp.sqrt(v / (1 - group.beta2**t)) + config.eps)
    return p - rate * (direction + group.decay * p), m, v


def muon_update(config, weights, params, state, grads, step, spread=train.UNSHARED, *, without=(), precondition=None):
    """(parameters, state) after 0-based step `step`; without: parts of Muon left out, for ablations.

    spread: a mesh.Spread, with which each device orthogonalizes whole matrices of its own.
    precondition(config, G, U, bases, step) -> (U, bases) changes a stack's momenta before they are orthogonalized; what
    it keeps of them is state["bases"], by the stack's shape.
    """
    share = train.learning_rate_at(config, step) / config.learning_rate
    momentum, decay = momentum_at(config, step), decay_at(config, weights, step)
    kinds, treedef = jax.tree.flatten(weights)
    p, m, v, g = (jax.tree.leaves(tree) for tree in (params, state["mu"], state["nu"], grads))
    stacks, bases = {}, {}
    for i, weight in enumerate(kinds):
        if is_muons(weight):
            m[i] = momentum * m[i] + (1 - momentum) * g[i]
            stacks.setdefault((matrix_shape(config, weight), spread.axis_of(weight)), []).append(i)
        else:
            group = GROUPS.get(weight.group, OTHERS)
            p[i], m[i], v[i] = adam_step(config, group, p[i], m[i], v[i], g[i], share * group_rate(config, group), step)
    for (shape, axis), members in stacks.items():
        nesterov = lambda i: m[i] if "nesterov" in without else momentum * m[i] + (1 - momentum) * g[i]
        side = (1, -1) if shape[1] >= shape[0] else (-1, 1)
        stack = lambda arrays, shape: jnp.stack([array.reshape(shape) for array in arrays])
        U, V = stack([nesterov(i) for i in members], shape), stack([v[i] for i in members], side)
        if precondition:
            key, G = f"{shape[0]}x{shape[1]}", stack([g[i] for i in members], shape)
            U, bases[key] = precondition(config, G, U, state["bases"][key], step)
        # Cast before what is split is exchanged.
        X, V = spread(functools.partial(muon_stack, config, without=without), axis, U.astype(config.dtype), V)
        for row, i in enumerate(members):
            x, rate = X[row].reshape(p[i].shape), share * group_rate(config, None)
            p[i], v[i] = muon_apply(p[i], x, rate, decay, shape, without), V[row].reshape(v[i].shape)
    unflatten = functools.partial(jax.tree.unflatten, treedef)
    return unflatten(p), {"mu": unflatten(m), "nu": unflatten(v)} | ({"bases": bases} if precondition else {})


# Rates for batches of 2,048 tokens: all times 8 but those of the two lambdas, which that would make restless.
LAPTOP_RATES = {"learning_rate": 8.0, "resid_lr": 0.005 / 8, "x0_lr": 0.5 / 8}
MUON = train.Optimizer("05_speedrun.MUON", muon_init, muon_update, MuonSettings, presets={"laptop": LAPTOP_RATES})

# %%
if LOOK:
    c = config_with(Config, MuonSettings)(
        depth=2, head_dim=16, seq_len=64, vocab_size=512, attn_impl="einsum", dtype="float32", device_batch_size=4,
        total_batch_size=4, num_iterations=20, loss_slice=64, learning_rate=16.0, warmup_steps=2,
    )  # fmt: skip
    mesh = train.make_mesh(jax.local_devices()[:1])
    state, step = train.init_state(c, mesh, NANOCHAT, MUON), train.make_train_step(c, mesh, NANOCHAT, MUON)
    toy_tokens = jax.random.randint(jax.random.key(1), (4, 65), 0, 512)
    for i in range(10):
        state, metrics = step(state, {"x": toy_tokens[:, :-1], "y": toy_tokens[:, 1:]})
        if i % 3 == 0:
            print(f"step {i}: loss {float(metrics['loss']):.3f}, rates times {float(metrics['lr']):.2f}")

# %% [markdown]
# ## Run
#
# As in 02: `OVERRIDES` or the command line, one run per set of settings, resumed when it is started again. The laptop
# preset is depth 4 with heads of 64 and steps of 2,048 tokens, a 64th of what the dial would take. Rates that follow
# the square root of the batch are too low there by a factor of about eight.
#
# - `--preset day --session_hours 23` is what this notebook is for: depth 24 on 5.84 billion tokens of ClimbMix, GPT-2's
#   quality by nanochat's figures, in 15 hours of one v6e by estimate (docs/day.md).
# - `--preset 3.28` is modded-nanogpt's target on FineWeb, in stages of growing batches, 48 minutes by estimate.

# %%


def describe_dial(config, weights):
    """A table as text: what the dial decided, what was set against it, and every rate that follows."""
    c, rows = config, [["depth", f"{config.depth}", ""]]
    for name in DIALED:
        value, own = getattr(c, name), by_depth(c, name)
        rows.append([name, f"{value:,}", "" if value == own else f"by depth: {own:,}"])
    for name in ("warmup_steps", "warmdown_ratio", "final_lr_frac"):
        value, default = getattr(c, name), getattr(Config, name)
        rows.append([name, f"{value:g}", "" if value == default else f"by default: {default:g}"])
    tokens = c.num_iterations * c.total_batch_size * c.seq_len
    rows.append(["tokens a parameter", f"{tokens / c.scaling_params:.3g}", ""])
    if isinstance(c, MuonSettings):
        for group in (None, *GROUPS.values(), OTHERS):
            name = group.rate if group else "matrix_lr"
            rate, default = group_rate(c, group), getattr(MuonSettings, name) / getattr(c, name)
            own = rate * default / (1 if group is OTHERS else c.learning_rate)
            rows.append([name, f"{rate:.3g}", "" if math.isclose(rate, own) else f"by depth: {own:.3g}"])
        rows.append(["weight_decay", f"{peak_decay(c, weights):.3g}", ""])
    return table(rows, ["the dial", "is", ""], "<20 >12 <40")


# %%
OVERRIDES = ""  # @param ["", "--preset laptop", "--depth 8", "--preset day --session_hours 23"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    run, config, optimizer = train.choose_parts(NANOCHAT, OVERRIDES, optimizer=MUON)
    print(describe_dial(config, nanochat_weights(config)))
    print(train.describe_model(config, NANOCHAT))
    run = train.show_fit(config, run, NANOCHAT, optimizer=optimizer)

# %%
if __name__ == "__main__":
    hub_token = read_secret("HF_TOKEN")
    result, tokenizer, mirror = train.train_run(run, config, hub_token, NANOCHAT, optimizer)

# %% [markdown]
# ## Look
#
# The same text is held out as in 02 and 04 and scored in bits per byte: compare the last lines. 02's AdamW has 2.053
# after the same 300 steps.

# %%
if __name__ == "__main__":
    print(describe_result(result, config))
    open_tensorboard(result.run_dir)

# %% [markdown]
# ## Save
#
# As 02 saves: weights, config, tokenizer, curve and a card with the lines that load it, to the Hub with a token.

# %%
if __name__ == "__main__" and is_first():
    folder = train.export_model(result, tokenizer, mirror.repo if mirror else "")
    upload_folder(folder, names_of_files(folder), hub_token, run.hub_repo, f"onechip-{run.name}")
