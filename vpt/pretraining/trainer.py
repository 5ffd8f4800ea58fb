"""The loop in which a vision encoder learns to see. What a step is shown follows from the seed and its number, so a
run that was stopped goes on as if it had not been."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn
from tqdm import tqdm

from vpt.checkpoint.format import list_checkpoints
from vpt.checkpoint.saver import Saver
from vpt.checkpoint.tensors import unique_state_dict
from vpt.checkpoint.train_state import TrainState, optimizer_tensors, restore
from vpt.distributed.process_group import World
from vpt.errors import CheckpointError
from vpt.models.build import ModelBundle
from vpt.pretraining.patches import PatchModel
from vpt.pretraining.settings import PretrainConfig
from vpt.pretraining.views import View, Views
from vpt.training.optimizer import build_optimizer, lr_factor, set_lr
from vpt.utils.threads import set_threads

_CONFIG = "config.yaml"
_TEST = 1 << 32  # the number of the step whose views are those of the test


def pretrain_patches(
    config: PretrainConfig, folder: Path, build: Callable[[PretrainConfig], ModelBundle]
) -> tuple[ModelBundle, dict[str, float]]:
    """Train one part, or go on, until `training.steps` are done.

    Args:
        config: of the run.
        folder: its checkpoints come below it.
        build: makes the model that the part belongs to, with random weights.

    Returns:
        the model, and the accuracy of each head by kind of view ("whole/digit") on the test split.
    """
    print(f"  {set_threads(config.threads)}")
    torch.manual_seed(config.seed)
    bundle = build(config)
    model = PatchModel(bundle, config.patches.part)
    optimizer, state = build_optimizer(model, config.optim), TrainState()
    found = list_checkpoints(folder / "checkpoints")
    if found:
        _check_same(found[-1] / _CONFIG, config)
        state = restore(found[-1], model, optimizer)
    _fit(config, model, optimizer, state, Saver(folder / "checkpoints", World(), keep=1))
    return bundle, patch_accuracy(model, config)


def _fit(
    config: PretrainConfig, model: PatchModel, optimizer: torch.optim.Optimizer, state: TrainState, saver: Saver
) -> None:
    training, optim, views = config.training, config.optim, Views("train", seed=config.seed)
    bar = tqdm(total=training.steps, initial=state.step, unit="step", dynamic_ncols=True)
    with saver, bar:
        for step in range(state.step, training.steps):
            set_lr(
                optimizer, lr_factor(step, steps=training.steps, warmup=optim.warmup_ratio, final=optim.min_lr_ratio)
            )
            loss = model.loss(drawn(config, views, step, config.patches.views))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step = step + 1
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            if state.step % training.checkpoint_every == 0 or state.step == training.steps:
                tensors = {"model": unique_state_dict(model), "optimizer": optimizer_tensors(optimizer)}
                saver.save(tensors, state, lambda draft: OmegaConf.save(OmegaConf.structured(config), draft / _CONFIG))


def _check_same(file: Path, config: PretrainConfig) -> None:
    """Raise CheckpointError where a checkpoint is of another configuration; where and how fast it runs is free."""
    recorded: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(file)))
    free = {key: getattr(recorded, key) for key in ("output_dir", "threads", "tracking", "pictures")}
    now = replace(config, **free)
    if changed := [item.name for item in fields(now) if getattr(now, item.name) != getattr(recorded, item.name)]:
        raise CheckpointError(
            f"{file.parent} was trained with other values below {', '.join(changed)}; take the changes back to go on, "
            "or start anew with run_name=OTHER_NAME"
        )


def drawn(config: PretrainConfig, views: Views, step: int, counts: dict[str, int]) -> list[View]:
    """The views of a step, so many of each kind."""
    generator = np.random.default_rng((config.seed, step))
    return [views.draw(kind, generator) for kind, count in counts.items() for _ in range(count)]


def patch_accuracy(model: PatchModel, config: PretrainConfig) -> dict[str, float]:
    """Accuracy by kind of view and head on images of the test split."""
    views = Views("test", seed=config.seed)
    found: dict[str, float] = {}
    model.eval()
    for kind in config.patches.views:
        shown = drawn(config, views, _TEST, {kind: config.patches.test_images})
        found |= {f"{kind}/{head}": share for head, share in model.accuracy(shown).items()}
    return found
