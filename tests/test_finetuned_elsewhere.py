"""An export that PEFT and TRL have finetuned comes back with the logits it has there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import CONFIGS, TOKENIZER, export, make_model, model_of

from nanochat.formats.read_model import read_model

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.parametrize("route", CONFIGS)]

CHATS: list[Any] = [
    [{"role": "user", "content": "the cats?"}, {"role": "assistant", "content": "on the mats <|bos|>"}],
    [
        {"role": "system", "content": "two and two"},
        {"role": "user", "content": "are"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "and four"},
        {"role": "assistant", "content": "are eight"},
    ],
]
PROMPT = torch.tensor([TOKENIZER.encode("the hats and the cats, 你好", prepend="<|bos|>")])


def load(folder: Path, route: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=route == "code")


def load_tokenizer(folder: Path, route: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=route == "code")


@torch.no_grad()
def assert_comes_back(there: Any, folder: Path, before: torch.Tensor) -> None:
    """The saved model has the same logits when read here, and has learnt something."""
    logits = there.eval()(PROMPT).logits
    assert (logits - before).abs().max() > 1e-3
    assert torch.allclose(model_of(read_model(folder))(PROMPT), logits, atol=1e-5)


@torch.no_grad()
def our_loss(model: Any) -> float:
    """Mean loss of the tokens that the assistant writes in CHATS."""
    losses = []
    for chat in CHATS:
        ids, mask = TOKENIZER.render_conversation({"messages": chat})
        targets = torch.tensor([[t if m else -1 for t, m in zip(ids[1:], mask[1:])]])
        losses += model(torch.tensor([ids[:-1]]), targets, loss_reduction="none")[targets.flatten() >= 0].tolist()
    return sum(losses) / len(losses)


def test_a_step_of_lora_with_peft(route: str, tmp_path: Path) -> None:
    """The adapter is merged into the weights before they are saved."""
    peft = pytest.importorskip("peft")
    model = make_model(route)
    there = load(export(model, tmp_path / "export"), route)
    adapted = peft.get_peft_model(there, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step changes B alone, which begins with zeros
        adapted(PROMPT, labels=PROMPT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=route == "code").save_pretrained(
        tmp_path / "tuned"
    )
    assert_comes_back(merged, tmp_path / "tuned", model(PROMPT).detach())


def test_a_step_of_sft_with_trl(route: str, tmp_path: Path) -> None:
    """The loss is that of the assistant's tokens here."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = make_model(route)
    there = load(export(model, tmp_path / "export"), route)
    tokenizer = load_tokenizer(tmp_path / "export", route)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        assistant_only_loss=True,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        max_length=128,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])
    trainer = trl.SFTTrainer(there, settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(our_loss(model), abs=1e-3)
    trainer.save_model(tmp_path / "tuned")
    assert_comes_back(trainer.model, tmp_path / "tuned", model(PROMPT).detach())
