"""LoRA on the language model (the published 7B: rank 512 on every linear layer), by way of peft.

A linear layer `q_proj` becomes `q_proj.base_layer`, frozen, with `q_proj.lora_A.default` and `q_proj.lora_B.default`
beside it: W x + alpha / rank * B A x. Checkpoints hold base and adapters under these names, each once; `merged` turns
them into what a model without adapters loads.
"""

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from vpt.config.schema import LoraConfig
from vpt.errors import ConfigError, did_you_mean

_TABLES = ("embed_tokens.weight", "lm_head.weight")  # trained beside the adapters
_BASE, LORA_A, LORA_B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def inject(language: nn.Module, config: LoraConfig) -> None:
    """Put adapters beside linear layers of the language model, in place; nothing where `rank` is 0.

    Raises:
        ConfigError: for a pattern in `targets` that matches no linear layer.
    """
    if not config.rank:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; on CPUs it misses a hub's kernel
    import peft  # an extra; vpt.config.validate.validate has looked for it

    layers = [name for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ConfigError(
                f"model.lora.targets: pattern {pattern!r} matches no layer{did_you_mean(pattern, layers)}"
            )
    chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in config.targets)]
    alpha: Any = config.alpha  # peft takes a fraction, though it says int
    settings = peft.LoraConfig(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=chosen)
    peft.inject_adapter_in_model(settings, language)


def freeze_base(language: nn.Module) -> None:
    """Where there are adapters: train them and the token embedding, freeze the rest of the language model."""
    named = dict(language.named_parameters())
    if not any(name.endswith(LORA_A) for name in named):
        return
    for name, parameter in named.items():
        parameter.requires_grad_(is_adapter(name) or name.startswith("embed_tokens."))


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of an adapter's A or B."""
    return name.endswith((LORA_A, LORA_B))


def plain_name(name: str) -> str:
    """The name of a base layer's tensor in a model without adapters."""
    return name.replace(_BASE, ".")


def has_adapters(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors by name hold adapters."""
    return any(name.endswith(LORA_A) for name in names)


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters and tables of tokens of a base model, by the names of peft's `adapter_model.safetensors`."""
    saved = {name: tensor for name, tensor in tensors.items() if is_adapter(name) or name.endswith(_TABLES)}
    return {f"base_model.model.{name.replace('.default.', '.')}": t.contiguous() for name, t in saved.items()}


def peft_config(tensors: Mapping[str, Tensor], config: LoraConfig, *, base: str | None) -> Any:
    """peft's configuration of the adapters in a base model's `tensors`."""
    import peft  # an extra; the model has its adapters

    alpha: Any = config.alpha
    return peft.LoraConfig(
        r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, inference_mode=True, base_model_name_or_path=base,
        target_modules=sorted(name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)),
    )  # fmt: skip


def merged(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """W + alpha / rank * B A for every adapted layer: tensors as a model without adapters names them.

    Args:
        tensors: of a model or a checkpoint; not changed.
        config: `model.lora` of the run that they come from.
    """
    plain = {plain_name(name): value for name, value in tensors.items() if not is_adapter(name)}
    for name, down in tensors.items():
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            change = tensors[layer + LORA_B].float() @ down.float() * (config.alpha / config.rank)
            weight = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = (weight.float() + change).to(weight.dtype)
    return plain
