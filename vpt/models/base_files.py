"""What the files beside a base model's weights say about images, videos and the end of an answer."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vpt.config.schema import TrainConfig
from vpt.config.weight_folder import read_settings
from vpt.errors import ConfigError
from vpt.models.families.base import Family

IMAGE_FILE, VIDEO_FILE, GENERATION_FILE = (
    "preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json",
)  # fmt: skip


def adopt_base_files(
    config: TrainConfig, family: Family, vision: Any, tokenizer: PreTrainedTokenizerBase, folder: Path | None
) -> None:
    """Fill in what `data.image`, `data.video` and `generation.stop` leave open: by the base's folder, else its family.

    Args:
        config: is changed, so that checkpoints record what was found.
        family, vision: of the base model; the configuration of its tower.
        tokenizer: of the model.
        folder: of the base model; None for a checkpoint, or where there is none.

    Raises:
        ConfigError: where the files belong to a tower with other patches.
    """
    image, video = read_settings(folder, IMAGE_FILE), read_settings(folder, VIDEO_FILE)
    for key in ("patch_size", "temporal_patch_size", "merge_size"):
        own = getattr(vision, key.replace("merge", "spatial_merge"))
        for file, stored in ((IMAGE_FILE, image), (VIDEO_FILE, video)):
            if stored.get(key, own) != own:
                raise ConfigError(
                    f"{folder}: {file} has {key} {stored[key]}, the tower of config.json {own}; copy both files from "
                    "where the weights came from"
                )
    size, found = image.get("size") or {}, config.data.image
    low, high = family.pixels
    found.min_pixels = found.min_pixels or image.get("min_pixels") or size.get("shortest_edge") or low
    found.max_pixels = found.max_pixels or image.get("max_pixels") or size.get("longest_edge") or high
    found.mean = found.mean or image.get("image_mean") or [*family.mean]
    found.std = found.std or image.get("image_std") or [*family.std]
    budget = (video.get("size") or {}).get("longest_edge") or family.video_pixels
    config.data.video.total_pixels = config.data.video.total_pixels or budget
    ends = read_settings(folder, GENERATION_FILE).get("eos_token_id") or []
    texts = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    always = {"<|im_end|>", "<|endoftext|>", None, *config.generation.stop}
    config.generation.stop = [*config.generation.stop, *(text for text in texts if text not in always)]


def write_base_files(folder: Path, config: TrainConfig, family: Family, processor: Any, ends: list[int]) -> None:
    """The same files for transformers. `processor`: the Pillow image processor; `ends`: tokens that end an answer."""
    video, generation = config.data.video, config.generation
    shared = json.loads(processor.to_json_string()) | {"processor_class": family.processor_class}
    sampling = {"do_sample_frames": True, "fps": video.fps, "max_frames": video.max_frames}
    frames = family.video_settings(video, side=processor.patch_size * processor.merge_size) | sampling
    sampled = {key: getattr(generation, key) for key in ("temperature", "top_k", "top_p")}
    drawn = {"do_sample": True, **sampled} if generation.temperature else {"do_sample": False}
    files = {IMAGE_FILE: shared, VIDEO_FILE: shared | frames, GENERATION_FILE: {"eos_token_id": ends, **drawn}}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=1))
