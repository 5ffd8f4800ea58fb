"""The weights that are installed: of the sizes in conf/, complete, small, and able to do what their cards say."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from conftest import ROOT, compose_config
from vpt.checkpoint.format import find_checkpoint
from vpt.checkpoint.load import build_model
from vpt.checkpoint.resume import check_same_config
from vpt.cli.pretrain import RECIPES
from vpt.config.weight_folder import ASSETS
from vpt.data.build import build_sources
from vpt.data.collate import collate
from vpt.data.loader import encode_samples
from vpt.data.sources.scene_cells import COLUMNS, ROWS
from vpt.errors import CheckpointError
from vpt.pretraining.labels import DIGITS

ENCODERS = [name for name in RECIPES if (ROOT / "conf" / "encoder" / f"{name}.yaml").is_file()]


def test_there_is_one_for_each_recipe_and_all_are_small():
    assert {folder.name for folder in ASSETS.iterdir()} == {*RECIPES}
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= 8 * 2**20


@pytest.mark.parametrize("name", RECIPES)
def test_a_card_tells_how_many_parameters_there_are(name):
    stored = load_file(ASSETS / name / "model.safetensors")
    told = re.search(r"- ([\d,]+) parameters", (ASSETS / name / "README.md").read_text())[1]
    assert sum(tensor.numel() for tensor in stored.values()) == int(told.replace(",", ""))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_begins_with_the_weights_that_transformers_reads(name):
    vision = build_model(compose_config("model=small", f"encoder=[{name}]")).model.encoder(name).vision
    theirs = AutoModel.from_pretrained(ASSETS / name, dtype=torch.float32).state_dict()
    assert all(torch.equal(own, theirs[key]) for key, own in vision.state_dict().items())


@pytest.mark.parametrize(("source", "words"), [("whole", DIGITS), ("glance", (*COLUMNS, *ROWS))])
def test_the_base_picks_one_thing_out_of_many_tokens(source, words):
    """Digits out of 256 tokens of a whole scene, places of frames out of 64 tokens of a first look."""
    config = compose_config("model=small", "encoder=[]", "model.region_bins=0", "data=lessons")
    bundle = build_model(config)
    sources, media = build_sources({source: config.data.test[source]}, config, split="test")
    samples, _ = encode_samples([(sources[0], index, media[0]) for index in range(6)], bundle.processor, "raise")
    with torch.no_grad():
        output = bundle.model.eval()(collate(samples))
    asked = set(bundle.tokenizer.convert_tokens_to_ids([*words]))
    read = [bool(right) for target, right in zip(output.targets.tolist(), output.correct) if target in asked]
    assert len(read) > 15 and sum(read) / len(read) > 0.75  # by chance 0.1, by reading any frame 0.3


def test_a_run_goes_on_where_the_package_lies_elsewhere_but_not_with_another_encoder(trained_run):
    found, config = find_checkpoint(trained_run), compose_config("+experiment=all", "+debug=two_steps")
    sizes = config.encoder["dino"].sizes
    sizes["small"].weights = "/elsewhere/dino"
    check_same_config(found, config)
    sizes["tiny"].config["hidden_size"] = 32
    with pytest.raises(CheckpointError, match="hidden_size: 64 -> 32"):
        check_same_config(found, config)
