"""Both sides train, are killed, and go on; their first losses agree."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_beside_hugging_faces_trainer(tmp_path, rank):
    pytest.importorskip("accelerate")
    command = [
        "-m",
        "vpt.bench.hf_trainer",
        "--reduced",
        "--rounds",
        "1",
        "--lora",
        str(rank),
        "--root",
        str(tmp_path / "a"),
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)  # it ends with an error where losses differ
    [sides] = json.loads((tmp_path / "a.json").read_text())
    assert set(sides) == {"vpt", "transformers"} and sides["vpt"]["loss"] > 1
    assert all(value > 0 for side in sides.values() for value in side.values())
