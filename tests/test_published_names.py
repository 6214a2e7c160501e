"""Names and flags that people already use: they stay."""

import dataclasses
import importlib
import inspect

import pytest

NAMES = {
    "nanochat.tokenizer": [
        "RustBPETokenizer.train_from_iterator",
        "RustBPETokenizer.render_conversation",
        "RustBPETokenizer.render_for_completion",
        "get_tokenizer",
    ],
    "nanochat.gpt": ["GPTConfig", "GPT.estimate_flops", "GPT.num_scaling_params", "CausalSelfAttention.forward"],
    "nanochat.flash_attention": ["flash_attn.flash_attn_func", "flash_attn.flash_attn_with_kvcache"],
    "nanochat.dataloader": ["tokenizing_distributed_data_loader_with_state_bos_bestfit"],
    "nanochat.optim": ["MuonAdamW", "DistMuonAdamW"],
    "nanochat.loss_eval": ["evaluate_bpb"],
    "nanochat.inference.calculator": ["use_calculator"],
    "nanochat.execution": ["execute_code", "ExecutionResult", "PythonSession"],
    "nanochat.core_eval": ["evaluate_core"],
    "nanochat.serve.service": ["WorkerPool"],
    "nanochat.engine": ["KVCache", "use_calculator", "Engine.generate", "Engine.generate_batch"],
    "tasks.common": ["Task", "TaskMixture", "TaskSequence"],
    "tasks.smoltalk": ["SmolTalk"],
    "tasks.mmlu": ["MMLU"],
    "tasks.arc": ["ARC"],
    "tasks.gsm8k": ["GSM8K"],
    "tasks.humaneval": ["HumanEval"],
    "tasks.spellingbee": ["SpellingBee", "SimpleSpelling"],
    "tasks.customjson": ["CustomJSON"],
}

FLAGS = {
    "base_train": "run device_type fp8 fp8_recipe adam_beta1 adam_beta2 depth aspect_ratio head_dim max_seq_len "
    "window_pattern num_iterations target_flops target_param_data_ratio device_batch_size total_batch_size "
    "embedding_lr unembedding_lr weight_decay matrix_lr scalar_lr warmup_steps warmup_ratio warmdown_ratio "
    "final_lr_frac "
    "resume_from_step eval_every eval_tokens core_metric_every core_metric_max_per_task sample_every save_every "
    "model_tag n_embd n_head n_kv_head data init_from resume minutes",
    "chat_sft": "run device_type model_tag model_step device_batch_size total_batch_size embedding_lr unembedding_lr "
    "matrix_lr weight_decay init_lr_frac num_iterations eval_every eval_tokens data",
    "chat_eval": "source task_name max_problems num_samples batch_size max_new_tokens temperature top_k model_tag step "
    "device_type",
    "chat_cli": "source model_tag step prompt temperature top_k device_type",
    "base_eval": "eval hf_path model_tag step max_per_task device_batch_size split_tokens device_type",
    "chat_web": "num_gpus source temperature top_k max_tokens model_tag step port host device_type",
    "tok_train": "max_chars doc_cap vocab_size data",
}


@pytest.mark.parametrize("module", NAMES)
def test_published_python_names(module: str) -> None:
    for name in NAMES[module]:
        value = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)


def test_published_signatures() -> None:
    from nanochat.engine import Engine
    from nanochat.gpt import CausalSelfAttention, GPTConfig

    assert list(inspect.signature(CausalSelfAttention.forward).parameters)[1:6] == [
        "x",
        "ve",
        "cos_sin",
        "window_size",
        "kv_cache",
    ]
    generate = list(inspect.signature(Engine.generate).parameters)
    assert {"tokens", "num_samples", "max_tokens", "temperature", "top_k", "seed"} <= set(generate)
    fields = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
    published = {
        "sequence_len": 2048,
        "vocab_size": 32768,
        "n_layer": 12,
        "n_head": 6,
        "n_kv_head": 6,
        "n_embd": 768,
        "window_pattern": "SSSL",
    }
    assert published.items() <= fields.items()


@pytest.mark.parametrize("script", FLAGS)
def test_published_flags(script: str) -> None:
    config = importlib.import_module(f"scripts.{script}").Config
    assert set(FLAGS[script].split()) <= {f.name for f in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("script", "short"),
    [
        ("chat_eval", "-i -a -x -n -b -m -t -k -g -s"),
        ("chat_cli", "-i -g -s -p -t -k"),
        ("chat_web", "-i -t -k -m -g -s -p"),
    ],
)
def test_published_short_flags(script: str, short: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"scripts.{script}").main(["--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert all(f"{flag} " in text or f"{flag}," in text for flag in short.split())


def test_leading_dashes_of_torchrun_are_tolerated() -> None:
    from scripts import _cli, base_train

    assert _cli.parse(base_train.Config, ["--", "--depth=7"]).depth == 7
