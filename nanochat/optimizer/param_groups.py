"""Which parameter goes into which of the optimizer's groups, at which rate."""

from dataclasses import dataclass
from typing import Any

import torch

from nanochat.common import UserError, warn
from nanochat.gpt import GPT
from nanochat.optimizer.update_rules import RULES

# Scaling the whole residual stream changes nothing, as it is normed at the end. So at the start of a run the gradients
# of the residual scalars are zero up to rounding, about 1e-10, and Adam would make full steps of that noise, different
# ones for every split of the batch. Real gradients are above 1e-4.
SCALAR_EPS = 1e-6


@dataclass
class OptimizerConfig:
    """Rates at the reference: width 768 and 2^19 tokens a step. scaling.py says what they become elsewhere.

    The defaults are the published recipe; `later()` is its later version.
    """

    matrix_rule: str = "muon"  # of update_rules.RULES, for the matrices of the blocks and of the n-grams
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    value_embed_lr_ratio: float = 1.0  # of the embedding rate
    smear_backout_lr: float = 0.2
    ngram_lr_ratio: float = 0.4  # of the embedding rate
    ngram_reread_ratio: float = 0.0  # of that, on text that was read before: it would be learnt by heart
    weight_decay: float = 0.2  # of the matrices, at depth 12
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    head_beta2: float = 0.95
    embed_beta2: float = 0.95
    head_decay: float = 0.0
    wte_decay: float = 0.0
    value_embed_decay: float = 0.0
    resid_decay: float = 0.0
    muon_beta2: float = 0.95
    row_equilibrate: bool = False
    frobenius_snap: bool = False
    ns_safety: float = 1.02

    def __post_init__(self) -> None:
        if self.matrix_rule not in RULES:
            raise UserError(f"matrix_rule must be one of {', '.join(RULES)}, got {self.matrix_rule!r}")
        for name, value in vars(self).items():
            if "beta" in name and not 0 <= value < 1:
                raise UserError(f"{name} must be from 0 to below 1, got {value:g}")
            if any(part in name for part in ("lr", "decay", "ratio")) and value < 0:
                raise UserError(f"{name} cannot be negative, got {value:g}")

    @classmethod
    def later(cls, **changes: Any) -> "OptimizerConfig":
        """The later published recipe: a hotter head, slower second moments, light decay, row equilibration."""
        values: dict[str, Any] = {
            "unembedding_lr": 0.008,
            "value_embed_lr_ratio": 0.5,
            "weight_decay": 0.28,
            "head_beta2": 0.96,
            "embed_beta2": 0.995,
            "head_decay": 0.01,
            "wte_decay": 0.001,
            "value_embed_decay": 0.01,
            "resid_decay": 0.05,
            "muon_beta2": 0.9,
            "row_equilibrate": True,
            "frobenius_snap": True,
            "ns_safety": 1.01,
        }
        return cls(**{**values, **changes})


def build_param_groups(
    model: GPT, config: OptimizerConfig, *, lr_scale: float = 1.0, weight_decay: float = 0.0, ns_dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups for `model`, every parameter in exactly one.

    The rates of embeddings and head shrink with width as (n_embd/768)^-0.5, the scalars' do not; all rates are
    multiplied by `lr_scale` (batch size, finetuning). `weight_decay` is the matrices', already scaled for depth.
    """
    width = (model.config.n_embd / 768) ** -0.5 * lr_scale
    betas = (config.adam_beta1, config.adam_beta2)
    embed_betas = (config.adam_beta1, config.embed_beta2)
    head_betas = (config.adam_beta1, config.head_beta2)
    value_lr = config.embedding_lr * config.value_embed_lr_ratio * width

    def adamw(params: list[Any], lr: float, betas: tuple[float, float], decay: float = 0.0) -> dict[str, Any]:
        return {"kind": "adamw", "params": params, "lr": lr, "betas": betas, "weight_decay": decay}

    def scalars(params: list[Any], lr: float, betas: tuple[float, float], decay: float = 0.0) -> dict[str, Any]:
        return {**adamw(params, lr, betas, decay), "eps": SCALAR_EPS}

    groups = [
        adamw([model.lm_head.weight], config.unembedding_lr * width, head_betas, config.head_decay),
        adamw([model.wte.weight], config.embedding_lr * width, embed_betas, config.wte_decay),
        adamw(list(model.value_embeds.parameters()), value_lr, embed_betas, config.value_embed_decay),
    ]
    if model.config.ngram_rows:
        lr = groups[1]["lr"] * config.ngram_lr_ratio
        table = {"kind": "sgd", "params": [model.ngram_embed.weight], "lr": lr, "weight_decay": 0.0}
        groups.append({**table, "reread": config.ngram_reread_ratio})
    scalar_lr = config.scalar_lr * lr_scale
    if model.config.residual_scalars:
        groups.append(scalars([model.resid_lambdas], scalar_lr * 0.01, betas, config.resid_decay))
        groups.append(scalars([model.x0_lambdas], scalar_lr, (0.96, config.adam_beta2)))
    extras = [p for name, p in model.named_parameters() if name.startswith(("smear", "backout"))]
    groups.append(scalars(extras, config.smear_backout_lr * lr_scale, betas))
    matrices: dict[tuple[int, ...], list[torch.Tensor]] = {}  # by shape
    for p in model.blocks.parameters():
        if p.dim() == 2:
            matrices.setdefault(tuple(p.shape), []).append(p)
    if model.config.ngram_rows:
        matrices.setdefault(tuple(model.ngram_proj.weight.shape), []).append(model.ngram_proj.weight)
    placed = {p for group in groups for p in group["params"]}.union(*matrices.values())
    # Whatever else a model has, such as learnable gains: they scale activations as the residual scalars do.
    others = {name: p for name, p in model.named_parameters() if p not in placed}
    if large := [f"{name} {tuple(p.shape)}" for name, p in others.items() if p.dim() > 1]:
        warn(f"not matrices of a block, so updated as scalars and not counted in FLOPs: {', '.join(large[:3])}")
    groups.append(scalars(list(others.values()), scalar_lr * 0.01, betas))
    rule = RULES[config.matrix_rule]
    for shape in sorted(matrices):
        rates = {"lr": config.matrix_lr * lr_scale, "weight_decay": weight_decay}
        settings = rule.settings(config, ns_dtype)
        groups.append({"kind": config.matrix_rule, "params": matrices[shape], **rates, **settings})
    return [group for group in groups if group["params"]]
