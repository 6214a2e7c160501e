"""The features of a network in words, for model cards and for info."""

from nanochat.gpt_config import GPTConfig


def features_in_words(config: GPTConfig) -> list[str]:
    """What a network has beside the plain transformer, a phrase each."""
    words = {
        f"windows of {config.short_window:,} tokens ({config.window_pattern.upper()})": config.has_short_windows,
        f"grouped queries ({config.n_head // config.n_kv_head} to a key)": config.n_kv_head < config.n_head,
        "value embeddings": config.value_embeds,
        "residual scalars": config.residual_scalars,
        f"n-grams ({config.ngram_rows:,} rows)": config.ngram_rows > 0,
        "smear": config.smear,
        "backout": config.backout,
        f"q and k x {config.qk_scale:g}": config.qk_scale != 1,
        f"RoPE base {config.rope_base:,.0f}": config.rope_base != GPTConfig.rope_base,
        f"softcap {config.softcap:g}": config.softcap != GPTConfig.softcap,
    }
    return [word for word, there in words.items() if there]
