"""A model and its card, published to a hub and read back; the hub is a server on this machine."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from hydra import compose, initialize_config_dir

import vpt
from conftest import ROOT
from helpers.hub_server import TOKEN, HubServer
from vpt.checkpoint.load import load_any_config, load_pretrained
from vpt.cli.export import main
from vpt.config.resolve import resolve_config
from vpt.config.schema import TrainConfig
from vpt.errors import CheckpointError, ConfigError
from vpt.reporting.figures import draw_run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = HubServer()
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE  # HF_ENDPOINT would set both
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        template.replace(huggingface_hub.constants.ENDPOINT, server.url),
    )  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the protocol besides has LFS
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy, with an ablation that made a difference and one that did not."""
    run = shutil.copytree(trained_run, tmp_path / "all", symlinks=True)
    shutil.rmtree(run / "eval", ignore_errors=True)
    difference = {"value": -0.5, "low": -0.8, "high": -0.2, "questions": 9}
    control = {"description": "features zeroed", "questions": 9, "reference": 0.9, "ablated": 0.4, "p": 0.01}
    summary = json.loads((run / "summary.json").read_text())
    summary["ablations"] = {
        "features_zeroed": control | {"difference": difference},
        "region_random": control | {"description": "region random", "difference": difference | {"high": 0.2}},
    }
    (run / "eval" / "test").mkdir(parents=True)
    (run / "eval" / "test" / "summary.json").write_text(json.dumps(summary))
    return run


def test_published_and_read_back(hub, run, tmp_path, capsys):
    to = tmp_path / "card"
    main([f"checkpoint={run}", f"to={to}", "format=hub", "push=me/tiny", "license=mit"])
    assert f"{hub.url}/me/tiny" in capsys.readouterr().out and hub.private == {"me/tiny": True}
    assert b'load("me/tiny")' in hub.files["me/tiny"]["README.md"]
    assert hub.files["me/tiny"].keys() == {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
    read = vpt.load("me/tiny", device="cpu")
    want, got = load_pretrained(run, device="cpu").model.state_dict(), read.model.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    hub.files["me/tiny"]["modeling.py"] = b"raise SystemExit"
    vpt.load("me/tiny", device="cpu")
    assert not list((tmp_path / "cache").rglob("modeling.py"))


def test_the_card(run, tmp_path):
    to = tmp_path / "card"
    draw_run(run, config=load_any_config(run))
    main([f"checkpoint={run}", f"to={to}", "format=hub"])
    card = (to / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    summary = json.loads((run / "summary.json").read_text())
    (name, found), *_ = summary["metrics"].items()
    for text in (name, "exact_match", f"{found['exact_match']['value']:.4f}", "features zeroed", "-0.8000 to -0.2000",
                 "That it matters: region random", "no such model was compared with", "Evaluation `test`"):  # fmt: skip
        assert text in card, text
    assert "That it matters: features zeroed" not in card and "no ablation was run" not in card
    pictures = [path.name for path in (to / "pictures").iterdir()]
    assert {*pictures} == {"curves.png", "samples.png"} and all(f"](pictures/{name})" in card for name in pictures)
    with initialize_config_dir(str(to), version_base=None):  # the card's command composes what was trained
        again = resolve_config(compose("config", overrides=["run_name=again"]), TrainConfig)
    assert again.training == load_pretrained(run, device="cpu").config.training


def test_what_is_not_there_is_told(hub, tmp_path, monkeypatch, run):
    with pytest.raises(CheckpointError, match="nobody/nothing is no folder here, and the hub does not give it"):
        vpt.load("nobody/nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="outputs/nothing does not exist"):
        vpt.load("outputs/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="Type hf auth login"):
        main([f"checkpoint={run}", f"to={tmp_path / 'x'}", "format=hub", "push=me/tiny"])
    for wrong, said in ((["push=me/tiny"], "format=hub"), (["format=hub", "push=tiny"], "no OWNER/NAME")):
        with pytest.raises((ConfigError, CheckpointError), match=said):
            main([f"checkpoint={run}", f"to={tmp_path / 'y'}", *wrong])
    assert not (tmp_path / "y").exists()


@pytest.mark.slow
def test_the_cards_command_trains(run, tmp_path):
    main([f"checkpoint={run}", f"to={tmp_path / 'card'}", "format=hub"])
    command = [sys.executable, "train.py", "--config-dir", tmp_path / "card", "--config-name", "config",
               "run_name=again", f"output_dir={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "summary.json").is_file()
