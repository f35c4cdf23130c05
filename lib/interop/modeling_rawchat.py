"""rawchat's whole model for transformers: what an export copies beside its weights.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` runs this file. It needs
torch and transformers alone, and reads every size from config.json. Weights lie as (outputs,
inputs).

What departs from a Llama: norms have no weights; rotations turn by minus the angle, and queries and
keys are normed after them; layers scale the stream and mix the embedding back in; values of some
layers get an embedding of the token; each embedding is mixed with the one before it; a share of the
middle layer's output is subtracted before the head.
"""

# pyright: reportMissingImports=false
import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# transformers renames past_key_values to cache
CACHE = "cache"
if CACHE not in inspect.signature(create_causal_mask).parameters:
    CACHE = "past_key_values"

# leading channels of the stream that feed these gates
SMEAR_CHANNELS, VALUE_GATE_CHANNELS = 24, 12


class RawchatConfig(PretrainedConfig):
    """Whatever config.json says, as attributes."""

    model_type = "rawchat"


def rms_norm(x, eps):
    """x / rms(x) over the last axis, computed in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotate(x_BNTH, cos_BTH, sin_BTH):
    """Rotary embedding over split halves, by minus the angle."""
    first, second = x_BNTH.chunk(2, dim=-1)
    cos, sin = cos_BTH[:, None], sin_BTH[:, None]
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention in plain products: (output (B, T, N, H), weights)."""
    # each head of keys and values serves a group of queries
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # softmax in float32, whatever the model is in
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer_idx = layer
        # these names are what transformers' attention functions look for
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        sliding = config.layer_types[layer] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.wq = nn.Linear(D, N * H, bias=False)
        self.wk = nn.Linear(D, K * H, bias=False)
        self.wv = nn.Linear(D, K * H, bias=False)
        self.wo = nn.Linear(N * H, D, bias=False)
        if layer in config.value_layers:
            self.value_gate = nn.Linear(VALUE_GATE_CHANNELS, K, bias=False)

    def forward(self, h_BTD, value_embed_BTX, rope, mask, cache):
        config = self.config
        B, T, _ = h_BTD.shape

        def heads(x_BTX):
            return x_BTX.view(B, T, -1, config.head_dim).transpose(1, 2)

        q_BNTH, k_BKTH, v_BKTH = heads(self.wq(h_BTD)), heads(self.wk(h_BTD)), heads(self.wv(h_BTD))
        # the token's own embedding, let in by a gate per head between 0 and 3
        if value_embed_BTX is not None:
            gate_BTK = 3 * torch.sigmoid(self.value_gate(h_BTD[..., :VALUE_GATE_CHANNELS]))
            v_BKTH = v_BKTH + gate_BTK.transpose(1, 2)[..., None] * heads(value_embed_BTX)

        # rotated first, then normed and sharpened
        q_BNTH, k_BKTH = rotate(q_BNTH, *rope), rotate(k_BKTH, *rope)
        if config.qk_norm:
            q_BNTH = rms_norm(q_BNTH, config.rms_norm_eps)
            k_BKTH = rms_norm(k_BKTH, config.rms_norm_eps)
        q_BNTH, k_BKTH = q_BNTH * config.qk_scale, k_BKTH * config.qk_scale

        # with those of all tokens before
        if cache is not None:
            k_BKTH, v_BKTH = cache.update(k_BKTH, v_BKTH, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager_attention)
        o_BTNH, _ = attend(
            self,
            q_BNTH,
            k_BKTH,
            v_BKTH,
            mask,
            dropout=0.0,
            scaling=config.head_dim**-0.5,
            sliding_window=self.sliding_window,
        )
        return self.wo(o_BTNH.reshape(B, T, -1))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.w_in = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w_out = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        if self.kind == "swiglu":
            self.w_gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, h_BTD):
        a_BTF = self.w_in(h_BTD)
        if self.kind == "relu2":
            a_BTF = F.relu(a_BTF).square()
        elif self.kind == "gelu":
            a_BTF = F.gelu(a_BTF, approximate="tanh")
        else:
            a_BTF = F.silu(self.w_gate(h_BTD)) * a_BTF
        return self.w_out(a_BTF)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer)
        self.mlp = Mlp(config)
        # 1 and 0 where the model was trained without them
        self.resid_scale = nn.Parameter(torch.ones(()))
        self.x0_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD, x0_BTD, value_embed_BTX, rope, mask, cache):
        x_BTD = self.resid_scale * x_BTD + self.x0_scale * x0_BTD
        h_BTD = rms_norm(x_BTD, self.eps)
        x_BTD = x_BTD + self.attn(h_BTD, value_embed_BTX, rope, mask, cache)
        return x_BTD + self.mlp(rms_norm(x_BTD, self.eps))


class RawchatForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RawchatConfig
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        V, D = config.vocab_size, config.hidden_size

        # what every model has
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(D, V, bias=False)

        # what a config may switch off
        width = config.num_key_value_heads * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(V, width) for i in config.value_layers}
        )
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_scale = nn.Parameter(torch.zeros(()))
        if config.backout:
            self.backout = nn.Parameter(torch.zeros(()))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def embedded(self, ids_BT, before_BT):
        """Normed embeddings, each with a gated share of the one before it (-1: there is none)."""

        def look_up(ids):
            rows = self.embed(ids)
            return rms_norm(rows, self.config.rms_norm_eps) if self.config.embed_norm else rows

        x_BTD = look_up(ids_BT)

        # a share of the embedding before, as much as a gate on this one lets in
        if not self.config.smear:
            return x_BTD
        before_BTD = look_up(before_BT.clamp(min=0)) * (before_BT >= 0)[..., None]
        gate_BT1 = torch.sigmoid(self.smear_gate(x_BTD[..., :SMEAR_CHANNELS]))
        return x_BTD + self.smear_scale * gate_BT1 * before_BTD

    def rope(self, position_ids, dtype):
        half = self.config.head_dim // 2
        steps = torch.arange(half, device=position_ids.device, dtype=torch.float32) / half
        angle = position_ids[..., None].float() * self.config.rope_base**-steps
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def masks(self, attention_mask, x_BTD, position_ids, cache):
        """The mask of each type of layer; `generate` brings them along for a static cache."""
        if isinstance(attention_mask, dict):
            return attention_mask
        makers = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        inputs = dict(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        inputs[CACHE] = cache
        return {kind: makers[kind](**inputs) for kind in set(self.config.layer_types)}

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        cache=None,
        previous_ids=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        # what transformers called it before
        cache = kwargs.get("past_key_values", cache)
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0

        # the token before each: known from the inputs, but not where a cache goes on
        if previous_ids is None:
            if self.config.smear and past:
                raise ValueError(
                    "a cache goes on only with previous_ids, as generate hands them on"
                )
            previous_ids = previous_tokens(input_ids, attention_mask)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + past

        # the layers, of which the middle one is kept for later
        x_BTD = x0_BTD = self.embedded(input_ids, previous_ids)
        rope = self.rope(position_ids, x_BTD.dtype)
        masks = self.masks(attention_mask, x_BTD, position_ids, cache)
        middle_BTD = None
        for i, block in enumerate(self.blocks):
            value_embed = None
            if i in self.config.value_layers:
                value_embed = self.value_embeds[str(i)](input_ids)
            x_BTD = block(
                x_BTD, x0_BTD, value_embed, rope, masks[self.config.layer_types[i]], cache
            )
            if i == len(self.blocks) // 2:
                middle_BTD = x_BTD

        # without its share of the middle layer, normed, and on to logits
        if self.config.backout:
            x_BTD = x_BTD - self.backout * middle_BTD
        x_BTD = rms_norm(x_BTD, self.config.rms_norm_eps)

        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(x_BTD[:, keep]).float()
        # large logits are held back smoothly
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """What `generate` feeds, with the token before each, which a cache may hold already."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )
        before_BT = previous_tokens(input_ids, attention_mask)
        inputs["previous_ids"] = before_BT[:, -inputs["input_ids"].shape[1] :]
        return inputs


def previous_tokens(ids_BT, mask_BT):
    """The token before each, -1 where there is none or where it is padding."""
    before_BT = F.pad(ids_BT[:, :-1], (1, 0), value=-1)
    # padding stands on the left and is nobody's predecessor
    if isinstance(mask_BT, torch.Tensor) and mask_BT.ndim == 2:
        real_BT = F.pad(mask_BT[:, : ids_BT.shape[1] - 1], (1, 0), value=0)
        before_BT = before_BT.masked_fill(real_BT == 0, -1)
    return before_BT
