"""A trained model as PyTorch knows it: for transformers' NanoChat class, or for our own modeling_onechip.py.

Which parts a model has is read from the names of its parameters, so that this serves any notebook's. Matrices are
written (out, in), as PyTorch's Linear has them, all weights in float32.
"""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from onechip.errors import require
from onechip.files import atomic_write, write_json

CODE = Path(__file__).parent / "readers" / "modeling_onechip.py"
NORM_EPS = float(np.finfo(np.float32).eps)  # of every norm
IN_LAYERS = {"c_q", "c_k", "c_v", "c_proj", "c_fc", "mlp_proj"}
AROUND = {"wte", "lm_head", "layers", "resid_lambdas", "x0_lambdas"}
EXTRA = {"value_embeds", "value_gate"}, {"smear_gate", "smear_lambda", "backout_lambda"}


def part_names(params):
    """(names in any layer, names around them) of a model's parameters."""
    return {name for layer in params["layers"] for name in layer}, set(params)


def unknown_parts(params, in_layers, around):
    """Names of the parameters that a reader does not know, sorted."""
    inside, outside = part_names(params)
    return sorted((inside - in_layers) | (outside - around))


def write_safetensors(folder, arrays):
    """model.safetensors with arrays, as PyTorch reads it."""
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    with atomic_write(folder / "model.safetensors") as part:
        save_file(arrays, part, metadata={"format": "pt"})


def as_linear(matrix, inputs=1):
    """A matrix whose first `inputs` axes a product sums over, as (out, in) float32."""
    matrix = np.asarray(matrix, np.float32)
    return matrix.reshape(int(np.prod(matrix.shape[:inputs])), -1).T


def common_fields(config, bos):
    """What each class of transformers has in its config.json; bos ends a text as well."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.seq_len,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": bos,
    }


AS_WRITTEN = {"pad_token_id": None, "dtype": "float32"}


# ----------------------------------------------------------------------------------------------------------------------
# Our own file


def own_config(config, params, bos):
    """config.json for modeling_onechip.py."""
    _, around = part_names(params)
    valued = [i for i, layer in enumerate(params["layers"]) if "value_embeds" in layer]
    gates = {params["layers"][i]["value_gate"].shape[0] for i in valued}
    return {
        **common_fields(config, bos),
        **AS_WRITTEN,
        "architectures": ["OneChipForCausalLM"],
        "model_type": "onechip",
        "auto_map": {
            "AutoConfig": "modeling_onechip.OneChipConfig",
            "AutoModelForCausalLM": "modeling_onechip.OneChipForCausalLM",
        },
        "windows": list(config.long_windows),
        "rope_theta": config.rope_base,
        "score_scale": config.score_scale,
        "softcap": config.softcap,
        "lambdas": "resid_lambdas" in around,
        "value_layers": valued,
        "value_gate_inputs": gates.pop() if gates else 0,
        "smear_inputs": params["smear_gate"].shape[0] if "smear_gate" in around else 0,
        "backout_layer": config.n_layer // 2 if "backout_lambda" in around else -1,
    }


OWN_NAMES = {  # ours: (theirs, axes that the product sums over)
    "c_q": ("q_proj", 1), "c_k": ("k_proj", 1), "c_v": ("v_proj", 1), "c_proj": ("o_proj", 2), "c_fc": ("fc", 1),
    "mlp_proj": ("proj", 1), "value_gate": ("value_gate", 1),
}  # fmt: skip


def own_arrays(params):
    """{name in modeling_onechip.py: array} of our parameters."""
    arrays = {"embed_tokens.weight": np.asarray(params["wte"], np.float32)}
    arrays["lm_head.weight"] = as_linear(params["lm_head"])
    for i, layer in enumerate(params["layers"]):
        for ours, w in layer.items():
            if ours == "value_embeds":
                arrays[f"layers.{i}.value_embeds.weight"] = np.asarray(w, np.float32)
            else:
                theirs, inputs = OWN_NAMES[ours]
                arrays[f"layers.{i}.{theirs}.weight"] = as_linear(w, inputs)
    for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
        if name in params:
            arrays[name] = np.asarray(params[name], np.float32)
    if "smear_gate" in params:
        arrays["smear_gate.weight"] = np.asarray(params["smear_gate"], np.float32)[None]
    return arrays


def write_own(opened, folder, bos):
    """Writes config.json, model.safetensors and modeling_onechip.py; UserError for parts that this does not know."""
    inside, around = EXTRA
    unknown = unknown_parts(opened.params, IN_LAYERS | inside, AROUND | around)
    require(not unknown, "export", "torch", f"modeling_onechip.py has no {', '.join(unknown)}: use --export qwen3")
    write_json(folder / "config.json", own_config(opened.config, opened.params, bos))
    write_safetensors(folder, own_arrays(opened.params))
    with atomic_write(folder / CODE.name) as part:
        shutil.copyfile(CODE, part)


# ----------------------------------------------------------------------------------------------------------------------
# transformers' NanoChat


def stream_scales(config, params):
    """What the residual stream is larger by in each layer than NanoChat's, (L,); None if no scale says it.

    Blocks read the stream normed, so a scale changes nothing that they see. A weight of the embedding in any layer but
    the first is no scale.
    """
    if "resid_lambdas" not in params:
        return np.ones(config.n_layer)
    resid, x0 = (np.asarray(params[name], np.float64) for name in ("resid_lambdas", "x0_lambdas"))
    scales = np.cumprod(resid + np.where(np.arange(config.n_layer) == 0, x0, 0))
    return scales if np.all(scales > 0) and not np.any(x0[1:]) else None


def beyond_nanochat(config, params):
    """The parts of a trained model that transformers' NanoChat class lacks, in words."""
    inside, around = part_names(params)
    lacks = {
        "value embeddings": "value_embeds" in inside,
        "the smear": "smear_gate" in around,
        "backout": "backout_lambda" in around,
        "weights of the embedding in later layers (x0_lambdas)": stream_scales(config, params) is None,
        f"windows ({config.window_pattern})": set(config.windows) != {config.seq_len},
        "another scale of attention's scores (qk_scale)": not np.isclose(config.score_scale, config.head_dim**-0.5),
    }
    known = IN_LAYERS | EXTRA[0], AROUND | EXTRA[1]
    return [words for words, has in lacks.items() if has] + unknown_parts(params, *known)


NANOCHAT_NAMES = {
    "c_q": ("self_attn.q_proj", 1), "c_k": ("self_attn.k_proj", 1), "c_v": ("self_attn.v_proj", 1),
    "c_proj": ("self_attn.o_proj", 2), "c_fc": ("mlp.fc1", 1), "mlp_proj": ("mlp.fc2", 1),
}  # fmt: skip


def nanochat_arrays(config, params):
    """{transformers' name: array} of our parameters; the stream's scales go into what is added to it."""
    arrays = {"model.embed_tokens.weight": np.asarray(params["wte"], np.float32)}
    arrays["lm_head.weight"] = as_linear(params["lm_head"])
    for i, (layer, scale) in enumerate(zip(params["layers"], stream_scales(config, params), strict=True)):
        for ours, (theirs, inputs) in NANOCHAT_NAMES.items():
            divisor = scale if ours in ("c_proj", "mlp_proj") else 1.0
            arrays[f"model.layers.{i}.{theirs}.weight"] = as_linear(np.asarray(layer[ours]) / divisor, inputs)
    return arrays


def read_nanochat(config, arrays):
    """The inverse: our parameters by their flat names, float32, from transformers' names, without lambdas."""
    H, shapes = config.head_dim, {"c_q": (-1, config.n_head), "c_k": (-1, config.n_kv_head)}
    shapes |= {"c_v": shapes["c_k"]}
    flat = {"wte": arrays["model.embed_tokens.weight"], "lm_head": arrays["lm_head.weight"].T}
    for i in range(config.n_layer):
        for ours, (theirs, _) in NANOCHAT_NAMES.items():
            w = arrays[f"model.layers.{i}.{theirs}.weight"].T
            w = w.reshape(*shapes[ours], H) if ours in shapes else w
            flat[f"layers.{i}.{ours}"] = w.reshape(config.n_head, H, -1) if ours == "c_proj" else w
    return {name: np.asarray(w, np.float32) for name, w in flat.items()}


def nanochat_config(config, bos):
    """config.json of a NanoChatForCausalLM."""
    return {
        **common_fields(config, bos),
        **AS_WRITTEN,
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "hidden_act": "relu2",
        "attention_bias": False,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.softcap or None,
    }


def write_nanochat(opened, folder, bos):
    """Writes config.json and model.safetensors for transformers' NanoChat; UserError names what it lacks."""
    lacks = beyond_nanochat(opened.config, opened.params)
    remedy = f"transformers' NanoChat lacks {'; '.join(lacks)}: use --export torch, or train with --compatible true"
    require(not lacks, "export", "nanochat", remedy)
    write_json(folder / "config.json", nanochat_config(opened.config, bos))
    write_safetensors(folder, nanochat_arrays(opened.config, opened.params))
