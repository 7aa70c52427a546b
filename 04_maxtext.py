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
# parameters in the manner of MaxText, Gemma and Llama. Loader, loss, optimizer, loop, checkpoints, sampling and profile
# are 02's, imported. What comes out is, number for number, a Qwen3 that other libraries load.
#
# | where | model | time | memory | cost |
# |---|---|---|---|---|
# | laptop, two cores, no network | 8M parameters, Python's own sources | 3 minutes | under 2 GB | nothing |
# | Colab, TPU v6e | 369M parameters, FineWeb-Edu | hours; goes on where it stopped | under 31.25 GiB | compute units |

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
# Letters are those of 02: B batch, T sequence, D model, N query heads, K key/value heads, H head dimension, F MLP
# hidden, L layers, V vocabulary. Whatever is spelled `train.something` is explained there.

# %%
import dataclasses
import functools
import importlib
import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import common
from common import require, say, setting

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

# %% [markdown]
# ## Config
#
# 02 has one knob and derives the rest; here every size is written down, because each was chosen for the chip. A v6e
# multiplies tiles of 256 x 256: a side of 1,100 takes as long as one of 1,280. So every side of every matrix is a
# multiple of `tile`, and a head has 256 channels, where 02's 128 fill half of the unit in q k and in weights v. What
# else training needs is inherited, with a few defaults of its own.


# %%
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train.TrainConfig):
    """Sizes of the model, each of them explicit, and what training needs of any model."""

    n_embd: int = setting(1024, "channels of the residual stream", fixed=True)
    n_layer: int = setting(24, "layers", fixed=True)
    n_head: int = setting(4, "query heads", fixed=True)
    n_kv_head: int = setting(2, "key/value heads, a divisor of n_head", fixed=True)
    head_dim: int = setting(256, "channels per head", fixed=True)
    mlp_dim: int = setting(3072, "hidden channels of the MLP", fixed=True)
    tile: int = setting(256, "every side of a matrix is a multiple of it: 256 on a v6e, 128 on older TPUs, 1 for any")
    window_pattern: str = setting("L", "attention per layer, tiled: L all, S half the context; last: L", fixed=True)
    softcap: float = setting(0.0, "logits are bounded to +-softcap by tanh; 0 for no bound, as Qwen3", fixed=True)
    device_batch_size: int = setting(2, "sequences per microbatch and device: fastest of 1 to 16 by estimate")
    loss_slice: int = setting(1024, "tokens whose logits exist at one time, an eighth of a microbatch")

    def check_sizes(self):
        """Raises UserError unless every side of every matrix is a multiple of tile."""
        for name in ("n_embd", "n_layer", "mlp_dim", "tile"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be a positive integer")
        for name in ("n_embd", "head_dim", "mlp_dim", "vocab_size"):
            remedy = f"must be a multiple of tile={self.tile}, which the matrix unit works on"
            require(getattr(self, name) % self.tile == 0, name, getattr(self, name), remedy)


# %% [markdown]
# ## Model
#
# Weights start as 02's, and the gate like the matrix beside it: embeddings N(0, 1), matrices into a block with variance
# 1 / fan-in as in MaxText, projections out of it zero, so that the first loss is exactly log(V). GPT-2's scheme, normal
# with 0.02 everywhere, was behind after 300 laptop steps (LOG.md). There are no biases, and norms have no parameters.


# %%
def init_layer(config, key):
    """One layer's weights, float32: 02's, and c_gate (D, F) drawn as c_fc is."""
    rest, gate = jax.random.split(key)
    bound, shape = math.sqrt(3 / config.n_embd), (config.n_embd, config.mlp_dim)
    return {**train.init_layer(config, rest), "c_gate": jax.random.uniform(gate, shape, jnp.float32, -bound, bound)}


def init_params(config, key):
    """All parameters, float32: wte (V, D), lm_head (D, V) and layers[i]; and the RoPE tables."""
    embed, head, *layers = jax.random.split(key, config.n_layer + 2)
    return {
        "wte": jax.random.normal(embed, (config.vocab_size, config.n_embd)),
        "lm_head": 0.001 * jax.random.normal(head, (config.n_embd, config.vocab_size)),
        "layers": [init_layer(config, key) for key in layers],
        "rope": train.rope_tables(config),
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


def backbone(config, params, tokens, attend=None, start=0):
    """Final hidden states (B, T, D), normed, for tokens (B, T) at positions start, ...; the arguments are 02's."""
    attend = attend or train.choose_attention(config)
    rope = train.rope_at(params, start, tokens.shape[1])
    with jax.named_scope("embedding"):
        x = params["wte"][tokens]
    for i, layer in enumerate(params["layers"]):
        with jax.named_scope(f"layer_{i}/attention"):
            x = x + train.attention_block(layer, x, functools.partial(attend, i, rope))
        with jax.named_scope(f"layer_{i}/mlp"):
            x = x + gated_mlp(layer, x)
    return train.rms_norm(x)


SWIGLU = train.Model(init_params, backbone)

# %% [markdown]
# ## Side by side
#
# What does it buy? The table under Run compares both models as designed, on the attached TPU or by the compiler's
# estimate for one that is not here (`--compare v6e:1x1`, which takes minutes). At two sequences a microbatch the
# estimated MFU is 53.6 % here and 47.8 % for 02. A token costs this model more FLOPs, yet they are of a better kind:
# heads of 256 channels fill the matrix unit, which heads of 128 half fill; a layer has four heads to softmax instead of
# eight; two K/V heads of 256 are half the keys and values to write and read; and the residual stream is read and
# written twice a layer, with no third pass that mixes the embedding in.


# %%
def side_by_side(fits):
    """A table as text of {name: (config, model, chip.Fit, tokens per second at the device's peak or None)}."""
    rows = {name: [] for name in ("parameters", "FLOPs per token", "peak HBM, GiB", "ns per token", "MFU")}
    for config, model, fit, peak in fits.values():
        rate = fit.step_seconds and config.total_batch_size * config.seq_len / fit.step_seconds
        cells = (
            f"{train.count_params(config, model)['total'] / 1e6:.1f}M",
            f"{train.flops_per_token(config, model):.3g}",
            f"{fit.peak_bytes / 2**30:.2f}",
            f"{1e9 / rate:,.0f}" if rate else "unknown",
            f"{rate / peak:.1%}" if rate and peak else "unknown",
        )
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    where = next(iter(fits.values()))[2].where
    lines = [f"{where + ', estimated':<28}" + "".join(f"{name:>14}" for name in fits)]
    return "\n".join(lines + [f"{name:<28}" + "".join(f"{cell:>14}" for cell in row) for name, row in rows.items()])


def compare_models(topology=""):
    """Both models as designed, compiled for a TPU topology or, where that is empty, for the attached device: text."""
    mesh = train.chip_mesh(topology)
    models = {"02_train": (train.Config(), train.GPT), "04_maxtext": (Config(), SWIGLU)}
    fits = {
        name: (config, model, train.measure_fit(config, mesh, model), train.peak_rate(config, mesh, model))
        for name, (config, model) in models.items()
    }
    return side_by_side(fits)


# %% [markdown]
# ## Run
#
# As in 02: `OVERRIDES` or the command line, one run per set of settings, resumed when it is started again. The laptop
# preset keeps the rule of tiles of 256, with one query head beside another on a single key/value head.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareRun(common.Run):
    """What to run, on which data, where to leave it, and what to compare it with."""

    compare: str = setting("", "TPU topology to estimate both models for, v6e:1x1 say; empty: an attached TPU; or no")

    def wants_table(self):
        """Whether to compile both models first: for a topology, or for the TPU that is here."""
        return self.compare != "no" and bool(self.compare or jax.default_backend() == "tpu")


PRESETS = {
    "chip": {},
    "gpu": train.PRESETS["gpu"],
    "laptop": train.PRESETS["laptop"]
    | {"n_embd": 256, "n_layer": 4, "n_head": 2, "n_kv_head": 1, "head_dim": 256, "mlp_dim": 768},
}


# %%
OVERRIDES = ""  # @param ["", "--preset laptop", "--compare v6e:1x1"] {allow-input: true}

if __name__ == "__main__":
    common.keep_freed_memory()
    common.keep_compiled()
    run, config = common.choose(Config, PRESETS, OVERRIDES, CompareRun)
    print(train.describe_model(config, SWIGLU))
    if run.wants_table():
        print(compare_models(run.compare))
    train.look_before(config, run.preflight, SWIGLU)

# %%
if __name__ == "__main__":
    hub_token = common.read_secret("HF_TOKEN")
    result, tokenizer, mirror = train.train_run(run, config, hub_token, SWIGLU)

# %% [markdown]
# ## Look
#
# The same text is held out as in 02 and scored in bits per byte, so the two models can be compared by their last lines.

# %%
if __name__ == "__main__":
    print(common.describe_result(result, config))
    common.open_tensorboard(result.run_dir)

# %% [markdown]
# ## Save
#
# Weights travel as an architecture that is known elsewhere, where that computes the same numbers. Three things decide.
# QK-norm rules out Llama and Mistral; a norm before each block and none behind it rules out Gemma 3 and OLMo 2;
# Qwen3 has both, and no softcap, hence 0 above. It norms before it rotates and 02 after: a rotation changes no length,
# so with weights of one in the norm that is the same. All its norms get weights of one and our epsilon, and the halves
# of each query and key head change places, because nanochat turns a pair of channels the other way round. Logits then
# agree to float32's rounding, in mlx-lm by the tests and in transformers as LOG.md has it.


# %%
def why_not_qwen3(config):
    """What of a Config Qwen3 does not compute, in words, or None."""
    if config.softcap:
        return f"softcap={config.softcap}: Qwen3 does not bound its logits"
    if set(config.windows) != {config.seq_len}:
        return f"window_pattern={config.window_pattern!r}: mlx-lm, for one, knows no windows in a Qwen3"
    return None


def qwen3_weights(config, params):
    """{Hugging Face's name: array (out, in) of the compute type} of our parameters."""
    D, ones = config.n_embd, lambda n: np.ones(n, np.float32)
    turned = lambda w: np.roll(w, config.head_dim // 2, axis=-1)
    weights = {"model.embed_tokens": params["wte"], "lm_head": params["lm_head"].T, "model.norm": ones(D)}
    for i, layer in enumerate(params["layers"]):
        layer = {name: np.asarray(w) for name, w in layer.items()}
        attention = {
            "q_proj": turned(layer["c_q"]).reshape(D, -1).T,
            "k_proj": turned(layer["c_k"]).reshape(D, -1).T,
            "v_proj": layer["c_v"].reshape(D, -1).T,
            "o_proj": layer["c_proj"].reshape(-1, D).T,
            "q_norm": ones(config.head_dim),
            "k_norm": ones(config.head_dim),
        }
        mlp = {"gate_proj": layer["c_gate"].T, "up_proj": layer["c_fc"].T, "down_proj": layer["mlp_proj"].T}
        norms = {"input_layernorm": ones(D), "post_attention_layernorm": ones(D)}
        for part, group in (("self_attn.", attention), ("mlp.", mlp), ("", norms)):
            weights |= {f"model.layers.{i}.{part}{name}": w for name, w in group.items()}
    dtype = jnp.dtype(config.dtype)
    return {f"{name}.weight": np.ascontiguousarray(np.asarray(w).astype(dtype)) for name, w in weights.items()}


def qwen3_config(config, bos):
    """config.json of a Qwen3ForCausalLM that computes what this Config's model does; bos ends a text as well."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "rms_norm_eps": float(jnp.finfo(jnp.float32).eps),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "torch_dtype": config.dtype,
    }


# %% [markdown]
# A tokenizer travels too: it opens every text with `<|bos|>`, as training did, and since the next document begins where
# one ends, `<|bos|>` is also what generation stops at. The model card says what was done to the weights and what the
# model is not. A config that Qwen3 does not compute is not bent to fit: it is saved as 02 saves, and its card says why.

# %%
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
PLAIN_LOADING = """
import importlib
train, maxtext = map(importlib.import_module, ("02_train", "04_maxtext"))  # in a clone of {repository}
config, params, tokenizer = train.load_model({source!r}, maxtext.SWIGLU, maxtext.Config)
[(prompt, text)] = train.make_sample_writer(config, tokenizer, [{prompt!r}], maxtext.SWIGLU)(params)
print(prompt + text)
"""
PLAIN = """\
`params.safetensors` holds the arrays under onechip's own names, in float32. It is not in the format of another library,
because none that is known computes the same: {reason}."""


def write_qwen3_card(folder, config, result, source):
    """README.md of a Qwen3's folder: what it is, what it was trained on and how to load it."""
    about = json.loads((result.run_dir / "config.json").read_text())
    prompt = result.samples[0][0] if result.samples else "The "
    lines, notes = QWEN3_LOADING.format(source=source or str(folder), prompt=prompt), QWEN3.format(dtype=config.dtype)
    size, dataset = train.count_params(config, SWIGLU)["total"], train.name_dataset(about)
    card = common.model_card(result, about, size, lines, dataset, notes, "transformers")
    with common.atomic_write(folder / "README.md") as part:
        part.write_text(card, encoding="utf-8")


# %%
def write_tokenizer(folder, config, tokenizer):
    """tokenizer.json and what AutoTokenizer reads beside it: it opens a text with <|bos|>, as training did."""
    bos = tok.SPECIAL_TOKENS[0]
    opening = Tokenizer.from_str(tokenizer.to_str())
    ids = [(bos, tokenizer.token_to_id(bos))]
    opening.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=ids)
    tok.save_tokenizer(opening, folder / "tokenizer.json")
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", description)


def write_json(path, value):
    with common.atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def export_qwen3(config, result, tokenizer, source=""):
    """Writes run_dir/model in Hugging Face's format, as a Qwen3 where the numbers agree; returns the folder.

    source: the Hub repository that it will be uploaded to, for the card.
    """
    if reason := why_not_qwen3(config):
        say(f"export: plain safetensors, as {reason}")
        return train.export_model(result, tokenizer, source, PLAIN_LOADING, PLAIN.format(reason=reason))
    folder, bos = result.run_dir / "model", tokenizer.token_to_id(tok.SPECIAL_TOKENS[0])
    folder.mkdir(exist_ok=True)
    with common.atomic_write(folder / "loss.png") as part:
        shutil.copyfile(result.run_dir / "loss.png", part)
    with common.atomic_write(folder / "model.safetensors") as part:
        save_file(qwen3_weights(config, jax.device_get(result.params)), part, metadata={"format": "pt"})
    write_json(folder / "config.json", qwen3_config(config, bos))
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": bos})
    write_tokenizer(folder, config, tokenizer)
    write_qwen3_card(folder, config, result, source)
    say(f"export: {folder} is a Qwen3ForCausalLM in {config.dtype}")
    return folder


# %%
if __name__ == "__main__":
    folder = export_qwen3(config, result, tokenizer, f"{mirror.repo}-hf" if mirror else "")
    hf_repo = run.hub_repo and f"{run.hub_repo}-hf"  # apart from the checkpoints, whose config.json is another
    common.upload_folder(folder, sorted(os.listdir(folder)), hub_token, hf_repo, f"onechip-{run.name}-hf")
