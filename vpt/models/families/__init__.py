"""Families of base models, one file each; `vpt.models.families.base` is their contract."""

from vpt.errors import ConfigError, did_you_mean
from vpt.models.families.base import Family
from vpt.models.families.qwen2_5_vl import Qwen2_5VL
from vpt.models.families.qwen2_vl import Qwen2VL
from vpt.models.families.qwen3_vl import Qwen3VL

FAMILIES: dict[str, Family] = {family.name: family for family in (Qwen2VL(), Qwen2_5VL(), Qwen3VL())}


def family_of(name: str) -> Family:
    """The family of this `model.family`. Raises ConfigError for an unknown one."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family={name} is not one of {', '.join(FAMILIES)}{did_you_mean(name, [*FAMILIES])}")
    return FAMILIES[name]
