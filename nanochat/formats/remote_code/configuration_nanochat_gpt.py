"""The configuration of a nanochat GPT, for Hugging Face transformers (see modeling_nanochat_gpt.py)."""

from transformers import PretrainedConfig


class NanochatGPTConfig(PretrainedConfig):
    """Sizes and features of the network. The sizes have the names that transformers uses everywhere."""

    model_type = "nanochat_gpt"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size=32768,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=None,
        max_position_embeddings=2048,  # no position sees keys further back than this, in any layer
        layer_types=None,  # of each layer: "sliding_attention" or "full_attention"
        sliding_window=None,  # tokens that a position of a sliding layer sees, itself included
        rope_base=10000.0,
        qk_scale=1.0,  # of queries and keys, after their norm
        final_logit_softcapping=15.0,  # the name by which vLLM applies it, too
        value_embeds=(),  # layers that add a token's value embedding to its values
        value_gate_channels=32,
        value_gate_scale=2.0,
        residual_scalars=False,
        smear=False,  # each token takes a gated share of its predecessor's embedding
        smear_channels=24,
        ngram_rows=0,  # of a table of hashed pairs and triples of tokens, added to the embeddings
        ngram_dim=32,
        backout=False,  # the middle layer's residual is subtracted before the head
        initializer_range=0.02,
        tie_word_embeddings=False,
        use_cache=True,
        **other,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = 4 * hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.rope_base = rope_base
        self.qk_scale = qk_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.value_embeds = list(value_embeds)
        self.value_gate_channels = value_gate_channels
        self.value_gate_scale = value_gate_scale
        self.residual_scalars = residual_scalars
        self.smear = smear
        self.smear_channels = smear_channels
        self.ngram_rows = ngram_rows
        self.ngram_dim = ngram_dim
        self.backout = backout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        for name in ("intermediate_size", "head_dim"):  # they follow from the other sizes
            other.pop(name, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **other)
