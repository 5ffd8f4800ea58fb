"""A run that does not fit is told before anything is loaded, with keys that do make it fit."""

import re
from functools import cache

import pytest
import torch

from conftest import compose_config
from vpt.cli import train
from vpt.distributed.process_group import World
from vpt.errors import ConfigError
from vpt.estimate import fitting
from vpt.estimate.fitting import check_memory, needed_memory
from vpt.estimate.memory import Memory
from vpt.estimate.report import FULL

CPU = torch.device("cpu")
BIG = [  # of the published kind, with few layers
    "+experiment=baseline", "data=easy_vqa", "model=qwen2_vl_2b", "model.path=null", "training.precision=bf16",
    "++model.config.num_hidden_layers=2", "++model.config.vocab_size=2000", "++model.config.vision_config.depth=1",
]  # fmt: skip


@cache
def needed(*keys: str) -> Memory:
    """What a run of that kind needs with these keys."""
    return needed_memory(compose_config(*BIG, *keys), World(), CPU)


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes the machine says are free."""
    return lambda amount: monkeypatch.setattr(fitting, "available_memory", lambda device: amount)


def test_enough(free):
    free(1e12)
    assert check_memory(compose_config(*BIG), World(), CPU) is None
    free(1.0)
    assert check_memory(compose_config("+experiment=dino", "data=easy_vqa"), World(), CPU) is None  # a small one


def test_what_samples_need_is_a_warning(free):
    config = compose_config(*BIG)
    memory = needed()
    state = memory.weights + memory.gradients + memory.optimizer
    free((state + memory.total) / 2)
    said = check_memory(config, World(), CPU)
    assert said and f"weights {memory.weights / 1e9:.1f}" in said and "the run begins all the same" in said
    assert "training.micro_batch_size=1" in said
    with pytest.raises(ConfigError, match="are free on cpu"):
        check_memory(config, World(local_size=2), CPU)  # two processes share it


@pytest.mark.parametrize("share", [0.4, 0.3])
def test_the_keys_make_it_fit_and_none_is_idle(free, share):
    amount = share * needed().total
    free(amount)
    with pytest.raises(ConfigError) as caught:
        check_memory(compose_config(*BIG), World(), CPU)
    told = re.search(r"type ((?:[\w.]+=\S+ )+)\(([\d.]+)e9\)$", str(caught.value))
    assert told, caught.value
    keys = told[1].split()
    total = needed(*keys).total
    assert total < FULL * amount and f"{total / 1e9:.1f}" == told[2]
    for key in keys:
        fewer = [other for other in keys if other != key]
        assert needed(*fewer).total >= FULL * amount, key


def test_nothing_helps(free):
    free(1e7)
    with pytest.raises(ConfigError, match=r"with training\.\S+ .*it is \S+e9; take more GPUs \(strategy=fsdp\)"):
        check_memory(compose_config(*BIG), World(), CPU)


def test_a_run_ends_before_it_begins(free, tmp_path):
    free(1e9)
    with pytest.raises(ConfigError, match=r"moments \S+\), and 1\.0e9 are free"):
        train.train(compose_config(*BIG), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_many_gpus_is_counted_as_it_will_run(monkeypatch):
    """`auto` asks the GPUs that there are, and groups of `hybrid` are a node's processes."""
    node, gpu = World(size=12, local_size=4), torch.device("cuda")
    memory = {
        name: needed_memory(compose_config(*BIG, f"strategy={name}"), node, gpu) for name in ("ddp", "fsdp", "hybrid")
    }
    assert memory["fsdp"].total < memory["hybrid"].total < memory["ddp"].total
    for free, chosen in ((1e9, "fsdp"), (1e12, "ddp")):
        properties = type("Properties", (), {"total_memory": free})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert needed_memory(compose_config(*BIG), node, gpu) == memory[chosen]
