"""What the files beside a base model's weights say is read, recorded and written."""

import json

import pytest
from transformers import AutoImageProcessor

from vpt.config.schema import TrainConfig
from vpt.errors import ConfigError
from vpt.models.base_files import adopt_base_files, write_base_files
from vpt.models.families import FAMILIES
from vpt.models.tiny_tokenizer import tiny_tokenizer


class Vision:
    patch_size, spatial_merge_size, temporal_patch_size = 16, 2, 2


def adopted(folder, family="qwen3_vl", max_pixels=None, **files):
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    config = TrainConfig()
    config.data.image.max_pixels = max_pixels
    adopt_base_files(config, FAMILIES[family], Vision, tiny_tokenizer(), folder)
    return config


def test_what_is_open_is_as_the_folder_says(tmp_path):
    tokenizer = tiny_tokenizer()
    stop = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    config = adopted(
        tmp_path, preprocessor_config={"size": {"shortest_edge": 4096, "longest_edge": 8192}, "image_mean": [0.1] * 3},
        video_preprocessor_config={"size": {"shortest_edge": 1, "longest_edge": 5_000_000}, "patch_size": 16},
        generation_config={"eos_token_id": [stop, tokenizer.convert_tokens_to_ids("<|im_end|>")]},
    )  # fmt: skip
    image = config.data.image
    assert (image.min_pixels, image.max_pixels, image.mean, image.std) == (4096, 8192, [0.1] * 3, [0.5] * 3)
    assert config.data.video.total_pixels == 5_000_000
    assert config.generation.stop == ["<|vision_end|>"]


def test_names_of_transformers_4_are_read_and_what_is_typed_holds(tmp_path):
    files = {"preprocessor_config": {"min_pixels": 3136, "max_pixels": 12_845_056}}
    assert adopted(tmp_path, "qwen2_vl", **files).data.image.max_pixels == 12_845_056
    typed = adopted(tmp_path, "qwen2_vl", 5000).data.image
    assert (typed.min_pixels, typed.max_pixels) == (3136, 5000)


@pytest.mark.parametrize(
    ("family", "pixels", "video"),
    [("qwen2_vl", (3136, 1_003_520), None), ("qwen2_5_vl", (3136, 1_003_520), None),
     ("qwen3_vl", (65_536, 16_777_216), 25_165_824)],
)  # fmt: skip
def test_without_files_the_family_says(tmp_path, family, pixels, video):
    config = adopted(tmp_path, family)
    assert (config.data.image.min_pixels, config.data.image.max_pixels) == pixels
    assert config.data.video.total_pixels == video
    assert config.data.image.mean == [*FAMILIES[family].mean]


@pytest.mark.parametrize("file", ["preprocessor_config", "video_preprocessor_config"])
def test_a_processor_of_another_tower_is_refused(tmp_path, file):
    with pytest.raises(ConfigError, match=rf"{file}\.json has patch_size 14, the tower of config\.json 16; copy"):
        adopted(tmp_path, **{file: {"patch_size": 14}})


@pytest.mark.parametrize("family", FAMILIES)
def test_written_files_are_read_by_transformers(tmp_path, family):
    config = adopted(tmp_path, family)
    transform = FAMILIES[family].transform(Vision, config.data.image, config.data.video)
    write_base_files(tmp_path, config, FAMILIES[family], transform.processor, [7, 8])
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    assert (theirs.patch_size, [*theirs.image_mean]) == (16, config.data.image.mean)
    assert theirs.size["longest_edge"] == config.data.image.max_pixels
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert video["processor_class"] == FAMILIES[family].processor_class
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [7, 8]
    again = adopted(tmp_path, family)
    assert again.data.image == config.data.image
