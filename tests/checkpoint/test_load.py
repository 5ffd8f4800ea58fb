"""Folders of trained models: ours, the authors' format and Qwen's, there and back."""

import json
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

import vpt
from conftest import FAMILIES, ROOT, compose_config, conversation, mixed_records, samples_of
from golden import Case
from vpt.checkpoint.export import Export, export
from vpt.checkpoint.format import save_weights
from vpt.checkpoint.load import build_model, load_pretrained
from vpt.checkpoint.pretrained import StoredWeights
from vpt.checkpoint.tensors import LazyStateDict, unique_state_dict
from vpt.checkpoint.upstream import UpstreamCheckpoint, from_upstream_name, to_upstream_name
from vpt.cli.export import parse
from vpt.data.collate import collate
from vpt.errors import CheckpointError, ConfigError
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER

EVERY = "encoder=[dino,sam,clip]"
UNTIED = "model.config.tie_word_embeddings=false"


@pytest.fixture
def saved(make_parts, tmp_path):
    """Build tiny parts and write them as our own folder."""

    def save(*overrides: str):
        parts, folder = make_parts(*overrides), tmp_path / "ours"
        folder.mkdir()
        save_weights(folder, parts)
        return parts, folder

    return save


def same(a: VPTModel, b: VPTModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "overrides", [(EVERY,), ("encoder=[siglip,openai_clip]", "model=tiny_2_5"), ("encoder=[]", UNTIED)]
)
def test_our_folder_reads_back(saved, overrides):
    parts, folder = saved(*overrides)
    torch.manual_seed(1)  # what is not read from the folder would differ
    assert same(vpt.load(folder, device="cpu").model, parts.model)
    assert vpt.load(folder).tokenizer.get_vocab() == parts.tokenizer.get_vocab()


def test_exported_twice_is_the_same(saved, tmp_path):
    _, folder = saved(EVERY)
    out = export(Export(str(folder), str(tmp_path / "out" / "model")))
    first, second = (folder / "model.safetensors").read_bytes(), (out / "model.safetensors").read_bytes()
    assert first == second


@pytest.mark.parametrize(
    "overrides", [(EVERY,), ("encoder=[dino]", UNTIED), ("encoder=[clip]", "model.projector_scale=2")]
)
def test_upstream_format_there_and_back(saved, tmp_path, folder, overrides):
    """Exported, loaded by model.path, exported again: the same bytes, and the same predictions in between."""
    parts, ours = saved(*overrides)
    theirs = export(Export(str(ours), str(tmp_path / "theirs"), "upstream"))
    config = json.loads((theirs / "config.json").read_text())
    assert config["model_type"] == "qwen2_vl_vpt"
    assert config["vision_encoder_ls"] == list(parts.model.encoders)
    check_processors(theirs, parts, folder.root / "3.png")
    torch.manual_seed(1)
    again = build_model(compose_config(*overrides, f"model.path={theirs}"))
    assert same(again.model, parts.model)
    assert all(again.model.encoder(name).pretrained for name in again.model.encoders)
    back = tmp_path / "back"
    back.mkdir()
    save_weights(back, again)
    twice = export(Export(str(back), str(tmp_path / "twice"), "upstream"))
    assert (theirs / "model.safetensors").read_bytes() == (twice / "model.safetensors").read_bytes()
    assert json.loads((twice / "config.json").read_text()) == config


def test_an_upstream_folder_answers_without_a_configuration(saved, tmp_path, folder):
    """`vpt.load` takes it as it is, and predicts what the model predicted before it was exported."""
    parts, ours = saved(EVERY)
    theirs = export(Export(str(ours), str(tmp_path / "theirs"), "upstream"))
    loaded = load_pretrained(theirs, device="cpu")
    assert same(loaded.model, parts.model)
    batch = collate(samples_of(parts, folder, mixed_records()))
    with torch.no_grad():
        assert torch.equal(loaded.model(batch).nll, parts.model.eval()(batch).nll)


@pytest.mark.parametrize("name", ["dino_two_pass", "sam_two_pass_masked", "clip_two_pass", "dino_tied_masked"])
def test_golden_weights_load_as_an_upstream_folder(name, tmp_path, make_parts):
    """The authors' names and flat keys, as the golden cases hold them, reach every tensor of the model."""
    case = Case.load(ROOT / "tests" / "golden" / f"{name}.json")
    model = case.model("shared")
    names = {from_upstream_name(theirs): theirs for theirs in case.spec["weights"]}
    assert all(to_upstream_name(ours) == theirs for ours, theirs in names.items())
    save_file(
        {names[ours]: tensor.contiguous() for ours, tensor in unique_state_dict(model).items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl_vpt", **case.config}))
    upstream = UpstreamCheckpoint.at(tmp_path)
    other = case.model("shared")
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    places = upstream.places(tied=other.qwen.config.tie_word_embeddings)
    rows = case.config["vocab_size"]
    StoredWeights.match(other, upstream.tensors, places, "", rows=rows).load(other)
    assert same(other, model)
    sizes = upstream.sizes({})
    assert type(model.qwen.config)(**sizes.qwen).text_config.rms_norm_eps == case.config["rms_norm_eps"]


def reshaped(folder: Path, kind: str) -> None:
    """Lay the tensors of a folder out in another way that transformers knows."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    suffix = "safetensors" if kind == "sharded" else "bin"
    stem = "model" if kind == "sharded" else "pytorch_model"
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, own in shards.items():
        part = {name: tensors[name] for name in own}
        save_file(part, folder / file) if kind == "sharded" else torch.save(part, folder / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def test_every_layout_of_weights(saved, tmp_path):
    """Shards are read; pickles are refused with the command that makes shards of them."""
    parts, folder = saved("encoder=[dino]")
    theirs = export(Export(str(folder), str(tmp_path / "theirs"), "upstream"))
    for kind in ("sharded", "sharded bin"):
        fresh = shutil.copytree(theirs, tmp_path / kind.replace(" ", "_"))
        reshaped(fresh, kind)
        config = compose_config("encoder=[dino]", f"model.path={fresh}")
        if kind == "sharded bin":
            with pytest.raises(CheckpointError, match="in pickles, which are not read; type: python -c") as refused:
                build_model(config)
            code = shlex.split(str(refused.value).partition("type: ")[2])[2]
            subprocess.run([sys.executable, "-c", code], check=True)
        assert same(build_model(config).model, parts.model)


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_upstream_errors_list_the_tensors(saved, tmp_path):
    """What the authors' loader passed over stops here, with names."""
    _, folder = saved("encoder=[dino]")
    theirs = export(Export(str(folder), str(tmp_path / "theirs"), "upstream"))
    query = "detection_model.encoder.layer.0.attention.attention.query.weight"
    config = compose_config("encoder=[dino]", f"model.path={theirs}")
    _edit(theirs, lambda tensors: tensors.update({query[:-6] + "extra": tensors.pop(query)}))
    with pytest.raises(CheckpointError, match=r"missing: encoders\.dino.*q_proj\.weight; unexpected: .*query\.extra"):
        build_model(config)
    _edit(theirs, lambda tensors: tensors.update({"audio.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"audio\.weight.*belongs to no part"):
        build_model(config)
    with pytest.raises(ConfigError, match=r"has the re-encoders \['dino'\].*type encoder=\[dino\]"):
        build_model(compose_config("encoder=[clip]", f"model.path={theirs}"))


def test_untied_head_of_a_checkpoint_that_says_tied(saved, tmp_path):
    """The authors' files store lm_head apart; where it differs it is kept, not overwritten by the embedding."""
    _, folder = saved("encoder=[dino]")
    theirs = export(Export(str(folder), str(tmp_path / "theirs"), "upstream"))
    _edit(theirs, lambda tensors: tensors["lm_head.weight"].add_(1))
    model = build_model(compose_config("encoder=[dino]", f"model.path={theirs}")).model
    assert torch.equal(model.qwen.lm_head.weight, LazyStateDict(theirs)["lm_head.weight"])
    assert not torch.equal(model.qwen.lm_head.weight, model.language.embed_tokens.weight)


def check_processors(exported: Path, parts, image: Path) -> None:
    """transformers makes the pixels that we make, by the files of an exported folder; everybody may read these."""
    processor = AutoImageProcessor.from_pretrained(exported)
    with Image.open(image) as opened:
        theirs, ours = processor(images=[opened]), parts.processor.transforms[VISION_TOWER](opened)
    assert np.array_equal(theirs["pixel_values"], ours.pixels)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        written = json.loads((exported / file).read_text())
        classes = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
        assert written["processor_class"] == classes[parts.config.model.family]
    if find_spec("torchvision"):
        assert AutoProcessor.from_pretrained(exported).video_processor.patch_size == processor.patch_size
    (exported.parent / "plain.txt").touch()
    modes = {path.stat().st_mode for path in exported.rglob("*") if path.is_file()}
    assert modes == {(exported.parent / "plain.txt").stat().st_mode}


@pytest.mark.parametrize("family", FAMILIES)
def test_qwen_format_is_transformers_own(saved, tmp_path, folder, family):
    parts, ours = saved("encoder=[]", *FAMILIES[family])
    written = export(Export(str(ours), str(tmp_path / "qwen"), "qwen"))
    check_processors(written, parts, folder.root / "3.png")
    plain = AutoModelForImageTextToText.from_pretrained(written)
    mine = parts.model.qwen.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in plain.state_dict().items())
    assert plain.state_dict().keys() == mine.keys()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_adapters_are_merged_on_the_way_out(saved, tmp_path, folder, family):
    """A plain Qwen folder of a model with LoRA predicts what the model with its adapters predicts."""
    pytest.importorskip("peft")
    parts, ours = saved("encoder=[]", *FAMILIES[family], "model.lora.rank=4", "model.lora.alpha=8")
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_weights(ours, parts)
    plain = export(Export(str(ours), str(tmp_path / "qwen"), "qwen"))
    other = build_model(compose_config("encoder=[]", *FAMILIES[family], f"model.path={plain}"))
    batch = collate(samples_of(parts, folder, [conversation("0.png")]))
    with torch.no_grad():
        theirs, mine = other.model(batch).nll, parts.model.eval()(batch).nll
    assert torch.allclose(theirs, mine, atol=1e-5)
    assert not torch.allclose(theirs, vpt.load(saved_plain(tmp_path, parts), device="cpu").model(batch).nll, atol=1e-3)


def saved_plain(tmp_path: Path, parts) -> Path:
    """The same model without what its adapters add."""
    folder = tmp_path / "plain"
    folder.mkdir()
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    save_weights(folder, parts)
    return folder


def test_export_says_what_to_type(saved, tmp_path):
    _, folder = saved(EVERY)
    for arguments, message in {
        ("checkpoint=x", "to=y", "fromat=qwen"): "did you mean format",
        ("checkpoint=x",): "to is missing; type vpt export",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse(list(arguments))
    with pytest.raises(ConfigError, match="re-encoders dino, sam, clip have no place"):
        export(Export(str(folder), str(tmp_path / "qwen"), "qwen"))
    assert not list(tmp_path.glob("*qwen*"))
    with pytest.raises(ConfigError, match="exists already"):
        export(Export(str(folder), str(folder)))
    for typed, message in {"upstraem": "did you mean upstream", "released": "is now format=upstream"}.items():
        with pytest.raises(ConfigError, match=message):
            export(Export(str(folder), str(tmp_path / "x"), typed))


def test_qwen_2_5_has_no_upstream_format(saved, tmp_path):
    _, folder = saved("encoder=[dino]", "model=tiny_2_5")
    with pytest.raises(ConfigError, match="Qwen2-VL only"):
        export(Export(str(folder), str(tmp_path / "x"), "upstream"))
