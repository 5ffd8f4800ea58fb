"""`model.load_in_4bit`: products of 4 bits, runs that go on to the last bit, and models that compute what was trained."""

from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import compose_config, losses
from helpers.multiprocess import on_ranks
from helpers.stopped import fit_until
from helpers.weight_folders import write_base
from vpt.checkpoint.export import Export, export
from vpt.checkpoint.load import build_model, load_pretrained
from vpt.config.schema import TrainConfig
from vpt.distributed.process_group import World, init_process_group
from vpt.errors import CheckpointError, ConfigError
from vpt.models.lora import merged
from vpt.models.quantization import BYTES, Linear4bit, _dequantize, _quantize
from vpt.training.setup import build_training
from vpt.training.trainer import Trainer

pytest.importorskip("bitsandbytes")

LORA, FOUR = "model.lora.rank=2", "model.load_in_4bit=true"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    return write_base(build_model(compose_config("encoder=[]")), tmp_path_factory.mktemp("base"))


def settings(base: Path, *overrides: str) -> TrainConfig:
    return compose_config(
        "+experiment=dino", "model=qwen2_vl_2b", f"model.path={base}", "model.size=tiny", "+debug=two_steps", LORA,
        "training.batch_size=4", "data.limit=4", *overrides,
    )  # fmt: skip


def fit(config: TrainConfig, folder: Path, *, stop: int = 0) -> Trainer:
    return fit_until(Trainer(config, folder), stop)


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory) -> Trainer:
    """A run of two steps, for tests that change nothing in it."""
    return fit(settings(base, FOUR), tmp_path_factory.mktemp("run") / "four")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_what_the_bits_stand_for(dtype, autocast):
    torch.manual_seed(0)
    linear = nn.Linear(192, 384).to(dtype).requires_grad_(False)
    layer, x = Linear4bit(linear.weight, linear.bias), torch.randn(2, 5, 192, requires_grad=True)
    assert layer.packed.nbytes + layer.scales.absmax.nbytes == BYTES * linear.weight.numel()
    weight = layer.weight
    assert torch.equal(weight, _dequantize(*_quantize(weight))) and not torch.equal(weight, linear.weight)
    assert (weight - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = layer(x)
        theirs = nn.functional.linear(x, weight.float(), linear.bias.float())
    grad = torch.randn_like(ours)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, theirs)))


def test_what_is_loaded_computes_what_was_trained(quantized, base, tmp_path):
    """Also once it is exported, and merged; beside a base in full, it would not."""
    loaded = load_pretrained(quantized.folder)
    full = Trainer(settings(base), tmp_path / "full")
    ours = next(iter(quantized.objective.batches(0)))[0]
    with torch.no_grad():
        trained, answering = (model.eval()(ours).nll for model in (quantized.model, loaded.model))
        assert torch.equal(trained, answering)
        whole = load_pretrained(export(Export(str(quantized.folder), str(tmp_path / "whole"))))
        assert torch.equal(whole.model.eval()(ours).nll, trained) and not whole.config.model.load_in_4bit
        plain = build_model(
            compose_config("encoder=[dino]", f"model.path={base}", "model=qwen2_vl_2b", "model.size=tiny")
        )
        plain.model.load_state_dict(merged(loaded.model.state_dict(), loaded.config.model.lora))
        torch.testing.assert_close(plain.model.eval()(ours).nll, trained, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(full.model.eval()(ours).nll, trained, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "half", [[], ["training.precision=bf16", "model.frozen_dtype=bfloat16", "optim.name=adamw_8bit"]]
)
def test_a_stopped_run_goes_on_to_the_last_bit(base, tmp_path, half):
    config = settings(base, FOUR, "training.steps=3", *half)
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "stopped", stop=2)
    again = fit(config, tmp_path / "stopped")
    assert losses(again.folder) == losses(whole.folder)
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any(isinstance(module, Linear4bit) for module in again.model.modules())


def test_what_cannot_be_is_told():
    for overrides, message in (
        ([FOUR], r"cannot train the base itself; type model\.lora\.rank=16"),
        ([FOUR, LORA], r"type model\.path=FOLDER and training\.save_frozen_weights=false"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_config(*overrides)


@pytest.mark.slow
def test_what_cannot_be_trained_is_told(quantized, base, tmp_path):
    with init_process_group(device="cpu", always=True) as world, pytest.raises(ConfigError, match=r"type strategy=ddp"):
        build_training(settings(base, FOUR, "strategy=fsdp"), None, world, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"optim\.unfreeze trains .*base_layer\.weight"):
        Trainer(settings(base, FOUR, "optim.unfreeze=['*q_proj.base_layer.weight']"), tmp_path / "unfrozen")
    with pytest.raises(ConfigError, match=r"no folder holds .*type vpt export"):
        Trainer(compose_config("encoder=[dino]", "model=small", LORA, FOUR, "+debug=two_steps"), tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"type model\.load_in_4bit=true, or vpt export"):
        Trainer(settings(base, f"init_from={quantized.folder}"), tmp_path / "next")
    Trainer(settings(base, FOUR, f"init_from={quantized.folder}"), tmp_path / "next")


def in_two(world: World, base: str, to: str) -> list[float]:
    trainer = Trainer(settings(Path(base), FOUR, "strategy=ddp", "training.steps=3"), Path(to), world)
    trainer.fit()
    assert any(isinstance(module, Linear4bit) for module in trainer.model.modules())
    return losses(trainer.folder)


@pytest.mark.slow
def test_two_processes_train_beside_the_same_bits(base, tmp_path):
    alone = fit(settings(base, FOUR, "training.steps=3"), tmp_path / "alone")
    [shown, _] = on_ranks(2, in_two, str(base), str(tmp_path / "two"), folder=tmp_path)
    assert shown == pytest.approx(losses(alone.folder), rel=1e-5) and len(shown) == 3
    assert load_pretrained(tmp_path / "two").model is not None
