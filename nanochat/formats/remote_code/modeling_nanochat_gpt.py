"""A nanochat GPT for Hugging Face transformers: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

    tokens -> embedding (+ n-grams) -> norm -> smear -> layers (attention, MLP) -> backout -> norm -> head -> softcap

This file needs torch and transformers only. It comes from nanochat/formats/remote_code of the program that trained the
model, and computes what nanochat/gpt.py there does.

Shapes: B batch, T new tokens, S tokens seen, C channels (hidden_size), H query heads, G key/value heads, D head size.
"""

import inspect

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sliding_window_overlay
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_nanochat_gpt import NanochatGPTConfig

MASK_ARGUMENTS = set(inspect.signature(create_causal_mask).parameters)
HAS_INTERFACE = hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface")  # not in transformers 4
# transformers 5.24 renamed the cache's argument and output.
CACHE = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"
SCALARS = {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "smear_lambda": 0.0, "backout_lambda": 0.2}  # before training


def norm(x):
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary(position_ids, config, dtype):
    """cos and sin (B, 1, T, D/2) of rotary position embeddings."""
    channels = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[:, None, :, None].float() * config.rope_base ** (-channels / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def normed_rotary(x, cos, sin, scale):
    """scale * norm(rotate(x)): x (B, H, T, D), pairs of channels from the two halves of a head."""
    a, b = x.chunk(2, dim=-1)
    return scale * norm(torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1))


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention in matrix products, with its weights: query (B, H, T, D) -> (B, T, H, D), (B, H, T, S)."""
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.size(2)]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NanochatGPTAttention(nn.Module):
    """Grouped-query attention with rotary positions, normed q and k, and gated value embeddings."""

    is_causal = True

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer_idx = config, layer
        C, D, H, G = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.num_key_value_groups, self.scaling = D, H // G, D**-0.5
        is_sliding = config.layer_types[layer] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else config.max_position_embeddings + 1
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, G * D, bias=False)
        self.v_proj = nn.Linear(C, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        if layer in config.value_embeds:
            self.value_gate = nn.Linear(config.value_gate_channels, G, bias=False)

    def forward(self, x, value_embed, cos_sin, attention_mask, cache, cache_position, **kwargs):
        """x (B, T, C); value_embed (B, T, G*D) or None -> (B, T, C), attention weights or None."""
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if value_embed is not None:
            gate = torch.sigmoid(self.value_gate(x[..., : self.config.value_gate_channels]))  # (B, T, G)
            v = v + self.config.value_gate_scale * gate.unsqueeze(-1) * value_embed.view(B, T, -1, self.head_dim)
        q = normed_rotary(q.transpose(1, 2), *cos_sin, self.config.qk_scale)
        k = normed_rotary(k.transpose(1, 2), *cos_sin, self.config.qk_scale)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": cache_position})
        if HAS_INTERFACE:  # vLLM looks for a call of this form to put its own attention there
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention)
        settings = {"dropout": 0.0, "sliding_window": self.sliding_window}
        y, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **settings, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights


class NanochatGPTMLP(nn.Module):
    """Two matrices with ReLU squared between them."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())


class NanochatGPTLayer(GradientCheckpointingLayer):
    """Attention, then MLP, each on a normed copy and added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = NanochatGPTAttention(config, layer)
        self.mlp = NanochatGPTMLP(config)

    def forward(self, x, scalars, value_embed, cos_sin, attention_mask, cache, cache_position, **kwargs):
        """x (B, T, C) -> the same, attention weights. scalars: (resid_lambda, x0_lambda, x0) or None."""
        if scalars is not None:
            resid_lambda, x0_lambda, x0 = scalars
            x = resid_lambda * x + x0_lambda * x0
        y, weights = self.self_attn(norm(x), value_embed, cos_sin, attention_mask, cache, cache_position, **kwargs)
        x = x + y
        return x + self.mlp(norm(x)), weights


class NanochatGPTPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model."""

    config_class = NanochatGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("NanochatGPTLayer",)
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module):
        """For a model that is trained from nothing, and weights that a folder lacks."""
        super()._init_weights(module)
        for name, value in SCALARS.items():
            if name in dict(module.named_parameters(recurse=False)):
                nn.init.constant_(getattr(module, name), value)

    @staticmethod
    def create_masks_for_generate(config, **given):
        """Attention masks by layer type; also called by generate, for caches of fixed size. `given` are the arguments
        of transformers' create_causal_mask, in this version of it."""
        given = {name: value for name, value in given.items() if name in MASK_ARGUMENTS}
        embeds = given["inputs_embeds"] if "inputs_embeds" in given else given["input_embeds"]
        visible, cache = config.max_position_embeddings + 1, given.get(CACHE)
        # The context limits full layers too; nothing is masked for its sake before it is exceeded.
        is_long = embeds.size(1) + (0 if cache is None else cache.get_seq_length()) > visible
        overlay = {"and_mask_function": sliding_window_overlay(visible)} if is_long else {}
        masks = {"full_attention": create_causal_mask(config=config, **given, **overlay)}
        if "sliding_attention" in config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(config=config, **given)
        return masks


class NanochatGPTModel(NanochatGPTPreTrainedModel):
    """The network without its head."""

    def __init__(self, config):
        super().__init__(config)
        if (config.smear or config.ngram_rows) and (config._attn_implementation or "").startswith(("vllm", "paged")):
            raise ValueError(
                "this network looks at the previous tokens' ids (smear, n-grams), which vLLM and paged caches do not "
                "keep: its text would be wrong there; serve it with nanochat's chat_web"
            )
        n, C, V = config.num_hidden_layers, config.hidden_size, config.vocab_size
        self.embed_tokens = nn.Embedding(V, C)
        self.layers = nn.ModuleList(NanochatGPTLayer(config, i) for i in range(n))
        kv_dim = config.num_key_value_heads * config.head_dim
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, kv_dim) for i in config.value_embeds})
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.empty(n))
            self.x0_lambdas = nn.Parameter(torch.empty(n))
        if config.ngram_rows:
            self.ngram_embed = nn.Embedding(config.ngram_rows, config.ngram_dim)
            self.ngram_proj = nn.Linear(config.ngram_dim, C, bias=False)
        if config.smear:
            self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """input_ids (B, T) -> BaseModelOutputWithPast. `cache` and `past_key_values` are two names of one argument."""
        cfg, x = self.config, self._embed(input_ids, inputs_embeds)
        use_cache = cfg.use_cache if use_cache is None else use_cache
        cache, use_cache = self._choose_cache(past_key_values if cache is None else cache, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        cache_position = torch.arange(x.size(1), device=x.device) + past
        kwargs.pop("cache_position", None)  # generate gave it before transformers 5.10
        if position_ids is None:
            position_ids = self._positions(attention_mask, cache_position)
        masks = self._masks(x, attention_mask, position_ids, cache, cache_position)
        if cfg.smear or cfg.ngram_rows:
            ids = self._all_ids(input_ids, cache, cache_position)
            x = self._add_ngrams(x, ids, cache_position, position_ids)
        x = norm(x)
        if cfg.smear:
            x = self._smear(x, ids, cache_position, position_ids)
        cos_sin, x0, middle = rotary(position_ids, cfg, x.dtype), x, None
        hidden_states, attentions = (x,), ()  # kept only if they are asked for
        for i, layer in enumerate(self.layers):
            scalars = (self.resid_lambdas[i], self.x0_lambdas[i], x0) if cfg.residual_scalars else None
            value_embed = self.value_embeds[str(i)](input_ids) if i in cfg.value_embeds else None
            places = cos_sin, masks[cfg.layer_types[i]], cache, cache_position
            x, weights = layer(x, scalars, value_embed, *places, position_ids=position_ids, **kwargs)
            middle = x if cfg.backout and i == cfg.num_hidden_layers // 2 else middle
            hidden_states += (x,) if output_hidden_states else ()
            attentions += (weights,) if output_attentions else ()
        x = norm(x if middle is None else x - self.backout_lambda.to(x) * middle.to(x))
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            **{CACHE: cache if use_cache else None},
        )

    def _choose_cache(self, cache, use_cache):
        """(the cache to use or None, whether to return it): none where layers are computed again for gradients."""
        if self.gradient_checkpointing and self.training:
            return None, False
        return DynamicCache(config=self.config) if use_cache and cache is None else cache, use_cache

    def _embed(self, input_ids, inputs_embeds):
        """(B, T, C). Raises ValueError for embeddings without ids where the network looks up more than these."""
        if input_ids is None and inputs_embeds is None:
            raise ValueError("give input_ids or inputs_embeds")
        if input_ids is None and (self.config.smear or self.config.ngram_rows or self.config.value_embeds):
            raise ValueError("this network looks up value embeddings or previous tokens: give input_ids")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _positions(self, attention_mask, cache_position):
        """(B or 1, T) positions, counted from the first token that is not padding."""
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            return counted[:, -cache_position.size(0) :]
        return cache_position.unsqueeze(0)

    def _masks(self, x, attention_mask, position_ids, cache, cache_position):
        """Attention masks by layer type; one given in four dimensions serves all layers."""
        if isinstance(attention_mask, dict):
            return attention_mask
        given = {
            "inputs_embeds" if "inputs_embeds" in MASK_ARGUMENTS else "input_embeds": x,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache_position": cache_position,
            CACHE: cache,
        }
        return self.create_masks_for_generate(self.config, **given)

    def _all_ids(self, input_ids, cache, cache_position):
        """(B, S) ids of the cached tokens and the new ones.

        They are kept in a layer of the cache of their own, which beam search, cropping and batch operations change as
        they change the others.
        """
        input_ids = input_ids.long()  # as the products of _add_ngrams need
        if cache is None:
            return input_ids
        ids, n = input_ids[:, None, :, None], self.config.num_hidden_layers  # as keys of one head and channel
        if len(cache.layers) == n:
            last, is_static = cache.layers[-1], isinstance(cache.layers[-1], StaticLayer)
            cache.layers.append(StaticLayer(max_cache_len=last.max_cache_len) if is_static else DynamicLayer())
        return cache.update(ids, ids, n, {"cache_position": cache_position})[0][:, 0, :, 0]

    def _add_ngrams(self, x, ids, places, position_ids):
        """Add to x (B, T, C), the embeddings of the tokens at `places` (T,) of ids (B, S), those of pairs and triples.

        Before position 0 comes the id -1.
        """
        if not self.config.ngram_rows:
            return x
        one, two, three = (
            torch.where((position_ids >= back) & (places >= back), ids[:, (places - back).clamp(min=0)], -1)
            for back in range(3)
        )
        pair = 998_244_353 * one + 1_000_000_007 * (two + 1)
        rows = torch.stack([pair, pair + 1_610_612_741 * (three + 1)]) % self.config.ngram_rows
        return x + self.ngram_proj(self.ngram_embed(rows).sum(0)).to(x.dtype)

    def _smear(self, x, ids, cache_position, position_ids):
        """Add to x (B, T, C) a gated share of the embedding before each; position 0 has none."""
        before = cache_position - 1
        previous = self.embed_tokens(ids[:, before.clamp(min=0)])
        previous = norm(self._add_ngrams(previous, ids, before, position_ids - 1).to(x.dtype))
        has_previous = (position_ids > 0) & (before >= 0)
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))  # (B, T, 1)
        return x + self.smear_lambda * gate * previous * has_previous[..., None]


class NanochatGPTForCausalLM(NanochatGPTPreTrainedModel, GenerationMixin):
    """The network with its head."""

    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vocab_size = config.vocab_size
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """input_ids (B, T) -> CausalLMOutputWithPast with float32 logits (B, T, V), of the last `logits_to_keep` tokens
        or of all for 0; with labels (B, T), the loss of predicting each label from what is before it."""
        cache = past_key_values if cache is None else cache
        arguments = {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        outputs = self.model(input_ids, attention_mask, **arguments, cache=cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )
