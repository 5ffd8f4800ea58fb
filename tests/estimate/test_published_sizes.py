"""The memory that is estimated of the published sizes, beside that of a real step on tensors that hold nothing."""

import pytest
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.live_tensors import PeakBytes
from vpt.checkpoint.initialize import materialize
from vpt.cli.estimate import compose_description
from vpt.distributed.strategy import FSDP, Strategy
from vpt.estimate.activations import DTypeBytes
from vpt.estimate.gpus import sharding_plan
from vpt.estimate.memory import predict_memory
from vpt.estimate.settings import EstimateConfig, build_on_meta
from vpt.estimate.typical_samples import typical_samples
from vpt.estimate.workload import workload_of
from vpt.flops import FlopMeter
from vpt.models.vpt import VPTModel

LORA = "model.lora.rank=16 training.precision=bf16"
FULL_SIZE = [
    ("dino", "model=qwen2_vl_2b training.precision=fp32"),
    ("dino", "model=qwen2_vl_2b training.precision=bf16"),
    ("dino", f"model=qwen2_vl_2b {LORA}"),
    ("dino", f"model=qwen2_vl_2b {LORA} model.frozen_dtype=bfloat16"),
    ("region", "model=qwen2_5_vl_3b training.precision=bf16"),
    ("sam", f"model=qwen2_5_vl_3b {LORA} model.frozen_dtype=bfloat16 model.activation_checkpointing=true"),
    ("dino", "model=qwen2_vl_2b training.precision=bf16 strategy=fsdp gpus=2"),
    ("dino", f"model=qwen2_5_vl_3b {LORA} model.frozen_dtype=bfloat16 strategy=fsdp gpus=8"),
]


@pytest.fixture
def process_group():
    """Starts a group of so many processes, of which this is the only one; the others' tensors hold nothing either."""

    def start(size: int) -> None:
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)

    yield start
    if distributed.is_initialized():
        distributed.destroy_process_group()


def strategy_of(config: EstimateConfig, model: VPTModel) -> Strategy:
    """The strategy of a run, its weights not there yet."""
    if config.strategy.kind != "fsdp":
        return Strategy(model, torch.device("meta"))
    mesh = init_device_mesh("cpu", (config.gpus,))
    return FSDP(model, mesh, precision=config.training.precision, reshard_after_forward=True, cpu_offload=False)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "keys"), FULL_SIZE, ids=[f"{kind} {keys}" for kind, keys in FULL_SIZE])
def test_a_step_at_full_size(kind, keys, process_group):
    """Peak of two micro-batches of an image of 512x384, moments apart, within 10 %."""
    config = compose_description(
        [f"+experiment={kind}", "masking=none", f"assume.actions={{none:0,{kind}:1}}", *keys.split()]
    )
    bundle = build_on_meta(config)
    autocast, [sample] = config.training.precision == "bf16", typical_samples(config, bundle.processor)
    types = DTypeBytes.of(bundle.model, autocast=autocast, packed=False)
    load = workload_of(FlopMeter(bundle.model), [sample], 1)
    expected = predict_memory(bundle.model, load, sharding_plan(config, bundle.model), types)
    process_group(config.gpus)
    strategy = strategy_of(config, bundle.model)
    with FakeTensorMode(allow_non_fake_inputs=True), PeakBytes(pixels_of(sample)) as peak:
        materialize(bundle.model, "cpu")
        there = 0 if config.strategy.kind == "fsdp" else add_gradients_up(bundle.model)
        for _ in range(2):
            with strategy.grad_sync(last=True), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                strategy(sample.batch).loss_sum.backward()
    assert peak.bytes + there == pytest.approx(expected.total - expected.optimizer, rel=0.1)


def add_gradients_up(model: VPTModel) -> int:
    """Take each gradient away as soon as it has come, as if it had been added to one that was there; their bytes.

    Fake ones would be added to a third tensor, where real ones are added in place.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
    return sum(parameter.nbytes for parameter in trained)


def pixels_of(sample) -> list[torch.Tensor]:
    """What an encoder is given; it is no part of the estimate."""
    return [images.pixels for images in sample.batch.images.values()]
