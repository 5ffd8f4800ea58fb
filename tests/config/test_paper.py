"""conf/experiment/paper at full size: the published figures, the chain of stages, and the table that explains them."""

import re
from functools import cache

import pytest

from conftest import ROOT, compose_typed
from vpt.errors import CheckpointError
from vpt.training.trainer import Trainer

FOLDER = ROOT / "conf/experiment/paper"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ALIGNED = [name for name in FILES if name.startswith("alignment")]
TUNED = ["clip", "dino", "dino_free_choice", "sam", "clip_7b", "dino_224"]
ABLATIONS = [name for name in FILES if name.startswith("table")]


@cache
def recipe(name: str, *overrides: str, folder=ROOT):
    return compose_typed(f"+experiment=paper/{name}", f"data.root={folder}", *overrides)


@pytest.mark.parametrize("name", FILES)
def test_full_size_and_one_setting_from_the_stage_before(name):
    config = recipe(name)
    assert config.run_name == f"paper/{name}"
    assert config.model.path == f"Qwen/Qwen2-VL-{'7B' if name == 'clip_7b' else '2B'}-Instruct"
    assert config.optim.warmup_ratio == 0.03 and config.optim.min_lr_ratio == 0 and config.training.precision == "bf16"
    assert config.data.max_length == 2048 and config.data.image.resample == "nearest"
    assert config.data.image.sizing == "upstream"
    assert config.data.image.max_side == (224 if name == "dino_224" else 512)
    assert config.training.batch_size == (128 if name in ALIGNED else 256)
    assert config.training.eval_every == 500
    if config.init_from:
        assert config.init_from.removeprefix("outputs/paper/") in FILES
        assert recipe(name, "init_from=null").init_from is None
        elsewhere = recipe(name, "output_dir=elsewhere")
        assert elsewhere.init_from == config.init_from.replace("outputs", "elsewhere")


def test_alignment():
    """2e-3 on the projector alone, one inner pass, no masking."""
    for name in ALIGNED:
        config = recipe(name)
        assert (config.optim.lr, config.model.num_inner_forward_run) == (2e-3, 1)
        assert (config.masking.para_mask_id, config.init_from) == (0, None)
        assert (config.optim.freeze, config.optim.unfreeze) == (["*"], ["encoders.*.projector.*"])
        assert config.training.steps == 585_000 // 128
        assert config.model.vision_encoder_ls == [name.removeprefix("alignment_")]


def test_instruction_tuning():
    """6,000 steps of 256 at 2e-5, two inner passes, half of the rows masked."""
    for name in TUNED:
        config = recipe(name)
        assert (config.training.steps, config.optim.lr, config.model.num_inner_forward_run) == (6000, 2e-5, 2)
        assert (config.masking.para_mask_id, config.masking.para_mask_ratio) == (1, 0.5)
        assert config.data.action_prompt == (name != "dino_free_choice")
        lora = config.model.lora
        assert (lora.rank, lora.alpha, lora.targets) == ((512, 1024, ["*"]) if name == "clip_7b" else (0, 16, ["*"]))
        encoder = re.search("clip|dino|sam", name)[0]
        assert config.model.vision_encoder_ls == [encoder] and not config.optim.freeze
        after = None if encoder == "clip" else f"outputs/paper/alignment_{encoder}"
        assert config.init_from == after and config.model.projector_scale == 1


def test_tables():
    grids = {name: (c.model.region_bins, c.model.region_format) for name in ABLATIONS if (c := recipe(name))}
    assert [grids[f"table4_k{k}"] for k in (4, 8, 16, 32)] == [(k, "tokens") for k in (4, 8, 16, 32)]
    assert grids["table4_text"] == (1000, "text")
    controls = [recipe(f"table6_dino_{scale}") for scale in (1, 2, 4)]
    assert [config.model.projector_scale for config in controls] == [1, 2, 4]
    assert all(config.masking.para_mask_id == 0 for config in controls)
    for name in ("dino", "clip"):
        masked = recipe(f"table6_{name}_masked")
        assert masked.masking.para_mask_ratio == 0.5 and masked.model.vision_encoder_ls == [name]
        more = recipe("table6_dino_masked_condition" if name == "dino" else "table6_clip_masked_projector")
        assert more.init_from == f"outputs/paper/table6_{name}_masked"
        assert more.optim.unfreeze == ["encoders.*.projector.*_condition.*"] and more.optim.freeze == ["*"]
    assert recipe("table5_without_control_state").model.num_inner_forward_run == 1
    assert not recipe("table6_no_perception").data.perception


def test_the_controls_differ_from_their_runs_in_nothing_else():
    """As many steps on the same records at the same rate."""
    for control, run in (
        ("same_data_baseline", "clip"), ("same_data_same_tokens", "dino"), ("table6_no_perception", "table6_dino_1"),
    ):  # fmt: skip
        a, b = recipe(control), recipe(run)
        assert not a.data.perception and b.data.perception and not a.init_from
        assert (a.training, a.optim.lr, a.data.train, a.data.test) == (
            b.training,
            b.optim.lr,
            b.data.train,
            b.data.test,
        )
    assert recipe("same_data_same_tokens").data.token_matched_images


def test_the_table_names_every_file():
    table = (FOLDER / "README.md").read_text().partition("## Data")[0]
    named = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        first, *rest = re.findall(r"`(\w+)`", row)
        stem = first.rpartition("_")[0]
        named |= {first, *(stem + name if name.startswith("_") else name for name in rest)}
    assert named == set(FILES)
    for name in FILES:
        after = recipe(name).init_from
        row = next(
            line for line in table.splitlines() if f"`{name}`" in line or f"`_{name.rpartition('_')[2]}`" in line
        )
        assert (f"| `{after.rpartition('/')[2]}` |" in row) if after else ("| |" in row), name


def test_a_stage_that_was_not_trained(tmp_path):
    """Said before anything is built."""
    config = recipe("dino", "+debug=easy_vqa", f"output_dir={tmp_path}", folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"init_from=\S+/paper/alignment_dino.*Train that stage first"):
        Trainer(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
