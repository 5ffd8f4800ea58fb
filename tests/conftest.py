"""Tiny models of the real classes, and conversations of every kind on real images."""

import gc
import json
import os
import signal
import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import settings
from PIL import Image

from vpt.checkpoint.load import build_model
from vpt.config.evaluation import EvalConfig
from vpt.config.overrides import register_schemas
from vpt.config.resolve import resolve_config
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.data.images import MediaStore
from vpt.data.processor import Sample
from vpt.data.records import parse_record
from vpt.generation.pipeline import Pipeline
from vpt.models.build import ModelBundle
from vpt.perception.batch import VISION_TOWER

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tiny tensors, and several test processes
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; programs would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("VPT_CACHE", tempfile.mkdtemp(prefix="vpt-cache-"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start
    settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    gc.freeze()  # torch and transformers are a million objects, which every full collection would walk


@cache  # composing takes half a second, more than most tests that want a configuration
def _composed(program: str, schema: type, conf: Path, *overrides: str) -> Any:
    register_schemas()
    with initialize_config_dir(str(conf), version_base=None):
        return resolve_config(compose(program, overrides=list(overrides)), schema)


def compose_typed(*overrides: str, conf: Path = ROOT / "conf") -> TrainConfig:
    """The checked configuration of `python train.py OVERRIDES`, without pictures: they take longer than a short run."""
    config = deepcopy(_composed("train", TrainConfig, conf, "pictures=false", *overrides))
    validate(config)
    return config


def compose_config(*overrides: str, conf: Path = ROOT / "conf") -> TrainConfig:
    """The same, of the tiny model where no other is typed."""
    return compose_typed("model=tiny", *overrides, conf=conf)


def logged(folder: Path, key: str) -> list[dict]:
    """The lines of a run's `metrics.jsonl` that hold a metric."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if key in line]


def losses(folder: Path) -> list[float]:
    """A run's loss after each step that it logged."""
    return [line["train/loss"] for line in logged(folder, "train/loss")]


def compose_eval(*overrides: str) -> EvalConfig:
    """The checked configuration of `python eval.py OVERRIDES`."""
    return deepcopy(_composed("eval", EvalConfig, ROOT / "conf", *overrides))


@pytest.fixture(scope="session")
def make_parts() -> Callable[..., ModelBundle]:
    """Tiny parts for overrides; weights are the same for the same overrides."""

    def make(*overrides: str) -> ModelBundle:
        torch.manual_seed(0)
        return build_model(compose_config(*overrides))

    return make


@pytest.fixture(scope="session")
def all_parts(make_parts) -> Pipeline:
    """One model with every kind of perception, for tests that change nothing in it."""
    return Pipeline(**vars(make_parts(*ALL)))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with every kind of perception, for tests that change nothing in it but `eval/`."""
    from vpt.cli.train import train  # it imports everything

    folder = tmp_path_factory.mktemp("trained") / "all"
    train(compose_config("+experiment=all", "+debug=two_steps"), folder)
    return folder


ALL = ("encoder=[dino,sam,clip]",)
FAMILIES = {"qwen2_vl": (), "qwen2_5_vl": ("model=tiny_2_5",), "qwen3_vl": ("model=tiny_3",)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> MediaStore:
    """Images of several sizes and a video of seven frames: smooth colours with noise, so that no two patches are alike."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(64, 64), (96, 48), (80, 112), (200, 150)]):
        ramp = np.linspace(0, 200, width)[None, :, None] * np.ones((height, 1, 3))
        pixels = ramp + generator.integers(0, 56, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
    for number in range(7):
        pixels = np.roll(ramp[:48, :80], 11 * number, axis=1) + generator.integers(0, 56, (48, 80, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"frame{number}.png")
    return MediaStore(root)


def action_turns(token: str) -> list[dict]:
    """The turns of one re-encoding action."""
    said = f"<|{token}_action_start|><|{token}_action|><|{token}_action_end|>"
    return [{"role": "assistant", "content": said}, {"role": "user", "content": f"<{token}_image>"}]


REGION_TURNS = [
    {"role": "assistant", "content": "<|region_token_start|><|x_1|><|y_2|><|x_5|><|y_6|><|region_token_end|>"},
    {"role": "user", "content": "<image>"},
]


def conversation(image: str, *turns: list[dict], answer: str = "yes", **images: list[str]) -> dict:
    """A record about `image` with perception turns in between."""
    first = {"role": "user", "content": "<image>\nwhat is the red shape?"}
    middle = [turn for group in turns for turn in group]
    return {"messages": [first, *middle, {"role": "assistant", "content": answer}], "images": [image], **images}


def video(frames: int = 7, fps: float = 2.0) -> dict:
    """An entry of `videos`: the first frames of the folder's video."""
    return {"frames": [f"frame{number}.png" for number in range(frames)], "fps": fps}


def video_conversation(shown: dict, *turns: list[dict], answer: str = "yes", **images: list[str]) -> dict:
    """A record about a video with perception turns in between."""
    record = conversation("", *turns, answer=answer, **images)
    record["messages"][0]["content"] = "<video>\nwhat is the red shape?"
    return {**record, "images": images.get("images", []), "videos": [shown]}


def mixed_records() -> list[dict]:
    """Every kind of row: three actions, one, a region, region then action, none, text only, an action without image,
    actions after a video, a region and an action after an image and a video.
    """
    region = conversation("1.png", REGION_TURNS)
    region["images"].append("1.png_12,12,72,42")
    both = conversation("2.png", REGION_TURNS, action_turns("seg"), answer="no", seg_images=["2.png"])
    both["images"].append("2.png_10,28,60,98")
    many = conversation(
        "0.png", action_turns("detection"), action_turns("clip"), action_turns("detection"), answer="a red circle",
        detection_images=["0.png", "2.png"], clip_images=["0.png"],
    )  # fmt: skip
    text = {"messages": [{"role": "user", "content": "is a circle round?"}, {"role": "assistant", "content": "yes"}]}
    watched = video_conversation(
        video(), action_turns("detection"), action_turns("clip"), answer="no", detection_images=["frame3.png"],
        clip_images=["0.png"],
    )  # fmt: skip
    late = video_conversation(video(5, fps=0.5), REGION_TURNS, action_turns("seg"), seg_images=["frame0.png"])
    late["messages"][0]["content"] = "<image>, then <video>\nis it there?"
    late["images"] = ["1.png", "frame2.png_10,12,60,42"]
    return [
        many,
        conversation("1.png", action_turns("clip"), clip_images=["1.png"]),
        region,
        both,
        conversation("3.png", answer="brown"),
        text,
        conversation("2.png", action_turns("detection"), answer="teal", detection_images=["2.png"]),
        conversation("0.png", action_turns("seg"), answer="gray", seg_images=["3.png"]),
        watched,
        late,
    ]


TOKENS = {"dino": "detection", "sam": "seg", "clip": "clip"}


def qwen_inputs(parts: ModelBundle, sample: Sample, *, perceived_grids: bool = False) -> dict[str, torch.Tensor]:
    """What transformers' `get_rope_index` takes for a row: token types, and the grids of images and videos.

    `perceived_grids`: re-encoded tokens count as images, too.
    """
    types = torch.zeros_like(sample.ids)
    grids: dict[int, list[tuple[int, int, int]]] = {1: [], 2: []}
    seconds = []
    for block in sample.row.blocks:
        look = sample.images[block.source][block.image][1]
        if block.source != VISION_TOWER and not perceived_grids:
            continue
        kind = 2 if look.seconds else 1
        types[block.start : block.start + block.length] = kind
        if block.offset:  # a further step of the same video
            continue
        side = round(look.tokens**0.5) * parts.processor.position_scheme.merge
        grids[kind].append(look.grid or (1, side, side))
        seconds += [look.seconds] if look.seconds else []
    inputs = {"input_ids": sample.ids[None], "mm_token_type_ids": types[None].int()}
    inputs |= {"image_grid_thw": torch.tensor(grids[1])} if grids[1] else {}
    inputs |= {"video_grid_thw": torch.tensor(grids[2])} if grids[2] else {}
    timed = seconds and parts.processor.position_scheme.tokens_per_second
    return inputs | ({"second_per_grid_ts": torch.tensor(seconds)} if timed else {})


def samples_of(parts: ModelBundle, folder: MediaStore, raws: list[dict] | None = None) -> list:
    """Encode records (all kinds by default)."""
    raws = mixed_records() if raws is None else raws
    records = [parse_record(raw, where=f"record {i}", encoder_tokens=TOKENS) for i, raw in enumerate(raws)]
    return [parts.processor.encode_conversation(record, folder) for record in records]
