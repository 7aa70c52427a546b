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
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/04_maxtext.ipynb)
# # A model whose dimensions follow the chip
#
# A second model on the trainer of `02_train`: wider heads, fewer of them, a gated MLP, plain residuals, 369M
# parameters in the manner of MaxText, Gemma and Llama. Loader, loss, optimizer, loop, checkpoints, sampling and
# profile are 02's, imported. What comes out is, number for number, a Qwen3 that other libraries load.
#
# | where | model | time | memory | cost |
# |---|---|---|---|---|
# | laptop, two cores, no network | 8M parameters, Python's own sources | 3 minutes | under 2 GB | nothing |
# | Colab, TPU v6e | 369M parameters, FineWeb-Edu | hours; resumes where it stopped | under 31.25 GiB | compute units |

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
# ## What a gate does
#
# A hidden channel of 02's MLP is the square of one number, or zero. Here it is a product of two: `gate` decides how
# much of `up` comes through, and `up` may have either sign. The table has the values of one channel. That is the SwiGLU
# of Llama, Gemma and Qwen; it needs a third matrix.

# %%
import numpy as np

from onechip.machine import prepare, wants_a_look
from onechip.tables import table

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them


def show_gate(gates=(-4.0, -1.0, 0.0, 1.0, 4.0)):
    """Prints what ReLU squared and SwiGLU make of the same numbers."""
    gate = np.array(gates)
    silu = gate / (1 + np.exp(-gate))
    rows = {"ReLU squared": np.maximum(gate, 0) ** 2, "SwiGLU, up = 2": silu * 2, "SwiGLU, up = -2": silu * -2 + 0.0}
    print(table([[name, *(f"{x:.2f}" for x in row)] for name, row in rows.items()], ["gate", *map(str, gates)]))


if LOOK:
    prepare()
    show_gate()

# %% [markdown]
# ## Setup
#
# Letters are those of 02: B batch, T sequence, D model, N query heads, K key/value heads, H head dimension, F MLP
# hidden, L layers, V vocabulary. Whatever is spelled `train.something` is explained there.

# %%
import dataclasses
import importlib

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from onechip import fit
from onechip.card import describe_result
from onechip.checkpoints import flatten
from onechip.chips import topology_devices
from onechip.errors import require, say
from onechip.export import FOREIGN_WEIGHTS, copy_into, names_of_files, write_card
from onechip.files import atomic_write, write_json
from onechip.hosts import is_first
from onechip.hub import upload_folder
from onechip.machine import open_tensorboard, read_secret
from onechip.rows import lookup
from onechip.runfolder import ABOUT, RunFolder
from onechip.settings import Run, change_default, setting
from onechip.torch_export import common_fields
from onechip.weights import Weight, draw_weights, normal, uniform

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

# %% [markdown]
# ## Config
#
# 02 has one knob and derives the rest; here every size is written down, because each was chosen for the chip. A v6e
# multiplies tiles of 256 x 256: a side of 1,100 takes as long as one of 1,280. So every side of every matrix is a
# multiple of `tile`, and a head has 256 channels, where 02's 128 fill half of the unit in both products of attention.
# What else training needs is inherited, with a few defaults of its own. The laptop preset keeps the rule of tiles, with
# two query heads on a single key/value head.


# %%
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train.TrainConfig):
    """Sizes of the model, each of them explicit, and what training needs of any model."""

    n_embd: int = setting(1024, "channels of the residual stream", fixed=True, at_least=1)
    n_layer: int = setting(24, "layers", fixed=True, at_least=1)
    n_head: int = setting(4, "query heads", fixed=True, at_least=1)
    n_kv_head: int = setting(2, "key/value heads, a divisor of n_head", fixed=True, at_least=1)
    head_dim: int = setting(256, "channels per head", fixed=True, at_least=1)
    mlp_dim: int = setting(3072, "hidden channels of the MLP", fixed=True, at_least=1)
    tile: int = setting(
        256, "every side of a matrix is a multiple of it: 256 on a v6e, 128 on older TPUs, 1 for any", at_least=1
    )
    window_pattern: str = change_default(train.TrainConfig, "window_pattern", "L")
    softcap: float = change_default(train.TrainConfig, "softcap", 0.0)
    loss_slice: int = change_default(train.TrainConfig, "loss_slice", 1024)  # an eighth of a microbatch

    def check_sizes(self):
        """Raises UserError unless every side of every matrix is a multiple of tile."""
        for name in ("n_embd", "head_dim", "mlp_dim", "vocab_size"):
            remedy = f"must be a multiple of tile={self.tile}, which the matrix unit works on"
            require(getattr(self, name) % self.tile == 0, name, getattr(self, name), remedy)

    def smaller_models(self):
        """Configs of fewer layers, nearest first: what to propose where this one does not fit."""
        return (dataclasses.replace(self, n_layer=n) for n in range(self.n_layer - 1, 0, -1))


# %%
SMALL = {"n_embd": 256, "n_layer": 4, "n_head": 2, "n_kv_head": 1, "head_dim": 256, "mlp_dim": 768}
PRESETS = {"chip": {}, "gpu": train.PRESETS["gpu"], "laptop": train.PRESETS["laptop"] | SMALL}

if LOOK:
    print(Config().sizes)

# %% [markdown]
# ## Model
#
# Weights start as 02's, and the gate like the matrix next to it: embeddings N(0, 1), matrices into a block with
# variance 1 / fan-in as in MaxText, projections out of it zero, so that the first loss is exactly log(V). GPT-2's
# scheme, normal with 0.02 everywhere, had the higher loss after 300 laptop steps (LOG.md). There are no biases, and
# norms have no parameters.


# %%
def swiglu_weights(config):
    """02's table without the two lambdas, and c_gate (D, F) in each layer."""
    layer = {**train.gpt_weights(config)["layers"][0], "c_gate": Weight("D->F", uniform, "mlp")}
    return {
        "wte": Weight("V->D", normal(1.0), "embed"),
        "lm_head": Weight("D->V", normal(0.001), "lm_head"),
        "layers": [layer] * config.n_layer,
    }


# %% [markdown]
# Attention is 02's block: RMSNorm, RoPE, QK-norm, grouped heads, any of its kernels. The MLP is gated (Shazeer, *GLU
# Variants Improve Transformer*, 2020), with three matrices of 3,072 hidden channels where 02 has two of 4,096. The
# gate's gradient is written out and keeps its two inputs, 48 MiB each in a layer at 4 x 2048 tokens; autodiff keeps
# three more arrays of that size.


# %%
@jax.custom_vjp
def swiglu(gate, up):
    """silu(gate) * up elementwise, computed in float32; only its inputs are kept for the gradient."""
    g = gate.astype(jnp.float32)
    return (g * jax.nn.sigmoid(g) * up.astype(jnp.float32)).astype(up.dtype)


def swiglu_backward(saved, d):
    g, u = (a.astype(jnp.float32) for a in saved)
    d, s = d.astype(jnp.float32), jax.nn.sigmoid(g)
    d_gate = d * u * s * (1 + g * (1 - s))
    return d_gate.astype(saved[0].dtype), (d * g * s).astype(saved[1].dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), swiglu_backward)


def gated_mlp(layer, x):
    """What the gated MLP adds to the residual stream x (B, T, D)."""
    x = train.rms_norm(x)
    gate, up = (jnp.einsum("btd,df->btf", x, layer[name]) for name in ("c_gate", "c_fc"))
    return jnp.einsum("btf,fd->btd", swiglu(gate, up), layer["mlp_proj"])


def swiglu_embed(config, params, tokens, before):
    """The residual stream (B, T, D): the embedding as it is."""
    return lookup(params["wte"], tokens)


def swiglu_block(config, params, i, streams, tokens, attend):
    """(the residual stream (B, T, D) after layer i, its part of the cache); the arguments are 02's."""
    layer, x = params["layers"][i], streams[-1]
    with jax.named_scope(f"layer_{i}/attention"):
        y, past = train.attention_block(layer, x, attend)
        x = x + y
    with jax.named_scope(f"layer_{i}/mlp"):
        return x + gated_mlp(layer, x), past


# %% [markdown]
# ## Side by side
#
# What does it buy? The table under Run compares both models as designed, on the attached TPU or by the compiler's
# estimate for one that is not here (`--compare v6e:1x1`, which takes minutes). At two sequences a microbatch the
# estimated MFU is 53.6 % here and 47.8 % for 02. A token costs this model more FLOPs, yet the chip runs them faster:
#
# - heads of 256 channels fill the matrix unit, which heads of 128 half fill;
# - a layer has four heads to softmax instead of eight;
# - two K/V heads of 256 are half the keys and values to write and read;
# - the residual stream is read and written twice a layer, with no third pass that mixes the embedding in.


# %%
def side_by_side(fits):
    """A table as text of {name: (config, model, fit.Fit, tokens per second at the device's peak or None)}."""
    rows = {name: [name] for name in ("parameters", "FLOPs per token", "peak HBM, GiB", "ns per token", "MFU")}
    for config, model, found, peak in fits.values():
        rate = found.step_seconds and config.total_batch_size * config.seq_len / found.step_seconds
        cells = (
            f"{train.count_params(config, model)['total'] / 1e6:.1f}M",
            f"{train.flops_per_token(config, model):.3g}",
            f"{found.peak_bytes / 2**30:.2f}",
            f"{1e9 / rate:,.0f}" if rate else "unknown",
            f"{rate / peak:.1%}" if rate and peak else "unknown",
        )
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    where = next(iter(fits.values()))[2].where
    return table(rows.values(), [f"{where}, estimated", *fits], "<26 >12")


def compare_models(topology=""):
    """Both models as designed, compiled for a TPU topology or, where that is empty, for the attached device: text."""
    mesh = train.make_mesh(topology_devices(topology))
    fits = {}
    for name, config, model in (("02_train", train.Config(), train.GPT), ("04_maxtext", Config(), SWIGLU)):
        work = train.workload(mesh, model)
        fits[name] = config, model, fit.measure(work, config), fit.peak_rate(work, config)
    return side_by_side(fits)


# %% [markdown]
# ## A model that others load
#
# Weights travel as an architecture that is known elsewhere, where that computes the same numbers. Three things decide:
# QK-norm rules out Llama and Mistral; a norm before each block and none after it rules out Gemma 3 and OLMo 2; Qwen3
# has both, and no softcap, hence 0 above.
#
# It norms before it rotates and 02 after: a rotation changes no length, so with weights of one in the norm that is the
# same. All its norms get weights of one and our epsilon, and the halves of each query and key head change places,
# because nanochat turns a pair of channels the other way round. Logits then agree to float32's rounding, in mlx-lm by
# the tests and in transformers as LOG.md has it. The way back is the same permutation, so `open_model` opens that
# export too.


# %%
def why_not_qwen3(config):
    """What of a Config Qwen3 does not compute, in words, or None."""
    if config.softcap:
        return f"softcap={config.softcap}: Qwen3 does not bound its logits"
    if set(config.windows) != {config.seq_len}:
        return f"window_pattern={config.window_pattern!r}: mlx-lm, for one, knows no windows in a Qwen3"
    return None


QWEN3_MATRICES = {  # ours: theirs
    "c_q": "self_attn.q_proj", "c_k": "self_attn.k_proj", "c_v": "self_attn.v_proj", "c_proj": "self_attn.o_proj",
    "c_gate": "mlp.gate_proj", "c_fc": "mlp.up_proj", "mlp_proj": "mlp.down_proj",
}  # fmt: skip


def exchange_halves(config, name, w):
    """The halves of each query and key head change places: w (D, heads, H); other weights stay."""
    return np.roll(w, config.head_dim // 2, axis=-1) if name in ("c_q", "c_k") else w


def qwen3_weights(config, params):
    """{Hugging Face's name: array (out, in) of the compute type} of our parameters."""
    D, H = config.n_embd, config.head_dim
    norms = {"input_layernorm": D, "post_attention_layernorm": D, "self_attn.q_norm": H, "self_attn.k_norm": H}
    weights = {"model.embed_tokens": params["wte"], "lm_head": params["lm_head"].T, "model.norm": np.ones(D)}
    for i, (layer, of) in enumerate(zip(params["layers"], swiglu_weights(config)["layers"], strict=True)):
        for ours, theirs in QWEN3_MATRICES.items():
            w = exchange_halves(config, ours, np.asarray(layer[ours]))
            weights[f"model.layers.{i}.{theirs}"] = w.reshape(of[ours].fan_in(config), -1).T
        weights |= {f"model.layers.{i}.{name}": np.ones(size) for name, size in norms.items()}
    dtype = jnp.dtype(config.dtype)
    return {f"{name}.weight": np.ascontiguousarray(np.asarray(w).astype(dtype)) for name, w in weights.items()}


def read_qwen3(config, arrays):
    """The inverse of qwen3_weights: our parameters by flat names, float32. ValueError for a norm with weights."""
    trained = [name for name, w in arrays.items() if "norm" in name and not np.all(np.asarray(w, np.float32) == 1)]
    if trained:
        raise ValueError(f"{trained[0]} has weights, which norms here have not")
    flat = {"wte": arrays["model.embed_tokens.weight"], "lm_head": arrays["lm_head.weight"].T}
    for i, of in enumerate(swiglu_weights(config)["layers"]):
        for ours, theirs in QWEN3_MATRICES.items():
            w = arrays[f"model.layers.{i}.{theirs}.weight"].T.reshape(of[ours].shape(config))
            flat[f"layers.{i}.{ours}"] = exchange_halves(config, ours, w)
    return {name: np.asarray(w, np.float32) for name, w in flat.items()}


def write_qwen3(config, params, bos):
    """(config.json, arrays) of a Qwen3 that computes the same; UserError if none does."""
    reason = why_not_qwen3(config)
    require(not reason, "export", "qwen3", reason)
    return qwen3_config(config, bos), qwen3_weights(config, params)


def adopt_qwen3(about):
    """Fields of a Config for a Qwen3's config.json; UserError for what this model does not compute."""
    for name, wanted in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("use_sliding_window", False)):
        require(about.get(name, wanted) == wanted, name, about.get(name), f"must be {wanted}: 04's model has no other")
    require(not about.get("attention_bias"), "attention_bias", True, "must be false: this model has no biases")
    rope = about.get("rope_parameters") or {}
    return {
        "n_embd": about["hidden_size"], "n_layer": about["num_hidden_layers"], "n_head": about["num_attention_heads"],
        "n_kv_head": about["num_key_value_heads"], "head_dim": about["head_dim"],
        "mlp_dim": about["intermediate_size"], "vocab_size": about["vocab_size"], "tile": 1,
        "seq_len": about["max_position_embeddings"], "rope_base": about.get("rope_theta") or rope["rope_theta"],
        "attn_impl": "einsum", "dtype": "float32",
    }  # fmt: skip


SWIGLU = train.GPT._replace(
    name="04_maxtext.SWIGLU", config=Config, weights=swiglu_weights, embed=swiglu_embed, block=swiglu_block,
    read=read_qwen3, write=write_qwen3, adopt=adopt_qwen3, presets=PRESETS,
)  # fmt: skip

# %%
if LOOK:
    print(train.describe_model(Config(), SWIGLU))
    tiny = Config(n_embd=48, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, mlp_dim=80, vocab_size=512, seq_len=64,
                  tile=16, attn_impl="einsum", dtype="float32")  # fmt: skip
    params = draw_weights(tiny, swiglu_weights(tiny), jax.random.key(0))
    there_and_back = read_qwen3(tiny, qwen3_weights(tiny, params))
    print("as a Qwen3 and back, equal:", all(np.array_equal(there_and_back[k], v) for k, v in flatten(params).items()))


# %% [markdown]
# ## Run
#
# As in 02: `OVERRIDES` or the command line, one run per set of settings, resumed when it is started again.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareRun(Run):
    """What to run, on which data, where to leave it, and what to compare it with."""

    compare: str = setting("", "TPU topology to estimate both models for, v6e:1x1 say; empty: an attached TPU; or no")

    def wants_table(self):
        """Whether to compile both models first: for a topology, or for the TPU that is here."""
        return self.compare != "no" and bool(self.compare or jax.default_backend() == "tpu")


# %%
OVERRIDES = ""  # @param ["", "--preset laptop", "--compare v6e:1x1"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    run, config, optimizer = train.choose_parts(SWIGLU, OVERRIDES, CompareRun)
    print(train.describe_model(config, SWIGLU))
    if run.wants_table():
        print(compare_models(run.compare))
    run = train.show_fit(config, run, SWIGLU, optimizer=optimizer)

# %%
if __name__ == "__main__":
    hub_token = read_secret("HF_TOKEN")
    result, tokenizer, mirror = train.train_run(run, config, hub_token, SWIGLU, optimizer)

# %% [markdown]
# ## Look
#
# The same text is held out as in 02 and scored in bits per byte, so the two models can be compared by their last
# lines.

# %%
if __name__ == "__main__":
    print(describe_result(result, config))
    open_tensorboard(result.run_dir)

# %% [markdown]
# ## Save
#
# A tokenizer travels too: it opens every text with `<|bos|>`, as training did, and since the next document begins
# where one ends, `<|bos|>` is also what generation stops at. The model card says what was done to the weights and what
# the model is not. A config that Qwen3 does not compute is not bent to fit: it is saved as 02 saves, and its card says
# why.


# %%
def qwen3_config(config, bos):
    """config.json of a Qwen3ForCausalLM that computes what this Config's model does; bos ends a text as well."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **common_fields(config, bos),
        "hidden_act": "silu",
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "rms_norm_eps": float(jnp.finfo(jnp.float32).eps),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "torch_dtype": config.dtype,
    }


QWEN3_LOADING = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained({source!r}) for kind in (AutoModelForCausalLM, AutoTokenizer))
prompt = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64, do_sample=True, top_k=50)[0]))
"""
QWEN3 = """\
The weights are those of a `Qwen3ForCausalLM`, in {dtype}, and compute the same logits. Changed on the way: matrices
transposed, the halves of each query and key head exchanged (Qwen3 rotates the other way), norms written as weights of
one. The tokenizer opens a text with `<|bos|>`, as training did; generation stops at it."""
STYLE = "MaxText"
PLAIN = """\
`params.safetensors` holds the arrays under onechip's own names, in float32. It is not in the format of another library,
because none that is known computes the same: {reason}."""


def write_tokenizer(folder, config, tokenizer):
    """tokenizer.json and what AutoTokenizer reads with it: it opens a text with <|bos|>, as training did."""
    bos = tok.opening_token(tokenizer)
    opening = Tokenizer.from_str(tokenizer.to_str())
    ids = [(bos, tokenizer.token_to_id(bos))]
    opening.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=ids)
    tok.export_tokenizer(opening, folder, eos_token=bos, model_max_length=config.seq_len)


def export_qwen3(config, result, tokenizer, source=""):
    """Writes run_dir/model in Hugging Face's format, as a Qwen3 where the numbers agree; returns the folder.

    source: the Hub repository that it will be uploaded to, for the card.
    """
    if reason := why_not_qwen3(config):
        say(f"export: plain safetensors, as {reason}")
        return train.export_model(result, tokenizer, source, PLAIN.format(reason=reason), style=STYLE)
    run, bos = RunFolder(result.run_dir), tok.opening_id(tokenizer)
    copy_into(run.model, run.picture)
    with atomic_write(run.model / FOREIGN_WEIGHTS) as part:
        save_file(qwen3_weights(config, jax.device_get(result.params)), part, metadata={"format": "pt"})
    write_json(run.model / "config.json", qwen3_config(config, bos))
    write_json(run.model / ABOUT, run.read_config())
    write_json(run.model / "generation_config.json", {"bos_token_id": bos, "eos_token_id": bos})
    write_tokenizer(run.model, config, tokenizer)
    notes = QWEN3.format(dtype=config.dtype)
    style = {"library": "transformers", "dtype": config.dtype, "style": STYLE}
    write_card(run.model, result, QWEN3_LOADING, source=source, notes=notes, **style)
    say(f"export: {run.model} is a Qwen3ForCausalLM in {config.dtype}")
    return run.model


# %%
if __name__ == "__main__" and is_first():
    folder = export_qwen3(config, result, tokenizer, f"{mirror.repo}-hf" if mirror else "")
    hf_repo = run.hub_repo and f"{run.hub_repo}-hf"  # apart from the checkpoints, whose config.json is another
    upload_folder(folder, names_of_files(folder), hub_token, hf_repo, f"onechip-{run.name}-hf")
