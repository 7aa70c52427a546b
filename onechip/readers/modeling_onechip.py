"""A onechip GPT in plain PyTorch: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

One file, copied next to the weights. It computes what onechip's JAX code computes: windows, grouped-query attention,
lambdas of the residual stream, soft-capped logits, RoPE by minus theta, and, where the model has them, value
embeddings, the smear and backout. It has a cache, and padding on the left is left out.
B batch, T new tokens, S tokens in the cache and new ones, D model, N query heads, K key/value heads, H head dimension.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

EPS = torch.finfo(torch.float32).eps
# transformers 5.24 renamed the cache, in calls and in what they return.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class OneChipConfig(PreTrainedConfig):
    """The sizes of a model, and which parts it has. windows: keys that a query sees in each layer, its own included."""

    model_type = "onechip"

    def __init__(
        self, vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, intermediate_size=32, max_position_embeddings=16, windows=(16,), rope_theta=10000.0,
        score_scale=1.0, softcap=0.0, lambdas=True, value_layers=(), value_gate_inputs=12, smear_inputs=0,
        backout_layer=-1, use_cache=True, **more,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.intermediate_size = head_dim, intermediate_size
        self.max_position_embeddings, self.windows, self.rope_theta = max_position_embeddings, list(windows), rope_theta
        self.score_scale, self.softcap, self.lambdas = score_scale, softcap, lambdas
        self.value_layers, self.value_gate_inputs = list(value_layers), value_gate_inputs
        self.smear_inputs, self.backout_layer, self.use_cache = smear_inputs, backout_layer, use_cache
        more.setdefault("tie_word_embeddings", False)
        super().__init__(**more)


def norm(x):
    """x / rms(x) over the last axis, in float32, no parameters."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def mix(a, x, b, other):
    """a * x + b * other, in float32."""
    return (a * x.float() + b * other.float()).to(x.dtype)


def rope_and_norm(x, cos, sin):
    """x (B, heads, T, H), each channel turned against that half a head away, by minus the angle, and normed."""
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
    return norm(turned).to(x.dtype)


class OneChipLayer(nn.Module):
    """Attention and MLP, each added to the stream."""

    def __init__(self, config, i):
        super().__init__()
        D, H, F_ = config.hidden_size, config.head_dim, config.intermediate_size
        N, K = config.num_attention_heads, config.num_key_value_heads
        line = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.q_proj, self.k_proj, self.v_proj = line(D, N * H), line(D, K * H), line(D, K * H)
        self.o_proj, self.fc, self.proj = line(N * H, D), line(D, F_), line(F_, D)
        if i in config.value_layers:
            self.value_embeds = nn.Embedding(config.vocab_size, K * H)
            self.value_gate = line(config.value_gate_inputs, K)
        self.i, self.shape, self.scale = i, (N, K, H), config.score_scale

    def attention(self, x, tokens, rope, mask, cache):
        B, T, _ = x.shape
        N, K, H = self.shape
        heads = lambda array, n: array.view(B, T, n, H).transpose(1, 2)
        q, k, v = heads(self.q_proj(x), N), heads(self.k_proj(x), K), heads(self.v_proj(x), K)
        if hasattr(self, "value_embeds"):
            gate = 3 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]).float())
            v = v + gate.to(v.dtype).transpose(1, 2)[..., None] * heads(self.value_embeds(tokens), K)
        q, k = rope_and_norm(q, *rope), rope_and_norm(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, self.i)
        k, v = (array.repeat_interleave(N // K, dim=1) for array in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, N * H))

    def forward(self, x, tokens, rope, mask, cache):
        x = x + self.attention(norm(x), tokens, rope, mask, cache)
        return x + self.proj(F.relu(self.fc(norm(x))).square())


class OneChipForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits (B, T, V), float32, and a cache."""

    config_class = OneChipConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        D, L = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(OneChipLayer(config, i) for i in range(L))
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        if config.lambdas:
            self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(L)), nn.Parameter(torch.zeros(L))
        if config.smear_inputs:
            self.smear_gate = nn.Linear(config.smear_inputs, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(()))
        if config.backout_layer >= 0:
            self.backout_lambda = nn.Parameter(torch.zeros(()))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def smear(self, x, real, cache):
        """x (B, T, D), each with some of the one before it; the cache has the rows of before as one layer more."""
        T, before = x.shape[1], x
        if cache is not None:
            while len(cache.layers) <= self.config.num_hidden_layers:
                cache.layers.append(DynamicLayer())
            row = x[:, None]
            before = cache.update(row, row[..., :0], self.config.num_hidden_layers)[0][:, 0]
        before = F.pad(before, (0, 0, 1, 0))[:, -T - 1 : -1]
        there = F.pad(real, (1, 0))[:, -T - 1 : -1, None]  # no text begins with a token of padding
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_inputs]).float())
        return mix(1.0, x, self.smear_lambda.float() * gate, before * there)

    def rope(self, positions):
        """Cosines and sines (B, 1, T, H / 2) of positions (B, T), by float64 angles."""
        H = self.config.head_dim
        channels = torch.arange(0, H, 2, dtype=torch.float64, device=positions.device)
        angles = positions[:, None, :, None].double() * self.config.rope_theta ** (-channels / H)
        return angles.cos().float(), angles.sin().float()

    def masks(self, real, T):
        """{window: (B, 1, T, S) bool}, true where a query sees a key: among its last `window`, and no padding."""
        S = real.shape[1]
        at = torch.arange(S, device=real.device)
        distance = at[-T:, None] - at[None, :]
        seen = (distance >= 0) & real[:, None, None, :].bool() | (distance == 0)  # padding sees itself: no NaN
        return {window: seen & (distance < window) for window in set(self.config.windows)}

    def forward(
        self, input_ids, attention_mask=None, past_key_values=None, cache=None, use_cache=None, labels=None,
        logits_to_keep=0, **_,
    ):  # fmt: skip
        config, T = self.config, input_ids.shape[1]
        cache = past_key_values if cache is None else cache
        if cache is None and (config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        S = T + (cache.get_seq_length() if cache is not None else 0)
        real = attention_mask if attention_mask is not None else input_ids.new_ones(len(input_ids), S)
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        rope, masks = self.rope(positions), self.masks(real, T)
        x = norm(self.embed_tokens(input_ids))
        if config.smear_inputs:
            x = self.smear(x, real.to(x.dtype), cache)
        first = middle = x
        for i, layer in enumerate(self.layers):
            if config.lambdas:
                x = mix(self.resid_lambdas[i].float(), x, self.x0_lambdas[i].float(), first)
            x = layer(x, input_ids, rope, masks[config.windows[i]], cache)
            middle = x if i == config.backout_layer else middle
        if config.backout_layer >= 0:
            x = mix(1.0, x, -self.backout_lambda.float(), middle)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        z = self.lm_head(norm(x)[:, keep]).float()
        z = config.softcap * torch.tanh(z / config.softcap) if config.softcap else z
        loss = None
        if labels is not None:
            loss = F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=z, **{CACHE: cache})
