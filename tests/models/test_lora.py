"""LoRA: what is trained, what a checkpoint holds, starting from and merging."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import compose_config, losses, samples_of
from helpers.multiprocess import on_ranks
from vpt.checkpoint.format import find_checkpoint
from vpt.checkpoint.load import load_pretrained
from vpt.checkpoint.tensors import unique_state_dict
from vpt.config import validate
from vpt.config.schema import LoraConfig
from vpt.data.collate import collate
from vpt.distributed.dtensor import full_tensor
from vpt.distributed.process_group import World
from vpt.errors import ConfigError
from vpt.models.lora import merged
from vpt.training.optimizer import set_trainable
from vpt.training.seed import seed_step
from vpt.training.trainer import Trainer

ENCODERS = "encoder=[dino,sam,clip]"
LORA = ("model.lora.rank=4", "model.lora.alpha=8")
SMALL = ("+debug=two_steps", "+experiment=all", "tracking=none", "data.limit=4")
UNTIED = "++model.config.tie_word_embeddings=false"


def stir(model: torch.nn.Module) -> None:
    """Adapters begin at zero; give them something to say."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def logits(parts, folder) -> torch.Tensor:
    with torch.no_grad():
        return parts.model.eval()(collate(samples_of(parts, folder)), keep_logits=True).logits


def test_adapters_begin_at_nothing_and_merge_into_what_they_compute(make_parts, folder):
    plain, adapted = make_parts(ENCODERS), make_parts(ENCODERS, *LORA)
    base = {name: t for name, t in adapted.model.state_dict().items() if "lora" not in name}
    assert {name.replace(".base_layer", "") for name in base} == plain.model.state_dict().keys()
    plain.model.load_state_dict(merged(adapted.model.state_dict(), LoraConfig(rank=4, alpha=8)))
    assert torch.equal(logits(plain, folder), logits(adapted, folder))
    stir(adapted.model)
    assert not torch.allclose(logits(plain, folder), logits(adapted, folder), atol=1e-2)
    plain.model.load_state_dict(merged(adapted.model.state_dict(), LoraConfig(rank=4, alpha=8)))
    torch.testing.assert_close(logits(plain, folder), logits(adapted, folder), rtol=1e-4, atol=1e-4)


def test_shared_equals_full(make_parts, folder):
    losses = []
    for inner in ("shared", "full"):
        parts = make_parts(ENCODERS, *LORA, f"model.inner_forward={inner}")
        stir(parts.model)
        loss = parts.model(collate(samples_of(parts, folder))).loss_sum
        loss.backward()
        layer = parts.model.language.layers[0].self_attn.q_proj.lora_A.default
        losses.append((loss.item(), layer.weight.grad))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-5 * losses[0][1].abs().max().item())


@pytest.mark.parametrize("untied", [False, True])
def test_what_is_trained_is_what_was_published(make_parts, untied):
    """Adapters on every linear layer, the projector, lm_head and the token embedding; nothing else."""
    parts = make_parts("encoder=[clip]", *LORA, *([UNTIED] if untied else []))
    set_trainable(parts.model, compose_config().optim, tower_pretrained=True)
    trained = {name for name, parameter in parts.model.named_parameters() if parameter.requires_grad}
    condition = [f"encoders.clip.projector.*_condition.{kind}" for kind in ("weight", "bias")]
    published = ["*.lora_?.default.weight", "*.embed_tokens.weight", "qwen.lm_head.weight", *condition]
    assert all(any(fnmatchcase(name, pattern) for pattern in published) for name in trained)
    layers = parts.model.language.config.num_hidden_layers
    assert sum(".lora_A." in name for name in trained) == layers * 7  # q, k, v, o, gate, up, down
    assert ("qwen.lm_head.weight" in trained) == untied


def run(folder, *overrides: str, until: int | None = None, world: World | None = None) -> Trainer:
    config = compose_config(*SMALL, "training.steps=4", "training.checkpoint_every=2", *overrides)
    trainer = Trainer(config, folder, world)
    if until is not None:
        step = trainer.train_step

        def stopping(batches, number):
            if number == until:
                raise KeyError("dropped")
            return step(batches, number)

        trainer.train_step = stopping
        with pytest.raises(KeyError, match="dropped"):
            trainer.fit()
    else:
        trainer.fit()
    return trainer


def test_a_dropped_run_goes_on_to_the_last_bit(tmp_path):
    lora = (*LORA, "model.lora.dropout=0.2")
    before = {
        n: t.clone() for n, t in Trainer(compose_config(*SMALL, *lora), tmp_path / "x").model.state_dict().items()
    }
    whole = run(tmp_path / "whole", *lora)
    run(tmp_path / "dropped", *lora, until=3)
    again = run(tmp_path / "dropped", *lora)
    assert losses(whole.folder) == losses(again.folder)
    after = whole.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in again.model.state_dict().items())
    for name, tensor in after.items():
        if "language_model.layers" in name:
            assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
    saved = load_file(find_checkpoint(whole.folder) / "model.safetensors")
    assert saved.keys() == after.keys() - {"qwen.lm_head.weight"}  # tied: once
    parts = load_pretrained(whole.folder)
    assert all(torch.equal(after[name], tensor) for name, tensor in parts.model.state_dict().items())


def dropped_and_whole(world: World, to: str, strategy: str) -> list[list[float]]:
    """Losses of a run of two processes with dropout, dropped in its fourth step and gone on with, and of a whole one."""
    drawing = (*LORA, "model.lora.dropout=0.2", "training.eval_every=1", f"strategy={strategy}")
    run(Path(to) / "dropped", *drawing, until=3, world=world)
    torch.manual_seed(world.rank)  # whoever goes on has another past
    runs = [run(Path(to) / name, *drawing, world=world) for name in ("dropped", "whole")]
    ours, whole = (unique_state_dict(trainer.model) for trainer in runs)
    assert all(torch.equal(full_tensor(tensor), full_tensor(whole[name])) for name, tensor in ours.items())
    return [losses(trainer.folder) for trainer in runs]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_go_on_with_the_dropout_of_each(tmp_path, strategy):
    found = on_ranks(2, dropped_and_whole, str(tmp_path), strategy, folder=tmp_path)
    assert all(dropped == whole and len(whole) == 4 for dropped, whole in found)


def test_what_a_step_draws_is_its_own():
    """Whatever was drawn before: a function of seed, step and rank, and of each of them."""

    def drawn(*key: int) -> float:
        seed_step(*key)
        return torch.rand(()).item()

    keys = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    first = [drawn(*key) for key in keys]
    assert len(set(first)) == len(keys) and [drawn(*key) for key in reversed(keys)] == first[::-1]


def test_starting_from_each_other(tmp_path):
    plain = run(tmp_path / "plain", "training.steps=1")
    adapted = Trainer(compose_config(*SMALL, *LORA, f"init_from={tmp_path / 'plain'}"), tmp_path / "adapted")
    weight = "qwen.model.language_model.layers.1.mlp.up_proj"
    given, taken = plain.model.state_dict(), adapted.model.state_dict()
    assert torch.equal(given[f"{weight}.weight"], taken[f"{weight}.base_layer.weight"])
    stir(adapted.model)
    adapted.save()
    adapted.saver.wait()
    back = Trainer(compose_config(*SMALL, f"init_from={tmp_path / 'adapted'}"), tmp_path / "back")
    want = merged(adapted.model.state_dict(), adapted.config.model.lora)
    assert not torch.equal(want[f"{weight}.weight"], given[f"{weight}.weight"])
    assert all(torch.equal(want[name], tensor) for name, tensor in back.model.state_dict().items())


def test_targets_and_what_is_missing(make_parts, monkeypatch):
    parts = make_parts("encoder=[]", *LORA, "model.lora.targets=['*.q_proj','layers.0.mlp.*']")
    names = [name for name, _ in parts.model.named_parameters() if "lora_A" in name]
    assert len(names) == parts.model.language.config.num_hidden_layers + 3
    with pytest.raises(ConfigError, match=r"'\*.q_prj' matches no layer"):
        make_parts("encoder=[]", *LORA, "model.lora.targets=['*.q_prj']")
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install peft"):
        compose_config(*LORA)
