"""nanochat: train your own ChatGPT from raw text."""
