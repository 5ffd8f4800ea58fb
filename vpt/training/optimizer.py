"""Trained parameters, the optimizer's groups of them, and the learning rate of a step."""

import math
from collections import Counter
from fnmatch import fnmatchcase

import torch
from torch import nn

from vpt.config.schema import OptimConfig
from vpt.errors import ConfigError, did_you_mean, import_bitsandbytes
from vpt.models.lora import freeze_base
from vpt.models.vpt import VPTModel


def set_trainable(model: VPTModel, config: OptimConfig, *, tower_pretrained: bool) -> None:
    """Set `requires_grad` of every parameter.

    Pretrained towers are frozen, random ones trained, and with LoRA the language model's own layers are frozen; then
    come the patterns of `optim.freeze` and of `optim.unfreeze`. Raises ConfigError for a pattern that matches nothing,
    or if nothing is left to train.
    """
    model.tower.requires_grad_(not tower_pretrained)
    for name, vision in model.visions.items():
        vision.requires_grad_(not model.encoder(name).pretrained)
    freeze_base(model.language)
    for key, trained in (("freeze", False), ("unfreeze", True)):
        for pattern in getattr(config, key):
            for parameter in match_parameters(model, pattern, f"optim.{key}"):
                parameter.requires_grad_(trained)
    for name in model.encoders:
        for part in model.encoder(name).unused_modules():
            part.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("optim.freeze leaves nothing to train; name what to train in optim.unfreeze")


def match_parameters(model: nn.Module, pattern: str, key: str) -> list[nn.Parameter]:
    """The parameters whose names match a shell pattern. Raises ConfigError where there is none."""
    named = dict(model.named_parameters())
    found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(
            f"{key}: pattern {pattern!r} matches no parameter{did_you_mean(pattern, list(named))}; the parts are "
            f"{', '.join(dict.fromkeys(module_of(name) for name in named))}; '*' stands for anything"
        )
    return found


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Disjoint groups that hold every trained parameter once: by rate, and by whether it decays.

    Matrices decay; vectors and embeddings do not. The first pattern of `lr_scale` that matches sets the rate.
    """
    for pattern in config.lr_scale:
        match_parameters(model, pattern, "optim.lr_scale")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    members: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():  # a tied weight is named once
        if not parameter.requires_grad:
            continue
        scale = next((s for pattern, s in config.lr_scale.items() if fnmatchcase(name, pattern)), 1.0)
        decay = config.weight_decay if parameter.ndim >= 2 and id(parameter) not in embeddings else 0.0
        members.setdefault((scale, decay), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in group], "names": [name for name, _ in group],
            "lr": config.lr * scale, "base_lr": config.lr * scale, "scale": scale, "weight_decay": decay,
        }
        for (scale, decay), group in members.items()
    ]  # fmt: skip


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; each group keeps its parameters' names.

    In 8 bits moments are bytes, 256 of them to a scale; those of tensors with less than 4,096 numbers are float32.
    """
    beta1, beta2 = config.betas
    if config.name == "adamw_8bit":
        found: torch.optim.Optimizer = import_bitsandbytes(f"optim.name={config.name}").optim.AdamW8bit(
            parameter_groups(model, config), lr=config.lr, betas=(beta1, beta2), eps=config.eps
        )
        return found
    return torch.optim.AdamW(parameter_groups(model, config), betas=(beta1, beta2), eps=config.eps, fused=True)


def lr_factor(step: int, *, steps: int, warmup: float, final: float) -> float:
    """Factor on the learning rate: linear warm-up over a share of the steps, then a cosine down to `final`."""
    warm = max(1, math.ceil(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Apply a factor to every group's own base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def parameter_table(model: VPTModel) -> str:
    """A table of the model's modules: number of parameters, trained or frozen."""
    totals: Counter[tuple[str, bool]] = Counter()
    for name, parameter in model.named_parameters():
        totals[module_of(name), parameter.requires_grad] += parameter.numel()
    modules = dict.fromkeys(module for module, _ in totals)
    width = max(map(len, modules))
    lines = []
    for module in modules:
        trained, frozen = totals[module, True], totals[module, False]
        state = "trained" if not frozen else "frozen" if not trained else f"{trained:,} trained, {frozen:,} frozen"
        lines.append(f"  {module:{width}}  {trained + frozen:>13,}  {state}")
    if any(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        lines.append(
            "  trained weights are bfloat16: steps below 1/256 of a weight are lost, so they hardly move; "
            "type model.dtype=float32 training.precision=bf16 to compute in bfloat16 and keep float32 weights"
        )
    return "\n".join(lines)


def module_of(name: str) -> str:
    """The module that a parameter is counted with."""
    pieces = name.split(".")
    if pieces[0] == "encoders":
        return ".".join(pieces[:3])
    return ".".join(pieces[:3]) if pieces[1] == "model" else ".".join(pieces[:2])
