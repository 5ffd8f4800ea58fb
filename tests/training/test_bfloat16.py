"""`model.dtype=bfloat16`: what must stay float32 does, runs go on as they were, and what little is trained is told."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import compose_config, losses
from helpers.weight_folders import write_base
from vpt.checkpoint.format import save_weights
from vpt.checkpoint.load import build_model, load_pretrained
from vpt.distributed.process_group import init_process_group
from vpt.models.vpt import VPTModel
from vpt.training.optimizer import parameter_table
from vpt.training.setup import build_training
from vpt.training.trainer import Trainer

HALF = "model.dtype=bfloat16"


def frequencies(model: VPTModel) -> dict[str, Tensor]:
    """The buffers of a model that hold fractions."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize("family", [pytest.param("tiny_2_5", marks=pytest.mark.slow), "tiny_3"])
def test_frequencies_stay_float32_however_a_model_is_built(make_parts, tmp_path, family):
    """At random, from a folder of weights, from a checkpoint; in one process, copied and sharded."""
    overrides = [f"model={family}", "encoder=[siglip]"]
    expected = frequencies(make_parts(*overrides).model)
    assert len(expected) == 4
    config = compose_config(*overrides, HALF)
    parts = build_model(config)
    save_weights(tmp_path, parts)
    from_folder = compose_config(*overrides, HALF, f"model.path={write_base(parts, tmp_path / 'qwen')}")
    models = [parts.model, build_model(from_folder).model, load_pretrained(tmp_path, device="cpu").model]
    with init_process_group(device="cpu", always=True) as world:
        for kind in ("ddp", "fsdp"):
            config.strategy.kind = kind
            models += [build_training(config, found, world, torch.device("cpu"))[0].model for found in (None, tmp_path)]
    for model in models:
        found = frequencies(model)
        assert found.keys() == expected.keys()
        assert all(buffer.dtype == torch.float32 and torch.equal(buffer, expected[n]) for n, buffer in found.items())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_run_goes_on_as_it_was(tmp_path):
    """With every kind of perception; and it says that its weights are too coarse to be trained."""
    config = compose_config("+experiment=all", "+debug=two_steps", HALF, "training.steps=3", "training.eval_every=0")
    Trainer(config, tmp_path / "whole").fit()
    checkpoints = Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)) / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000003")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_00000002")
    Trainer(config, tmp_path / "resumed").fit()
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 3


def test_coarse_weights_that_are_trained_are_told(make_parts):
    advice = "type model.dtype=float32 training.precision=bf16"
    half, whole = make_parts("encoder=[]", HALF), make_parts("encoder=[]")
    assert advice in parameter_table(half.model) and advice not in parameter_table(whole.model)
    half.model.requires_grad_(False)
    assert advice not in parameter_table(half.model)
