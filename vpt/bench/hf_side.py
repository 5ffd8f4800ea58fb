"""Hugging Face's Trainer and a stock Qwen2-VL on the rows of a run: `python -m vpt.bench.hf_side RUN KEY=VALUE...`.

The keys are those of `train.py`. Rows come in its order and with its tokens, padded by a collator on the right, as is
common; adapters are peft's. Each step is a line of RUN/steps.jsonl.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vpt.checkpoint.load import build_new
from vpt.config.overrides import compose_train
from vpt.config.schema import TrainConfig
from vpt.data.build import build_dataset
from vpt.perception.batch import IGNORE_INDEX, VISION_TOWER
from vpt.utils.threads import set_threads

Item = dict[str, torch.Tensor]


class Rows(Dataset[Item]):
    """The rows of a run in its order, one by one, as transformers' class takes them."""

    def __init__(self, config: TrainConfig) -> None:
        config.training.batch_size = config.training.micro_batch_size = 1
        bundle, _ = build_new(config)  # its processor; the model stays on the meta device
        self.image_pad = bundle.model.vocabulary.image_pad
        self._rows = build_dataset(config, bundle.processor, rank=0, world_size=1)
        self._count = config.training.steps

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Item:
        [row] = self._rows[number]
        images = row.images[VISION_TOWER]
        return {
            "input_ids": row.input_ids, "labels": row.labels, "pixel_values": images.pixels,
            "image_grid_thw": torch.tensor(images.grids), "mm_token_type_ids": (row.input_ids == self.image_pad).int(),
        }  # fmt: skip


def padded(items: list[Item]) -> Item:
    """Rows filled up to the longest; images one after the other."""
    filled = {
        key: pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)
        for key, value in (("input_ids", 0), ("labels", IGNORE_INDEX), ("mm_token_type_ids", 0))
    }
    lengths = [torch.ones_like(item["input_ids"]) for item in items]
    images = {key: torch.cat([item[key] for item in items]) for key in ("pixel_values", "image_grid_thw")}
    return {**filled, **images, "attention_mask": pad_sequence(lengths, batch_first=True)}


class InOrder(Trainer):
    """Rows come as they are."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        assert self.train_dataset is not None
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class StepLog(TrainerCallback):
    """A line of each step: its number and loss."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "train/loss": logs["loss"]}) + "\n")


def main() -> None:
    """Train from the last checkpoint of RUN, or from the start."""
    run, config = Path(sys.argv[1]), compose_train(sys.argv[2:])
    set_threads(config.threads)
    training, optim, rank = config.training, config.optim, config.model.lora.rank
    steps, size = training.steps, training.batch_size
    model: Any = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    if rank:
        targets = r".*language_model\.layers\..*_proj"  # every linear layer, as `model.lora.targets` begins
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=int(config.model.lora.alpha), target_modules=targets)
        )
    training.steps = steps * size
    arguments = TrainingArguments(
        output_dir=str(run), max_steps=steps, per_device_train_batch_size=size, learning_rate=optim.lr,
        weight_decay=0.0, save_steps=training.checkpoint_every, logging_steps=1, logging_nan_inf_filter=False,
        use_cpu=True, report_to=[],
        dataloader_num_workers=config.data.workers, remove_unused_columns=False, disable_tqdm=True, warmup_steps=0,
    )  # fmt: skip
    trainer = InOrder(
        model, arguments, data_collator=padded, train_dataset=Rows(config), callbacks=[StepLog(run / "steps.jsonl")]
    )
    found = get_last_checkpoint(str(run)) if run.is_dir() else None
    run.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=found)


if __name__ == "__main__":
    main()
