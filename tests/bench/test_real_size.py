"""`make real-size` at small sizes, and the random folders that it begins with."""

import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, compose_config
from vpt.bench import random_folders
from vpt.checkpoint.load import build_model


def test_folders_of_random_weights_are_read(tmp_path, monkeypatch):
    """In shards, of two parts, each tensor as it was written."""
    monkeypatch.setattr(random_folders, "SHARD", 500_000)
    found = random_folders.write_folders(compose_config("encoder=[dino]"), tmp_path / "folders")
    assert {*found} == {"model.path", "encoder.dino.path"} and len([*found["model.path"].glob("model-*")]) > 2
    typed = [f"{key}={folder}" for key, folder in found.items()]
    model = build_model(compose_config("encoder=[dino]", "model=qwen2_vl_2b", "model.size=tiny", *typed)).model
    for name, parameter in model.named_parameters():
        if "projector" not in name:
            assert torch.equal(parameter, parameter.bfloat16().float()), name
            assert parameter.std() < 0.03 or parameter.ndim == 1


@pytest.mark.slow
def test_a_life_at_small_sizes(tmp_path):
    command = ["-m", "vpt.bench.real_size", "--reduced", "--root", str(tmp_path / "life"), "--models", "qwen2_vl_2b"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    parts = json.loads((tmp_path / "life.json").read_text())
    assert [part["name"].partition(": ")[2] for part in parts][-1] == "stock transformers"
    assert all(part["estimated"] for part in parts if part["name"].endswith(("align", "resumed")))
