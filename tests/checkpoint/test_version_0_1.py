"""What version 0.1 wrote: its checkpoints answer and go on as they did there, its results are read and reported.

tests/data/version_0_1 holds folders that its programs wrote, and in expected.json what it said and reached with them.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
from conftest import ROOT, compose_config, logged
from vpt.__main__ import main
from vpt.checkpoint.format import find_checkpoint
from vpt.checkpoint.load import load_any_config
from vpt.checkpoint.resume import check_same_config
from vpt.checkpoint.tensors import LazyStateDict, unique_state_dict
from vpt.checkpoint.train_state import TrainState, _read_state
from vpt.config.former_names import present_metric
from vpt.errors import CheckpointError
from vpt.evaluation.evaluator import answer_settings
from vpt.evaluation.prediction_log import PredictionLog
from vpt.evaluation.predictions import PREDICTIONS, read_predictions
from vpt.reporting.compare_runs import compare_runs
from vpt.reporting.dashboard import read_curves
from vpt.reporting.figures import draw_sheet
from vpt.reporting.runs import find_runs
from vpt.training.trainer import Trainer

FILES = ROOT / "tests/data/version_0_1"
EXPECTED = json.loads((FILES / "expected.json").read_text())
RUN = (
    "+experiment=all", "+debug=two_steps", "run_name=run", "data.limit=8", "output_dir=outputs", "training.steps=4",
    "training.checkpoint_every=2", "training.eval_rows=4", "training.eval_every=2",
    *(f"model.config.{size}" for size in (
        "hidden_size=16", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2",
        "num_key_value_heads=1", "rope_scaling.mrope_section=[2,1,1]", "vision_config.depth=1",
        "vision_config.embed_dim=16", "vision_config.hidden_size=16", "vision_config.mlp_ratio=2",
    )),
    *(f"encoder.{name}.sizes.tiny.config.{size}" for name, sizes in {
        "dino": ("hidden_size=8", "num_hidden_layers=1", "num_attention_heads=2"),
        "sam": ("hidden_size=8", "num_hidden_layers=1", "num_attention_heads=2", "output_channels=8",
                "global_attn_indexes=[0]", "mlp_dim=16"),
    }.items() for size in sizes),
)  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """The picture that version 0.1 was asked about."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:40, 20:52] = (200, 30, 30)
    path = tmp_path_factory.mktemp("image") / "question.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def finished(tmp_path) -> Path:
    """A copy of a finished run with two evaluations, its checkpoint being the other run's."""
    shutil.copytree(FILES / "finished", tmp_path / "finished")
    shutil.copytree(FILES / "run/checkpoints", tmp_path / "finished/checkpoints", symlinks=True)
    return tmp_path / "finished"


@pytest.mark.parametrize("name", EXPECTED["answers"])
def test_it_answers_as_it_did(name, image):
    pipeline = vpt.load(FILES / name, device="cpu")
    for want in EXPECTED["answers"][name]:
        said = pipeline.ask(image, EXPECTED["question"], action=want["action"], max_new_tokens=12).answer
        assert (said.ids, said.text) == (want["ids"], want["text"])
        assert [step.kind for step in said.trace] == want["kinds"]
        assert said.confidence == pytest.approx(want["confidence"], rel=1e-3)


def test_its_run_goes_on_as_it_did(tmp_path):
    shutil.copytree(FILES / "run", tmp_path / "run", symlinks=True)
    Trainer(compose_config(*RUN), tmp_path / "run").fit()
    for key, want in EXPECTED["resumed"].items():
        key = present_metric(key)
        values = [line[key] for line in logged(tmp_path / "run", key) if line["step"] > 2]
        assert values == pytest.approx(want, rel=1e-5), key


def test_its_configuration_is_the_one_that_the_same_words_make_today():
    checkpoint = find_checkpoint(FILES / "run")
    check_same_config(checkpoint, compose_config(*RUN))
    with pytest.raises(CheckpointError, match=r"  optim.max_grad_norm: 1.0 -> 2.0\ntake"):
        check_same_config(checkpoint, compose_config(*RUN, "optim.max_grad_norm=2"))


@pytest.mark.parametrize(("name", "classes"), [
    ("run", {"dino": "dino.DinoEncoder", "sam": "sam.SamEncoder", "clip": "qwen_vit.QwenViTEncoder"}),
    ("adapters", {"openai_clip": "clip_siglip.CLIPEncoder", "clip": "qwen_vit.QwenViTEncoder"}),
])  # fmt: skip
def test_its_keys_are_those_of_today(name, classes):
    config = load_any_config(FILES / name)
    assert {kind: node.target for kind, node in config.encoder.items()} == {
        kind: f"vpt.encoders.{target}" for kind, target in classes.items()
    }
    assert (config.data.overflow, config.data.action_prompt, config.model.reencoded_positions) == (
        "raise", True, "sequential",
    )  # fmt: skip
    assert (config.training.best_metric, config.optim.max_grad_norm) == ("eval/loss", 1.0)
    assert config.encoder["clip"].token_prefix == "clip" and config.strategy.reshard_after_forward


def test_another_run_starts_from_it(tmp_path):
    model = Trainer(compose_config(*RUN, f"init_from={FILES / 'run'}", "optim.lr=1e-3"), tmp_path / "other").model
    stored = LazyStateDict(find_checkpoint(FILES / "run"))
    own = unique_state_dict(model)
    assert own.keys() == set(stored) and all(torch.equal(own[name], stored[name]) for name in own)


def test_its_lost_steps_count_on(tmp_path):
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    (folder / "state.json").write_text(
        json.dumps({"step": 2, "best": 1.0, "skipped": 1, "lost": 3, "lost_in_a_row": 2})
    )
    assert _read_state(folder) == TrainState(
        step=2, best=1.0, skipped=1, nonfinite_steps=3, consecutive_nonfinite=2, evaluated_step=2
    )  # fmt: skip


@pytest.mark.parametrize("folder", ["predictions", "eval/dino", "eval/region"])
def test_its_answers_are_read(folder):
    path = FILES / "finished" / folder / PREDICTIONS
    items, lines = read_predictions(path), [json.loads(line) for line in path.read_text().splitlines()]
    assert len(items) == len(lines) == 4
    status = {"seen": "done", "mended": "repaired", "ignored": "ignored"}
    for item, line in zip(items, lines):
        assert (item.record, item.answer, item.correct) == (line["record"], line["answer"], line["right"])
        assert (item.expected_actions, item.confidence) == (line["asked"], line["confidence"])
        for step, before in zip(item.trace, line["trace"], strict=True):
            assert (step.kind, step.requested, step.status) == (
                before["kind"],
                before["said"],
                status[before["status"]],
            )
    assert folder == "predictions" or all(item.trace for item in items)


def test_its_answers_are_taken_up(finished):
    """A run of version 0.1 that is typed again does not answer anew what it has answered there."""
    folder = finished / "predictions"
    settings = json.loads((folder / "settings.json").read_text())
    records = [item.record for item in read_predictions(folder / PREDICTIONS)]
    log = PredictionLog(
        folder, answer_settings(load_any_config(finished), settings["weights"]) | {"ablation": ""}, records
    )
    assert [item.record for item in log.done] == records and not list(folder.glob("earlier*"))


def test_its_answers_are_drawn(finished):
    pytest.importorskip("easy_vqa")
    sheet = draw_sheet(finished / "predictions", load_any_config(finished), columns=2, rows=2)
    assert sheet.stat().st_size > 10_000


def test_its_results_are_reported(finished, capsys):
    shutil.rmtree(finished / "eval/region")
    main(["report", str(finished)])
    page = (finished / "report.html").read_text()
    assert "action_accuracy" in page and "gradient norm" in page
    dino = (finished / "eval/dino/report.html").read_text()
    assert re.search(r"perceived features zeroed</td>.*4</td>", dino, re.DOTALL)


def test_its_runs_are_compared_with_those_of_today(finished):
    """Settings and results have one name each, whichever version wrote them."""
    run = find_runs([finished])[0]
    assert run.settings["optim"]["max_grad_norm"] == 1.0 and "clip" not in run.settings["optim"]
    assert run.results["perception.action_accuracy.value"] <= 1
    assert len(compare_runs([run, run], ["accuracy"])) == 1
    curves = read_curves(finished)
    assert len(curves["train/grad_norm"]) == 4 and "train/gradient_norm" not in curves
