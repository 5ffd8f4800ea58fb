"""The table of `vpt estimate --smallest-gpu`: what one GPU must have for each published model and way of training."""

from collections.abc import Callable, Iterator, Sequence

from vpt.estimate.gpus import GIGA
from vpt.estimate.report import FULL, Report
from vpt.estimate.settings import EstimateConfig, build_on_meta
from vpt.utils.table import Table

MODELS = {"2B": "qwen2_vl_2b", "3B": "qwen2_5_vl_3b", "7B": "qwen2_vl_7b"}
ENCODERS = ("dino", "sam", "clip")
_ALWAYS = (
    "training.precision=bf16", "model.activation_checkpointing=true", "training.micro_batch_size=1",
    "assume.image=[512,512]", "data.image.max_side=512",
)  # fmt: skip
_LORA = ("model.lora.rank=16", "model.frozen_dtype=bfloat16")
METHODS = {"full": (), "LoRA": _LORA, "QLoRA": (*_LORA, "model.load_in_4bit=true", "optim.name=adamw_8bit")}
MEMORY = {12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090", 48: "L40S", 80: "A100, H100", 141: "H200"}


def smallest_gpu_table(compose: Callable[[list[str]], EstimateConfig], overrides: Sequence[str]) -> Iterator[str]:
    """Lines of the table; every run is composed of its own keys and `overrides`."""
    yield f"the smallest GPU that holds a run of one process: {' '.join([*_ALWAYS, *overrides])}"
    for method, keys in METHODS.items():
        yield f"  {method}: {' '.join(keys) or 'every weight is trained but pretrained towers'}"
    rows = []
    for size, model in MODELS.items():
        for method, keys in METHODS.items():
            needed = [
                _needed(compose([f"+experiment={encoder}", f"model={model}", *_ALWAYS, *keys, *overrides]))
                for encoder in ENCODERS
            ]
            rows.append([size, method, *(total / GIGA for total in needed), smallest_gpu(max(needed))])
    columns = [f"{name}, 10^9 bytes" for name in ENCODERS]
    yield Table(["model", "training", *columns, "smallest GPU"], rows, dict.fromkeys(columns, ".1f")).as_text()


def smallest_gpu(needed: float) -> str:
    """The GPU with the least memory that has `needed` bytes, some of it left over."""
    return next(
        (f"{memory} ({name})" for memory, name in MEMORY.items() if needed < FULL * memory * GIGA),
        "several, strategy=fsdp",
    )


def _needed(config: EstimateConfig) -> float:
    return Report(config, build_on_meta(config)).predicted_memory().total
