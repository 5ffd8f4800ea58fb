"""Folders of another family than the configuration's: refused by their config.json, before weights are read."""

import json
from pathlib import Path

import pytest

from conftest import FAMILIES, compose_config
from vpt.checkpoint.load import build_model
from vpt.config.validate import validate
from vpt.errors import ConfigError

GROUPS = {"qwen2_vl": "qwen2_vl_2b", "qwen2_5_vl": "qwen2_5_vl_3b", "qwen3_vl": "qwen3_vl_2b"}
MIXTURE = "qwen3_vl_moe"
# name -> model type of its folders
ENCODERS = {
    "dino": "dinov2", "dino_registers": "dinov2_with_registers", "dino3": "dinov3_vit", "sam": "sam_vision_model",
    "sam2": "sam2_vision_model", "siglip": "siglip_vision_model", "openai_clip": "clip_vision_model",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_parts) -> Path:
    """A folder for each family: its configuration, and a file that no weights can be read from."""
    root = tmp_path_factory.mktemp("families")
    found = {name: make_parts("encoder=[]", *FAMILIES[name]).model.qwen.config.to_dict() for name in GROUPS}
    found[MIXTURE] = found["qwen3_vl"] | {"model_type": MIXTURE}
    for name in ENCODERS:
        parts = make_parts(f"encoder=[{name}]", f"data.actions={{none:1,{name}:1}}")
        found[name] = parts.model.encoder(name).vision.config.to_dict()
    for name, config in found.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config, default=str))
        (root / name / "model.safetensors").write_bytes(b"no weights")
    return root


@pytest.mark.parametrize("held", [*GROUPS, MIXTURE])
@pytest.mark.parametrize("wanted", GROUPS)
def test_a_base_of_another_family(folders, held, wanted):
    if held == wanted:
        return
    with pytest.raises(ConfigError) as refused:
        compose_config(f"model={GROUPS[wanted]}", "model.size=tiny", "encoder=[]", f"model.path={folders / held}")
    assert f"holds {held} instead of {wanted}" in str(refused.value)
    assert f"type model={GROUPS[held]}" in str(refused.value) if held in GROUPS else "another one" in str(refused.value)


@pytest.mark.parametrize("wanted", ENCODERS)
def test_a_re_encoder_of_another_kind(folders, wanted):
    for held, model_type in ENCODERS.items():
        if held == wanted:
            continue
        config = compose_config(f"encoder=[{wanted}]", f"data.actions={{none:1,{wanted}:1}}")
        config.encoder[wanted].path = str(folders / held)
        for reading in (validate, build_model):
            with pytest.raises(ConfigError, match=f"holds {model_type} instead of .*{ENCODERS[wanted]}"):
                reading(config)
