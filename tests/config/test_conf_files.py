"""Every file under conf/ is composed and run for two steps. A new file is found by itself."""

import json
import re
import shutil
from pathlib import Path

import pytest

from conftest import REGION_TURNS, ROOT, action_turns, compose_config, compose_eval, conversation, mixed_records
from helpers.weight_folders import write_base
from vpt.checkpoint.load import build_model
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.cli.pretrain import RECIPES, compose_pretrain, pretrain
from vpt.cli.train import train
from vpt.config.schema import TrainConfig
from vpt.config.targets import RE_ENCODER, locate

CONF = ROOT / "conf"
ALL_FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/**/*.yaml"))
GROUP_FILES = [path for path in ALL_FILES if path.parts[0] not in ("ablations", "pretrain")]
ABLATIONS = [path.name for path in ALL_FILES if path.parts[0] == "ablations"]
ENCODERS = [path.name for path in GROUP_FILES if path.parts[0] == "encoder"]
SMALL = ["+debug=two_steps", "data.workers=0"]


def overrides_for(path: Path, records: Path, weights: Path) -> list[str]:
    """What to type to run with one file."""
    group, name = path.parts[0], "/".join(path.parts[1:])
    if group == "debug":
        return []  # SMALL has it
    if group == "experiment" and name.startswith("paper/"):
        return [f"+experiment={name}", f"data.root={records}"]
    if group in ("experiment", "launcher", "sweep"):
        return [f"+{group}={name}"]
    if group == "rewards":
        return ["+experiment=scenes/rl", f"rewards=[{name}]"]
    if group == "encoder":
        return [f"encoder=[{name}]", f"data.actions={{none:0,{name}:1}}"]
    if group == "model" and name.startswith("qwen"):
        family = re.match(r"qwen(\d(?:_5)?)_vl", name)[1]
        return [f"model={name}", f"model.path={weights / family}", "model.size=tiny"]
    if group == "data":
        return [f"data={name}", f"data.root={records}", "encoder=[dino,sam,clip]"]
    return [f"{group}={name}"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Folders of weights as a hub would have them, tiny, for the full-size model files."""
    root = tmp_path_factory.mktemp("weights")
    for family, model in (("2", "tiny"), ("2_5", "tiny_2_5"), ("3", "tiny_3")):
        parts = build_model(compose_config(f"model={model}", "encoder=[]", "model.region_bins=0"))
        write_base(parts, root / family)
    return root


@pytest.fixture(scope="module")
def records(tmp_path_factory, folder) -> Path:
    """A folder of VPT records: those of `data=vpt`, and every file that conf/data/paper names, as published."""
    root = tmp_path_factory.mktemp("records")
    for name in ("train", "test"):
        (root / f"{name}.json").write_text(json.dumps(mixed_records()))
    for name in re.findall(r"\w+\.jsonl?\b", "".join(path.read_text() for path in (CONF / "data/paper").iterdir())):
        raws = published_records()
        regions = [raw for raw in raws if "box" in raw] * 2
        lines = name.endswith(".jsonl")  # files of the converter; published ones are lists, of every kind
        (root / name).write_text("\n".join(map(json.dumps, regions)) if lines else json.dumps(raws))
    for image in Path(folder.root).iterdir():
        shutil.copy(image, root)
    return root


def published_records() -> list[dict]:
    """One encoder, spelt `detection`; regions in 8 x 8 cells, with the box that the converter keeps."""
    region = conversation("1.png", REGION_TURNS)
    region |= {"images": ["1.png", "1.png_12,12,72,42"], "box": [12, 13, 70.5, 40], "region_bins": 8}
    dino = conversation("2.png", action_turns("detection"), answer="teal", detection_images=["2.png"])
    return [region, dino, conversation("3.png", answer="brown"), {**region, "dataset": "other"}]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """Where runs lie that others start from."""
    return tmp_path_factory.mktemp("stages")


def train_stage_before(config: TrainConfig, stages: Path, records: Path) -> None:
    """Train the experiment whose run `init_from` names for its two steps, and those before it."""
    if config.init_from is None or Path(config.init_from).is_dir():
        return
    experiment = Path(config.init_from).relative_to(stages)
    before = compose_config(f"+experiment={experiment}", f"data.root={records}", *SMALL, f"output_dir={stages}")
    train_stage_before(before, stages, records)
    train(before, stages / before.run_name)


# Most of the paper's recipes differ in numbers, which tests/config/test_paper.py reads
LONG = re.compile("(experiment|data)/paper/(?!dino$|mix$)")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * bool(LONG.match(str(path)))) for path in GROUP_FILES],
    ids=str,
)
def test_two_steps(path, records, weights, stages, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    # the last word is debug's
    drawn = f"pictures={path.parts[0] == 'tracking'}"  # no other file changes what is drawn
    config = compose_config(*overrides_for(path, records, weights), *SMALL, f"output_dir={stages}", drawn)
    train_stage_before(config, stages, records)
    train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert summary["steps"] == 2 and sum("train/loss" in line for line in lines) == 2 and summary["questions"] == 4
    assert summary["teacher_forced"]["loss"] > 0


@pytest.mark.parametrize("name", RECIPES)
def test_pretraining(name, tmp_path, monkeypatch):
    for pictures in ("draw_run", "write_report"):
        monkeypatch.setattr(f"vpt.cli.train.{pictures}", lambda folder, **_: [folder])
    config = compose_pretrain(name, ["training.steps=2", "patches.test_images=1", "threads=1"])
    config.language += SMALL if config.language else []
    folder = pretrain(config, tmp_path / "run", tmp_path / "weights", command=f"vpt pretrain {name}")
    assert (folder / "model.safetensors").is_file() and name in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations(name, trained_run):
    action = "region" if name == "regions" else "dino"
    evaluate_checkpoint(
        compose_eval(
            f"checkpoint={trained_run}",
            f"+ablations={name}",
            f"generation.action={action}",
            "data.limit=12",
            f"name={name}",
            "pictures=false",
        )
    )
    summary = json.loads((trained_run / "eval" / name / "summary.json").read_text())
    assert summary["ablations"] and any(found["questions"] == 12 for found in summary["ablations"].values())


def test_full_sizes_are_accepted_by_transformers():
    """The published sizes in conf/ are arguments that the configuration classes take."""
    from transformers import (
        CLIPVisionConfig,
        Dinov2Config,
        Dinov2WithRegistersConfig,
        DINOv3ViTConfig,
        Sam2VisionConfig,
        SamVisionConfig,
        SiglipVisionConfig,
    )  # fmt: skip

    classes = {
        "dino_registers": Dinov2WithRegistersConfig,
        "dino3": DINOv3ViTConfig,
        "sam2": Sam2VisionConfig,
        "siglip2": SiglipVisionConfig,
        "dino": Dinov2Config,
        "sam": SamVisionConfig,
        "siglip": SiglipVisionConfig,
        "openai_clip": CLIPVisionConfig,
    }
    config = compose_config(f"encoder=[{','.join(ENCODERS)}]")
    for name, encoder in config.encoder.items():
        assert {*encoder.sizes} >= {"full", "tiny"}
        locate(encoder.target, name, RE_ENCODER)
        for size in encoder.sizes.values():
            if size.config:
                made = classes[name](**size.config)
                for key, value in size.config.items():
                    own = getattr(made, key)
                    assert (
                        all(getattr(own, k) == v for k, v in value.items()) if isinstance(value, dict) else own == value
                    )


@pytest.mark.parametrize(("size", "asked", "crop"), [
    ("tiny", "null", "whole"), ("full", "null", "centre"), ("tiny", "centre", "centre"), ("full", "whole", "whole"),
])  # fmt: skip
def test_the_view_of_dino_is_its_size_s_own_unless_one_is_asked_for(size, asked, crop):
    overrides = ("encoder=[dino]", f"encoder.dino.size={size}", f"encoder.dino.options.view={asked}")
    tiny = ("encoder.dino.sizes.full.config={hidden_size:64,num_hidden_layers:1,num_attention_heads:4}",)
    parts = build_model(compose_config(*overrides, *tiny, "encoder.dino.sizes.full.weights=null"))
    view = parts.processor.transforms["dino"]
    assert (view.crop, view.side) == (crop, {"tiny": 56, "full": 224}[size])
