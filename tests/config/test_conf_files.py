"""Every file under conf/ is composed and run for two steps, those that make the same run once. A new file is found by itself."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

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
RUN_ABLATIONS = ["all", "evidence", "regions"]  # the other files are parts of `all`
ENCODERS = [path.name for path in GROUP_FILES if path.parts[0] == "encoder"]
SMALL = ["+debug=two_steps", "data.workers=0"]

# Files that make the run of another one, which runs: with SMALL their values are what other files set already.
SAME_RUN = {
    **dict.fromkeys(
        ["debug/easy_vqa", "launcher/slurm", "masking/light", "model/tiny", "optim/tiny", "strategy/auto", "sweep/masking",
         "sweep/optuna", "sweep/seeds", "tracking/none", "training/tiny"],
        "debug/two_steps",
    ),
    **{f"encoder/{name}": f"experiment/{name}" for name in ("clip", "dino", "sam")},
}  # fmt: skip
# Most of the paper's recipes differ in numbers, which tests/config/test_paper.py reads; tiny models of a family are alike;
# +experiment=scenes/rl has these rewards.
LONG = re.compile(
    r"(experiment|data)/paper/(?!dino$|mix$)|model/qwen\w+_vl_(?!2b|3b)|rewards/(correct|cost|cost_small|malformed)$"
)


def overrides_for(path: Path, records: Path, weights: Path) -> list[str]:
    """What to type to run with one file."""
    group, name = path.parts[0], "/".join(path.parts[1:])
    if group == "experiment" and name.startswith("paper/"):
        return [f"+experiment={name}", f"data.root={records}"]
    if group in ("debug", "experiment", "launcher", "sweep"):
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


@pytest.fixture(scope="session")
def stages(tmp_path_factory, worker_id) -> Path:
    """Where experiments lie, and others start from them; one folder for all of xdist's processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "stages"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def composed(records, weights, stages) -> Callable[[str], TrainConfig]:
    """The configuration of two steps with a file."""

    def compose(path: str) -> TrainConfig:
        drawn = f"pictures={path == 'tracking/wandb'}"  # no other file changes what is drawn
        small = [word for word in SMALL if not (path.startswith("debug/") and "debug" in word)]
        return compose_config(*overrides_for(Path(path), records, weights), *small, f"output_dir={stages}", drawn)

    return compose


def train_experiment(name: str, composed: Callable[[str], TrainConfig], stages: Path) -> Path:
    """Its run, after those that it starts from; of several processes the first trains it, and the others wait."""
    config, folder = composed(f"experiment/{name}"), stages / name
    assert config.run_name == name
    if config.init_from is not None:
        train_experiment(str(Path(config.init_from).relative_to(stages)), composed, stages)
    with FileLock(stages / f"{name.replace('/', '_')}.lock"):
        if not (folder / "summary.json").exists():
            train(config, folder)
    return folder


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * bool(LONG.match(path))) for path in map(str, GROUP_FILES)
     if path not in SAME_RUN],
)  # fmt: skip
def test_two_steps(path, composed, stages, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if path.startswith("experiment/"):
        run = train_experiment(path.removeprefix("experiment/"), composed, stages)
    else:
        config, run = composed(path), tmp_path / "run"
        if config.init_from is not None:
            train_experiment(str(Path(config.init_from).relative_to(stages)), composed, stages)
        train(config, run)
    summary = json.loads((run / "summary.json").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert summary["steps"] == 2 and sum("train/loss" in line for line in lines) == 2 and summary["questions"] == 4
    assert summary["teacher_forced"]["loss"] > 0


def test_files_that_make_the_run_of_another(composed):
    """Equal but for the run's name: what `test_two_steps` need not run again."""
    for path, other in SAME_RUN.items():
        own, runs = composed(path), composed(other)
        assert replace(own, run_name=runs.run_name) == runs, (
            f"{path} makes a run of its own now, take it out of SAME_RUN"
        )


@pytest.mark.parametrize("name", RECIPES)
def test_pretraining(name, tmp_path, monkeypatch):
    for pictures in ("draw_run", "write_report"):
        monkeypatch.setattr(f"vpt.cli.train.{pictures}", lambda folder, **_: [folder])
    config = compose_pretrain(name, ["training.steps=2", "patches.test_images=1", "threads=1"])
    config.language += SMALL if config.language else []
    folder = pretrain(config, tmp_path / "run", tmp_path / "weights", command=f"vpt pretrain {name}")
    assert (folder / "model.safetensors").is_file() and name in (folder / "README.md").read_text()


def test_ablations_that_all_has():
    nodes = {name: compose_eval("checkpoint=x", f"+ablations={name}").ablations for name in ABLATIONS}
    for name in {*ABLATIONS} - {*RUN_ABLATIONS}:
        assert nodes[name].items() <= nodes["all"].items(), name


@pytest.mark.parametrize("name", RUN_ABLATIONS)
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


@pytest.mark.parametrize(("size", "asked", "view"), [
    ("tiny", "null", "whole"), ("full", "null", "centre"), ("tiny", "centre", "centre"), ("full", "whole", "whole"),
])  # fmt: skip
def test_the_view_of_dino_is_its_size_s_own_unless_one_is_asked_for(size, asked, view):
    overrides = ("encoder=[dino]", f"encoder.dino.size={size}", f"encoder.dino.options.view={asked}")
    tiny = ("encoder.dino.sizes.full.config={hidden_size:64,num_hidden_layers:1,num_attention_heads:4}",)
    parts = build_model(compose_config(*overrides, *tiny, "encoder.dino.sizes.full.weights=null"))
    transform = parts.processor.transforms["dino"]
    assert (transform.view, transform.side) == (view, {"tiny": 56, "full": 224}[size])
