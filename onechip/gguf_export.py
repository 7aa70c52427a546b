"""GGUF, llama.cpp's format, from a model's Qwen3 form: the weights, the tokenizer and the chat template in one file.

Written by the `gguf` package, which is no dependency: `uv run --with gguf ...`.
"""

import json

import numpy as np

from onechip.errors import UserError, require

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def gguf_name(name):
    """llama.cpp's name of a tensor of Hugging Face's Qwen3."""
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def load_gguf():
    """The gguf package; UserError says how to have it."""
    try:
        import gguf
    except ImportError:
        raise UserError("export gguf: needs the package gguf: uv run --with gguf NN_name.py ...") from None
    return gguf


def add_sizes(writer, about):
    """The model's sizes, from a Qwen3's config.json."""
    writer.add_context_length(about["max_position_embeddings"])
    writer.add_embedding_length(about["hidden_size"])
    writer.add_block_count(about["num_hidden_layers"])
    writer.add_feed_forward_length(about["intermediate_size"])
    writer.add_head_count(about["num_attention_heads"])
    writer.add_head_count_kv(about["num_key_value_heads"])
    writer.add_key_length(about["head_dim"])
    writer.add_value_length(about["head_dim"])
    writer.add_rope_freq_base(about["rope_theta"])
    writer.add_layer_norm_rms_eps(about["rms_norm_eps"])


def add_tokenizer(gguf, writer, tokenizer, bos, template):
    """Vocabulary, merges and special tokens of a `tokenizers.Tokenizer`.

    "llama-bpe" is the cut of llama.cpp's that is nearest to ours: letters, punctuation and white space alike, but
    digits in threes where ours has them in twos.
    """
    parsed = json.loads(tokenizer.to_str())
    special = {token["content"] for token in parsed["added_tokens"] if token["special"]}
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parsed["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(bos)
    writer.add_add_bos_token(True)
    if template:
        writer.add_chat_template(template)


def write_gguf(path, kind, about, arrays, tokenizer, template=""):
    """Writes a Qwen3 as GGUF. kind: "BF16" or "Q8_0"; about: its config.json; arrays: its weights by their names.

    Norms are float32. In Q8_0 a matrix whose rows are no multiple of 32 stays BF16.
    """
    gguf = load_gguf()
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "qwen3")
    add_sizes(writer, about)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_vocab_size(about["vocab_size"])
    require(tokenizer.get_vocab_size() == about["vocab_size"], "vocab_size", about["vocab_size"],
            f"GGUF wants as many as the tokenizer has, {tokenizer.get_vocab_size()}")  # fmt: skip
    add_tokenizer(gguf, writer, tokenizer, about["bos_token_id"], template)
    for name, array in arrays.items():
        array = np.asarray(array, np.float32)
        wanted = kinds.F32 if array.ndim == 1 else kinds[kind]
        wanted = kinds.BF16 if wanted == kinds.Q8_0 and array.shape[-1] % 32 else wanted
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
