"""The keys of `vpt serve`."""

from dataclasses import dataclass, field
from typing import Any

from vpt.config.evaluation import WeightsPath
from vpt.config.fields import MISSING, bounded, choice


@dataclass
class ServeConfig:
    """Settings of `vpt serve`; `generation` overlays what the model was trained with."""

    checkpoint: str = MISSING  # as of eval.py
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0 is every one of this machine
    port: int = bounded(8000, high=65535)  # 0 takes a free one
    api_key: str | None = None  # what requests must carry; null: the environment's VPT_API_KEY, or nothing
    name: str | None = None  # of the model, as clients ask for it; null: the checkpoint's folder
    device: str = choice("auto", "cpu", "cuda")  # auto: cuda where there is one
    threads: int | None = bounded(None, low=1)  # of the model, on the CPU; null: all cores but one, which requests get
    max_rows: int = bounded(32, low=1)  # answers that are generated together
    max_queue: int = bounded(64)  # answers that wait; one more is refused with 429
    prefill_tokens: int = bounded(512, low=16)  # of prompts, in one decoding step
    max_tokens: int = bounded(1024, low=1)  # of an answer
    max_prompt_tokens: int | None = bounded(None, low=1)  # null: data.max_length, as trained
    max_choices: int = bounded(8, low=1)  # n of a request
    max_body_mb: float = bounded(32.0, low=0.001)  # of a request
    max_images: int = bounded(16)  # of a request
    max_pixels: int = bounded(40_000_000, low=1)  # of a request's images together, before they are decoded
    timeout: float = bounded(300.0, low=0.1)  # seconds of a request; then its answer is cut off
    body_timeout: float = bounded(30.0, low=0.1)  # seconds that a request may take to arrive
    image_hosts: list[str] = field(default_factory=list)  # hosts that images may be fetched from by https; none
    generation: dict[str, Any] = field(default_factory=dict)  # keys of GenerationConfig, in place of the trained ones
    model: WeightsPath = field(default_factory=WeightsPath)
    encoder: dict[str, WeightsPath] = field(default_factory=dict)
