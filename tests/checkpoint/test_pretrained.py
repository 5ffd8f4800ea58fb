"""Folders of weights, of base models and of re-encoders: all of it is read, or what is wrong is named."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Qwen2Tokenizer,
    Sam2Config,
    Sam2Model,
    SamConfig,
    SamModel,
    SamVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from conftest import compose_config
from helpers.weight_folders import BASE, BASE_3, BASES, WeightFolder, damage, write_folders
from vpt.checkpoint.format import save_weights
from vpt.checkpoint.load import build_model, load_pretrained
from vpt.config.schema import TrainConfig
from vpt.config.weight_folder import check_model_group, model_group
from vpt.distributed.dtensor import full_tensor
from vpt.distributed.process_group import init_process_group
from vpt.errors import CheckpointError, ConfigError, UserError
from vpt.training.setup import build_training

CHANGES = ["dropped", "renamed", "module", "reshaped", "left over", "harmless", "dtype", "integers", "other tensors",
           "other folder", "present names", "shards", "truncated"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(make_parts, tmp_path_factory) -> dict[str, WeightFolder]:
    """Every kind of folder that a configuration takes."""
    parts = make_parts("encoder=[dino,sam,siglip,openai_clip]", "model.region_bins=0")
    other = make_parts("model=tiny_3", "encoder=[]", "model.region_bins=0")
    return write_folders(parts, other, tmp_path_factory.mktemp("weights"))


def equal_or_named(folders: dict[str, WeightFolder], part: str, changes: list[str], seed: int, to: Path) -> None:
    """Build a model from a damaged folder: its weights are those of the files, or the refusal names what is wrong."""
    damaged, said = damage(folders, part, changes, seed, to), None
    try:
        model = build_model(folders[part].config(to)).model
    except UserError as error:
        said = str(error)
    if damaged.named:
        assert said is not None, f"nothing was said of {damaged.named}"
        assert any(name in said for name in damaged.named) and "\n" not in said, (damaged.named, said)
    else:
        assert said is None, said
        assert folders[part].held_by(model, damaged.expected)


def fuzz(examples: int):
    """The property over random changes to random folders."""

    @settings(max_examples=examples, deadline=None, database=None)
    @given(
        part=st.sampled_from([BASE, BASE_3, "dino", "sam", "siglip", "openai_clip"]),
        changes=st.lists(st.sampled_from(CHANGES), max_size=3, unique=True), seed=st.integers(0, 2**32),
    )  # fmt: skip
    def check(folders, to, part, changes, seed):
        equal_or_named(folders, part, changes, seed, to)

    return check


def test_equal_weights_or_a_refusal_by_name(folders, tmp_path):
    fuzz(20)(folders=folders, to=tmp_path / "damaged")


@pytest.mark.slow
def test_equal_weights_or_a_refusal_by_name_many_times(folders, tmp_path):
    fuzz(1500)(folders=folders, to=tmp_path / "damaged")


def refusal(config: TrainConfig) -> str:
    """What building a model says."""
    with pytest.raises(UserError) as refused:
        build_model(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_one_rule_for_every_strategy(folders, tmp_path):
    """One process, copies and shards read the same numbers, and refuse the same folder in the same words."""
    own = folders["dino"]
    changed = damage(folders, "dino", ["dropped"], 0, tmp_path / "changed")
    with init_process_group(device="cpu", always=True) as world:
        for kind in ("single", "ddp", "fsdp"):
            good, bad = own.config(own.folder), own.config(changed.folder)
            good.strategy.kind = bad.strategy.kind = kind
            model = build_training(good, None, world, torch.device("cpu"))[0].model
            held = {
                name: full_tensor(tensor.detach()) for name, tensor in model.encoder("dino").vision.named_parameters()
            }
            assert all(torch.equal(held[name], tensor) for name, tensor in own.tensors.items())
            with pytest.raises(CheckpointError, match=rf"missing: {changed.named[0]}$"):
                build_training(bad, None, world, torch.device("cpu"))


def whole_models(folders: dict[str, WeightFolder]) -> dict[str, tuple[str, Any, Any]]:
    """Models of transformers that hold an encoder besides other parts: re-encoder, the model, the encoder's class."""
    sizes = {
        name: own.config(own.folder).encoder[name].sizes["tiny"].config
        for name, own in folders.items() if name not in BASES
    }  # fmt: skip
    sizes["sam2"] = WeightFolder("sam2", Path(), {}, {}).config(None).encoder["sam2"].sizes["tiny"].config
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    gated = Dinov2Config(**sizes["dino"], use_swiglu_ffn=True)
    return {
        "clip": ("openai_clip", CLIPModel(CLIPConfig(text_config=text, vision_config=sizes["openai_clip"])), CLIPVisionModel),
        "siglip": ("siglip", SiglipModel(SiglipConfig(text_config=text, vision_config=sizes["siglip"])), SiglipVisionModel),
        "sam": ("sam", SamModel(SamConfig(vision_config={**sizes["sam"], "output_channels": 256})), SamVisionModel),
        "sam2": ("sam2", Sam2Model(Sam2Config(vision_config=sizes["sam2"])), None),
        "dino": ("dino", Dinov2ForImageClassification(Dinov2Config(**sizes["dino"])), Dinov2Model),
        "dino, gated": ("dino", Dinov2Model(gated), Dinov2Model),
    }  # fmt: skip


def test_an_encoder_out_of_a_whole_model(folders, tmp_path):
    """As transformers reads it: other parts are left out, what an older version named otherwise or joined is known."""
    for name, (encoder, whole, kind) in whole_models(folders).items():
        whole.save_pretrained(tmp_path / name)
        config = WeightFolder(encoder, Path(), {}, {}).config(tmp_path / name)
        vision = build_model(config).model.encoder(encoder).vision.state_dict()
        # transformers does not know its own names of SAM 2's encoder there, and would draw it at random
        theirs = kind.from_pretrained(tmp_path / name).state_dict() if kind else whole.vision_encoder.state_dict()
        assert theirs.keys() == vision.keys(), name
        assert all(torch.equal(vision[key], tensor) for key, tensor in theirs.items()), name


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_tokenizer_of_another_vocabulary(folders, tmp_path):
    own = folders[BASE]
    ids = json.loads((own.folder / "config.json").read_text())
    for key, said in {
        "image_token_id": rf"image_token_id is 7, the tokenizer has <\|image_pad\|> {ids['image_token_id']}",
        "vision_start_token_id": r"vision_start_token_id is 7", "eos_token_id": r"eos_token_id is 7.*<\|im_end\|>",
    }.items():  # fmt: skip
        other = Path(shutil.copytree(own.folder, tmp_path / key))
        edit(other / "config.json", **({"text_config": ids["text_config"] | {key: 7}} if "eos" in key else {key: 7}))
        assert re.search(said, refusal(own.config(other)))
    tokenizer = Qwen2Tokenizer.from_pretrained(own.folder)
    tokenizer.add_tokens([f"word{number}" for number in range(200)])
    larger = Path(shutil.copytree(own.folder, tmp_path / "larger"))
    tokenizer.save_pretrained(larger)
    assert f"it has {len(tokenizer)} tokens, the model's table 576 rows" in refusal(own.config(larger))


def test_a_tokenizer_of_another_checkpoint(make_parts, tmp_path):
    """The ids that the model was built with are in `sizes`."""
    save_weights(tmp_path, make_parts("encoder=[]"))
    (tmp_path / "SHA256SUMS").unlink()
    edit(tmp_path / "sizes" / "qwen.json", video_token_id=7)
    with pytest.raises(UserError, match="video_token_id is 7, the tokenizer has"):
        load_pretrained(tmp_path, device="cpu")


def test_no_folder_of_weights(folders, tmp_path):
    """What `train.py` says before anything is built."""
    base, dino = folders[BASE], folders["dino"]
    (tmp_path / "empty").mkdir()
    bare = Path(shutil.copytree(dino.folder, tmp_path / "bare"))
    (bare / "config.json").unlink()
    broken = Path(shutil.copytree(dino.folder, tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    for own, folder, said in (
        (base, base.folder / "config.json", "is a file; type model.path=FOLDER"),
        (base, tmp_path / "empty", "is empty; copy or download"),
        (dino, bare, "holds no config.json"),
        (dino, broken, "broken/config.json cannot be read"),
        (base, dino.folder, "holds dinov2 instead of qwen2_vl"),
        (dino, base.folder, f"encoder.dino.path={base.folder} holds qwen2_vl instead of dinov2"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as refused:
            own.config(folder)
        assert "\n" not in str(refused.value)
    wrong = ["model=qwen2_5_vl_3b", "model.size=tiny", f"model.path={base.folder}"]
    with pytest.raises(ConfigError, match="holds qwen2_vl instead of qwen2_5_vl; type model=qwen2_vl_2b"):
        compose_config(*wrong)
    with pytest.raises(ConfigError, match=r"encoder\.clip\.path=.* has no effect"):
        compose_config("encoder=[clip]", f"encoder.clip.path={dino.folder}")


def test_parts_of_a_folder_that_are_not_there(folders, tmp_path):
    own = folders[BASE]
    shards = damage(folders, BASE, ["shards"], 0, tmp_path / "shards").folder
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors; copy" in refusal(own.config(shards))
    gone, dumb = (Path(shutil.copytree(own.folder, tmp_path / name)) for name in ("gone", "dumb"))
    (gone / "model.safetensors").unlink()
    assert "holds no weights" in refusal(own.config(gone))
    for file in dumb.glob("token*"):
        file.write_text("{")
    assert "the tokenizer in" in refusal(own.config(dumb))


def test_a_path_without_its_model_group(folders):
    """The recipe of tiny models is for tiny models, and for whoever asks for it."""
    model = compose_config(f"model.path={folders[BASE].folder}").model
    with pytest.raises(ConfigError, match="rates of tiny models; type model=qwen2_vl_2b with it"):
        check_model_group(model, [f"model.path={model.path}"])
    for typed in (["model=tiny"], ["model=qwen2_vl_2b", "model.size=tiny"]):
        check_model_group(model, typed)
    check_model_group(compose_config("model=qwen2_5_vl_7b").model, [])
    assert model_group(folders[BASE].folder.parent / "dino") is None
