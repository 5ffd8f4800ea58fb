"""Wrong keys, wrong values: nothing wrong ever trains, and every message says what to type."""

import shutil
from dataclasses import replace
from subprocess import CompletedProcess

import pytest

from conftest import ROOT, compose_config, compose_eval, compose_typed
from helpers.programs import run_program
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.config.evaluation import EvalConfig
from vpt.config.overrides import check_overrides
from vpt.config.schema import TrainConfig
from vpt.config.validate import generation_settings
from vpt.errors import ConfigError, UserError
from vpt.training.trainer import Trainer


def run(*arguments: str, script: str = "train.py") -> CompletedProcess:
    return run_program(script, *arguments)


WRONG = {
    "a key": (["masking.para_mask_rtio=1"], "masking.para_mask_rtio is not a key", "masking.para_mask_ratio"),
    "a key behind a plus": (["+masking.ara_mask_id=1"], "masking.ara_mask_id is not a key", "masking.para_mask_id"),
    "a key behind two": (["++training.step=1"], "training.step is not a key", "training.steps"),
    "a key at the top": (["sed=1"], "sed is not a key", "seed"),
    "a key of an encoder": (["encoder.dino.tokn=x"], "encoder.dino.tokn is not a key", "token"),
    "an encoder's option": (["+encoder.dino.options.vew=whole"], "options.vew is not an option of", "view"),
    "a source's option": (["+data.test.easy_vqa.options.spilt=x"], "options.spilt is not an option of", "split"),
    "an experiment": (["+experiment=dnio"], "experiment=dnio does not exist", "dino"),
    "a group's option": (["masking=papr"], "masking=papr does not exist", "paper"),
    "a type": (["training.steps=many"], "training.steps", "Integer"),
    "a choice": (["masking.mode=zeros"], "masking.mode=zeros is not one of zero, bottleneck", "did you mean zero"),
    "a range": (["masking.para_mask_ratio=1.5"], "masking.para_mask_ratio=1.5 must lie between 0 and 1", ""),
    "a choice of an encoder": (["encoder.dino.options.view=full"], "options.view=full is not one of centre, whole", ""),
    "a choice of a source": (["data=easy_vqa", "data.test.easy_vqa.options.split=val"], "split=val is not one of train, test", ""),
    "a prefix that cannot be spelt": (
        ["encoder.dino.token_prefix=my_dino"], "token_prefix=my_dino must be small letters and digits", "token_prefix=dino",
    ),
    "a prefix of two": (
        ["encoder=[dino,sam]", "encoder.sam.token_prefix=detection"], "is that of encoder.dino too", "token_prefix=sam",
    ),
    "a thinking edition that is none": (["model.thinking=true"], "Qwen2-VL, which has no thinking edition", "leave it out"),
    "a weight that gives nothing": (
        ["data=easy_vqa", "+data.train.rare={target:vpt.data.sources.easy_vqa.EasyVQA,weight:0.0003,options:{split:train}}"],
        "weight 0.0003 of data.train is less than a 1000th", "make it 0.002 or more",
    ),
    "a kind of perception": (["data.actions.sam=1"], "data.actions.sam asks for a kind", "none, region, dino"),
    "an action": (["generation.action=dnio"], "generation.action=dnio is nothing that this model can do", "did you mean dino"),
    "an action without its encoder": (["generation.action=sam"], "it knows free, none, region, dino", ""),
    "an action that may not be": (["generation.action=region", "generation.max_actions=0"], "leave one out", ""),
    "a stop": (["generation.stop=['red circle']"], "'red circle' is", "a stop is one token"),
    "encoders that differ": (["model.vision_encoder_ls=[sam]"], "re-encoders configured are ['dino']", "encoder=[sam]"),
    "a missing folder": (["data=vpt", "data.root=/nowhere"], "data.root=/nowhere is not a folder", "data.root=FOLDER"),
    "no folder": (["data=vpt", "model=qwen2_vl_2b"], "data.root is not set", "data.root=FOLDER"),  # before a hub is asked
    "no record file": (["data=vpt", "data.root=docs"], "record file docs/train.json does not exist", "data.root=docs"),
    "missing weights": (["model=qwen2_vl_2b", "model.path=./nowhere"], "./nowhere does not exist", "OWNER/NAME"),
    "a frozen nothing": (["optim.freeze=[nothing.*]"], "pattern 'nothing.*' matches no parameter", ""),
    "all frozen": (["optim.freeze=['*']"], "leaves nothing to train", "optim.unfreeze"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_says_what_to_type(name, tmp_path):
    overrides, message, fix = WRONG[name]
    overrides = [*overrides, f"output_dir={tmp_path}", "tracking=none"]
    with pytest.raises(UserError) as error:  # the steps of train.py, in its order
        check_overrides(overrides, TrainConfig)
        Trainer(compose_config(*overrides), tmp_path / "run")
    assert message in str(error.value) and fix in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overrides", [["+masking.ara_mask_id=1"], ["optim.freeze=[nothing.*]"]])
def test_wrong_input_ends_without_a_traceback(overrides, tmp_path):
    done = run(*overrides, f"output_dir={tmp_path}", "tracking=none")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(("argument", "message"), [
    ("checkpoint=/nowhere", "/nowhere does not exist"),
    (f"checkpoint={ROOT}/conf", "holds no checkpoint"),
    ("checkpont=x", "did you mean checkpoint"),
    ("name=x", "checkpoint has no value"),
])  # fmt: skip
def test_evaluation_of_what_is_no_checkpoint(argument, message):
    with pytest.raises(UserError) as error:  # the steps of eval.py, in its order
        check_overrides([argument], EvalConfig)
        evaluate_checkpoint(compose_eval(argument))
    assert message in str(error.value)


def test_an_evaluation_ends_without_a_traceback():
    done = run("checkpoint=/nowhere", script="eval.py")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_generation_as_trained_but_for_what_is_chosen():
    trained = compose_config("generation.top_k=7", "generation.max_actions=2")
    chosen = generation_settings(trained, {"action": "dino", "temperature": 0.5, "max_actions": 1})
    assert chosen == replace(trained.generation, action="dino", temperature=0.5, max_actions=1)
    for wrong in ({"action": "sam"}, {"temperature": -1.0}, {"top_p": 0.0}, {"action": "dino", "max_actions": 0},
                  {"temprature": 1.0}, {"top_k": "many"}):  # fmt: skip
        with pytest.raises(ConfigError, match="generation"):
            generation_settings(trained, wrong)


def test_a_hub_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("model=qwen2_vl_2b", "model.size=tiny", "tracking=none", f"output_dir={tmp_path}")  # on any machine
    assert done.returncode == 2 and "model.path=FOLDER" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Trainer(compose_config("model=qwen2_vl_2b", f"model.path={tmp_path}", "tracking=none"), tmp_path / "out")


def test_a_typo_in_a_file_stops_the_run(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    path = tmp_path / "conf" / "masking" / "paper.yaml"
    path.write_text(path.read_text().replace("para_mask_id", "ara_mask_id"))
    with pytest.raises(ConfigError, match=r"masking.ara_mask_id is not a key.*masking.para_mask_id"):
        compose_config("masking=paper", conf=tmp_path / "conf")


def test_help_and_cfg_are_readable():
    assert "Configuration groups" in run("--help").stdout
    shown = run("+experiment=dino", "masking=paper", "--cfg", "job").stdout
    assert "para_mask_ratio: 0.5" in shown and "run_name: dino" in shown


def test_interpolated_sizes_follow_the_model():
    small, tiny = compose_typed("+experiment=dino"), compose_typed("+experiment=dino", "model=tiny")
    assert small.encoder["dino"].size == "small" and small.training.batch_size == 16 and small.data.image.detail == 28
    assert tiny.encoder["dino"].size == "tiny" and tiny.training.batch_size == 64 and tiny.data.image.detail is None
    full = compose_config("+experiment=dino", "model=qwen2_vl_2b")
    assert full.encoder["dino"].size == "full" and full.optim.lr == 2e-5 and full.training.batch_size == 256


def test_an_error_can_be_printed_whatever_it_quotes():
    assert str(ConfigError("key=\ud800 and \udcff")) == r"key=\ud800 and \udcff"
