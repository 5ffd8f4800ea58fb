"""Other people's evaluation programs get the answers that `eval.py` gets."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from conftest import compose_config
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.config.evaluation import EvalConfig, EvalDataConfig
from vpt.integrations.in_memory import Responder
from vpt.integrations.vlmevalkit import VPTChat
from vpt.training.trainer import Trainer

COUNT = 12
IMAGES = Path(str(files("easy_vqa") / "data" / "test" / "images"))


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    """A run whose weights say all kinds of things, and what `eval.py` says that it answers."""
    return answered_run(tmp_path_factory.mktemp("run"))


def answered_run(folder: Path, *overrides: str) -> Path:
    """Train a model of these overrides for two steps that change nothing, and let `eval.py` ask it."""
    dino = ("+experiment=dino", "+debug=two_steps", "optim.lr=0", "generation.action=dino")
    Trainer(compose_config(*dino, *overrides), folder).fit()
    evaluate_checkpoint(EvalConfig(checkpoint=str(folder), pictures=False, data=EvalDataConfig(limit=COUNT)))
    return folder


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "eval" / "test" / "predictions.jsonl").read_text().splitlines()]


def test_images_in_memory_are_answered_as_files_are(answered):
    said = predictions(answered)
    questions = json.loads((IMAGES.parent / "questions.json").read_text())[: len(said)]
    pairs = [([Image.open(IMAGES / f"{number}.png")], question) for question, _, number in questions]
    assert Responder(answered, device="cpu").respond(pairs) == [prediction["answer"] for prediction in said]
    assert len({prediction["answer"] for prediction in said}) > 1


def test_vlmevalkit(answered):
    said = predictions(answered)
    question, _, number = json.loads((IMAGES.parent / "questions.json").read_text())[0]
    message = [{"type": "image", "value": str(IMAGES / f"{number}.png")}, {"type": "text", "value": question}]
    assert VPTChat(answered, device="cpu").generate_inner(message, dataset="any") == said[0]["answer"]
