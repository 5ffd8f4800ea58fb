"""Other people's evaluation programs get the answers that `eval.py` gets."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import compose_config
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.config.schema import EvalConfig, EvalDataConfig
from vpt.integrations.in_memory import Responder
from vpt.integrations.vlmevalkit import VPTChat
from vpt.training.trainer import Trainer

COUNT = 12
IMAGES = Path(str(files("easy_vqa") / "data" / "test" / "images"))


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    """A run whose weights say all kinds of things, and what `eval.py` says that it answers."""
    folder = tmp_path_factory.mktemp("run")
    overrides = ("+experiment=dino", "+debug=two_steps", "optim.lr=0", "generation.action=dino")
    trainer = Trainer(compose_config(*overrides), folder)
    trainer.fit()
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


TASK = """
task: easy_vqa_local
dataset_path: json
dataset_kwargs: {data_files: {test: PATH}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs: {max_new_tokens: 16, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
UTILS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""


@pytest.mark.slow
def test_lmms_eval_scores_as_eval_does(answered, tmp_path):
    """Its own runner, on a local task file over easy-VQA."""
    pytest.importorskip("lmms_eval", reason="pip install lmms-eval, then remove torchvision")
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    said = predictions(answered)
    questions = json.loads((IMAGES.parent / "questions.json").read_text())[: len(said)]
    docs = [{"question": q, "answer": a, "image": str(IMAGES / f"{n}.png")} for q, a, n in questions]
    # every other one with the answer that this model gives, so that there is something to score
    docs = [doc | {"answer": said[i]["answer"]} if i % 2 else doc for i, doc in enumerate(docs)]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(doc) for doc in docs))
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "easy_vqa_local.yaml").write_text(TASK.replace("PATH", str(tmp_path / "test.jsonl")))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, model_name="vpt")
    results = evaluator.simple_evaluate(
        model="vpt", model_args=f"checkpoint={answered},device=cpu", tasks=["easy_vqa_local"], batch_size=5,
        task_manager=manager, bootstrap_iters=10,
    )  # fmt: skip
    scored = results["results"]["easy_vqa_local"]
    score = next(value for key, value in scored.items() if key.startswith("exact_match") and "stderr" not in key)
    expected = sum(doc["answer"] == prediction["answer"] for doc, prediction in zip(docs, said)) / len(docs)
    assert score == pytest.approx(expected) and 0 < expected <= 1
    samples = sorted(results["samples"]["easy_vqa_local"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == [[prediction["answer"]] for prediction in said]
    torch.set_grad_enabled(True)  # the runner turns it off for good
