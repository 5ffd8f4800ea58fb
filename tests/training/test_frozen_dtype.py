"""`model.frozen_dtype=bfloat16`: the same run to the last bit, with frozen matrices in half the memory."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import compose_config, losses
from helpers.served import ask, serving
from helpers.weight_folders import write_base
from vpt.checkpoint.load import build_model, load_pretrained
from vpt.cli.train import train
from vpt.config.schema import TrainConfig
from vpt.distributed.process_group import World, init_process_group
from vpt.errors import ConfigError
from vpt.generation.pipeline import Pipeline
from vpt.training.trainer import Trainer

HALF = "model.frozen_dtype=bfloat16"
LORA = "model.lora.rank=2"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model in float32 that bfloat16 does not hold exactly."""
    torch.manual_seed(3)
    return write_base(build_model(compose_config("encoder=[]")), tmp_path_factory.mktemp("base"))


def settings(base: Path, *overrides: str) -> TrainConfig:
    return compose_config(
        "+experiment=all", "model=qwen2_vl_2b", f"model.path={base}", "model.size=tiny", "+debug=two_steps",
        "training.precision=bf16", "training.batch_size=4", "data.limit=4", "optim.freeze=['encoders.*.vision.*']",
        "training.steps=3", "training.checkpoint_every=2", *overrides,
    )  # fmt: skip


def run(config: TrainConfig, folder: Path, world: World | None = None) -> Trainer:
    trainer = Trainer(config, folder, world)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("kind", ["single", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_nothing_changes_but_the_memory(base, tmp_path, kind):
    """With every kind of perception, adapters, frozen towers; sharded, too."""
    with init_process_group(device="cpu", always=True) as world:
        trainers = [
            run(settings(base, LORA, f"strategy={kind}", *half), tmp_path / str(len(half)), world)
            for half in ([], [HALF])
        ]
        whole, halved = trainers
        assert losses(whole.folder) == losses(halved.folder) and len(losses(whole.folder)) == 3
        trained = [{n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in trainers]
        assert all(torch.equal(parameter, trained[1][name]) for name, parameter in trained[0].items())
        for module in halved.model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                product = (
                    isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and module is not halved.model.qwen.lm_head
                )
                half = product and not tensor.requires_grad
                assert tensor.dtype == (torch.bfloat16 if half else torch.float32), name
        weights = [sum(parameter.nbytes for parameter in trainer.model.parameters()) for trainer in trainers]
        assert weights[1] < 0.7 * weights[0]
        stored = load_pretrained(halved.folder, exact=True)
        assert {parameter.dtype for parameter in stored.model.parameters()} == {torch.float32}
        del trainers, whole, halved, trained, module, tensor


def test_answers_are_computed_as_in_training(base, tmp_path):
    """A model that answers holds its matrices in half the memory: alone, served, in maps of f·c and scores."""
    config = settings(base, LORA, HALF, "training.steps=1", "training.checkpoint_every=1")
    run(config, tmp_path / "run")
    held, exact = load_pretrained(tmp_path / "run"), load_pretrained(tmp_path / "run", exact=True)
    weights = [sum(parameter.nbytes for parameter in bundle.model.parameters()) for bundle in (held, exact)]
    assert weights[0] < 0.7 * weights[1]
    image, found = tmp_path / "image.png", []
    Image.effect_noise((64, 48), 60).convert("RGB").save(image)
    for bundle in (held, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=bundle is exact):
            for action in ("region", "dino", "sam", "clip"):
                reply = Pipeline(**vars(bundle)).ask(image, "what is it?", action=action, max_new_tokens=6)
                maps = [None if seen is None else seen.values.tolist() for seen in reply.maps()]
                found.append((reply.answer.ids, reply.answer.confidence, maps))
    assert found[:4] == found[4:]
    with serving(held) as service:
        reply = Pipeline(**vars(held)).ask(image, "what is it?", action="dino", max_new_tokens=6)
        served = ask(service, image, "what is it?", max_tokens=6, action="dino")
        assert served.choices[0].message.content == str(reply)


@pytest.mark.slow
def test_a_run_goes_on_as_it_was(base, tmp_path):
    """Also with copies of frozen weights in its checkpoints."""
    for name, keep in (("named", "false"), ("copied", "true")):
        config = settings(base, LORA, HALF, f"training.save_frozen_weights={keep}")
        whole = run(config, tmp_path / f"{name}_whole")
        stopped = Trainer(config, tmp_path / name)
        step = stopped.train_step

        def told(batches, number, stopped=stopped, step=step):
            stopped.preemption.code = 75 if number == 1 else 0
            return step(batches, number)

        stopped.train_step = told
        with pytest.raises(SystemExit):
            stopped.fit()
        again = run(config, tmp_path / name)
        assert losses(again.folder) == losses(whole.folder)
        ours, theirs = again.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(tensor, theirs[n]) and tensor.dtype == theirs[n].dtype for n, tensor in ours.items())


def test_products_must_be_rounded():
    with pytest.raises(ConfigError, match=r"type training\.precision=bf16 with it"):
        compose_config(HALF)


def test_a_run_answers_at_its_end(base, tmp_path):
    """Through the whole of train.py, with features of frozen encoders kept between training and answers."""
    config = settings(base, HALF, "training.steps=1", "training.final_eval_questions=2", "pictures=false", "data=easy_vqa",
                      f"data.feature_cache={tmp_path}/features")  # fmt: skip
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["questions"] == 2
