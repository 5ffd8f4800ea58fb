"""Clients, installed as docs/evaluation.md says, give the answers of `eval.py`: `make test-clients`.

Not collected with the other tests: each environment is a gigabyte, and needs an index of packages.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from integrations.test_in_memory import COUNT, IMAGES, answered_run, predictions

from conftest import FAMILIES, ROOT, compose_config
from vpt.tracking import WandbLogger

ENVIRONMENTS = ROOT / "outputs" / "clients"


def documented(client: str, program: str) -> list[str]:
    """Commands of a program in a client's section of the page."""
    section = (ROOT / "docs/evaluation.md").read_text().partition(f"### {client}\n")[2].partition("\n#")[0]
    return re.findall(rf"^{program} .*$", section, re.MULTILINE)


def installed(client: str) -> Path:
    """The folder of programs of an environment that is made as the page says, torch first (of the pinned version)."""
    folder, commands = ENVIRONMENTS / client, documented(client, "pip install")
    stamp = folder / "commands.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(commands):
        [torch] = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for command in (f"pip install {torch}", *commands):
            subprocess.run([folder / "bin/python", "-m", *shlex.split(command)], cwd=ROOT, check=True)
        stamp.write_text("\n".join(commands))
    return folder / "bin"


def ran(command: list, **more: str) -> None:
    """Run a command without a network to models or data."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **more}
    subprocess.run([*map(str, command)], env=environment, cwd=ROOT, check=True, timeout=1800)


@pytest.fixture(scope="module", params=FAMILIES)
def answered(request, tmp_path_factory) -> Path:
    """A run of each family of base models, and what `eval.py` says that it answers."""
    return answered_run(tmp_path_factory.mktemp(request.param), *FAMILIES[request.param])


@pytest.fixture
def asked(answered) -> list[dict]:
    """The first questions, what `eval.py` says to each, and for every other one that as the right answer."""
    said = [prediction["answer"] for prediction in predictions(answered)]
    questions = json.loads((IMAGES.parent / "questions.json").read_text())[:COUNT]
    return [
        {"question": question, "answer": text if number % 2 else right, "image": str(IMAGES / f"{image}.png"), "said": text}
        for number, ((question, right, image), text) in enumerate(zip(questions, said, strict=True))
    ]  # fmt: skip


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


def test_lmms_eval(answered, asked, tmp_path):
    """Its own program, on a task of its own format: the answers are those of `eval.py`, and the score follows."""
    [command] = documented("lmms-eval", "lmms-eval")
    assert command.startswith("lmms-eval --model vpt --model_args checkpoint=")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "easy_vqa_local.yaml").write_text(TASK.replace("PATH", str(tmp_path / "test.jsonl")))
    ran([
        installed("lmms-eval") / "lmms-eval", "--model", "vpt", "--model_args", f"checkpoint={answered},device=cpu",
        "--tasks", "easy_vqa_local", "--include_path", tmp_path, "--batch_size", 5, "--log_samples",
        "--output_path", tmp_path / "out",
    ], HF_HOME=str(tmp_path))  # fmt: skip
    [samples] = (tmp_path / "out").rglob("*samples_easy_vqa_local.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in lines] == [item["said"] for item in asked]
    [results] = (tmp_path / "out").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["easy_vqa_local"]
    expected = sum(item["said"] == item["answer"] for item in asked) / len(asked)
    assert scores["exact_match,none"] == pytest.approx(expected) and 0 < expected <= 1


def test_benchmarks_of_the_field():
    """`vpt benchmarks` on stand-ins of each benchmark's schema, where lmms-eval is installed."""
    python = installed("lmms-eval") / "python"
    ran([python, "-m", "pip", "install", "--quiet", "--editable", ".[demo,judge,serve,test]"])
    ran([python, "-m", "pytest", "-m", "slow", "tests/integrations/test_benchmarks.py"])


def test_vlmevalkit(answered, asked, tmp_path):
    """Its own program, on a table of its own format: the answers are those of `eval.py`."""
    [command] = documented("VLMEvalKit", "python")
    assert command.startswith("python -m vpt.integrations.vlmevalkit outputs/dino --data ")
    with (tmp_path / "Local.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "answer", "image_path"])
        table.writerows([number, item["question"], item["answer"], item["image"]] for number, item in enumerate(asked))
    ran([
        installed("VLMEvalKit") / "python", "-m", "vpt.integrations.vlmevalkit", answered, "--data", "Local",
        "--mode", "infer", "--work-dir", tmp_path / "out",
    ], LMUData=str(tmp_path), PRED_FORMAT="json")  # fmt: skip
    [table] = {path.resolve() for path in (tmp_path / "out").rglob("vpt_Local.json")}
    lines = json.loads(table.read_text())
    assert [line["prediction"] for line in lines] == [item["said"] for item in asked]


def test_wandb_sync_finds_what_an_offline_run_names(tmp_path, capfd):
    """What a run prints at its end is a command that W&B's own program takes."""
    config = compose_config("tracking=wandb", "tracking.mode=offline").tracking
    tracker = WandbLogger(config, name="run", folder=tmp_path, run_id=None, settings={})
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.close()
    command = capfd.readouterr().out.partition("to send it: ")[2]
    ran([Path(sys.executable).with_name("wandb"), *shlex.split(command)[1:], "--dry-run"])
    found = "".join(capfd.readouterr())
    assert "Would sync 1 run" in found and f"run-{tracker.id}.wandb" in found
