"""Names of version 0.1: typed, they stop the run with the present name; in files, they are read."""

import json
from dataclasses import fields

import pytest

from conftest import ROOT
from vpt.config.evaluation import EvalConfig
from vpt.config.former_names import (
    FORMER_KEYS,
    FORMER_METRICS,
    FORMER_TARGETS,
    FORMER_VALUES,
    present_metric,
    present_name,
    with_present_names,
    with_present_results,
)
from vpt.config.overrides import check_overrides
from vpt.config.resolve import key_paths
from vpt.config.schema import GenerationConfig, TrainConfig
from vpt.config.targets import locate
from vpt.errors import ConfigError
from vpt.estimate.settings import EstimateConfig
from vpt.reporting.panels import SECTIONS

SCHEMAS = {"train": TrainConfig, "eval": EvalConfig, "describe": EstimateConfig}
KEYS = {key for schema in SCHEMAS.values() for key in key_paths(schema)}
FORMER = json.loads((ROOT / "tests/data/version_0_1/keys.json").read_text())  # every key that version 0.1 had


def schema_of(present: str) -> type:
    return next(schema for schema in SCHEMAS.values() if present in key_paths(schema))


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("former", FORMER_KEYS)
def test_a_former_key_stops_with_the_present_one(former, plus):
    present = FORMER_KEYS[former]
    typed, answer = former.replace("*", "dino"), present.replace("*", "dino")
    assert present in KEYS and former not in KEYS
    with pytest.raises(ConfigError, match=rf"{typed} is now {answer}$"):
        check_overrides([f"{plus}{typed}=1"], schema_of(present))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_key_of_version_0_1_is_a_key_or_has_a_present_name(kind):
    known = set(key_paths(SCHEMAS[kind])) | {f"generation.{item.name}" for item in fields(GenerationConfig)}
    assert FORMER[kind] and [key for key in FORMER[kind] if (present_name(key) or key) not in known] == []


def test_a_saved_configuration_has_the_present_keys_values_and_classes():
    former = {
        "optim": {"clip": 1.0, "lr": 0.1},
        "data": {
            "on_too_long": "cut",
            "image": {"upright": True},
            "train": {"a": {"target": "vpt.data.sources.records.RecordFile"}},
        },
        "encoder": {"eye": {"token": "look", "target": "vpt.encoders.clip.TowerEncoder"}},
        "init_except": ["cut"],
    }
    assert with_present_names(former) == {
        "optim": {"max_grad_norm": 1.0, "lr": 0.1},
        "data": {
            "overflow": "truncate", "image": {"apply_exif_rotation": True},
            "train": {"a": {"target": "vpt.data.sources.record_files.RecordFile"}},
        },
        "encoder": {"eye": {"token_prefix": "look", "target": "vpt.encoders.qwen_vit.QwenViTEncoder"}},
        "init_exclude": ["cut"],
    }  # fmt: skip
    assert with_present_names(with_present_names(former)) == with_present_names(former)
    assert all(key in KEYS for key, _ in FORMER_VALUES)


@pytest.mark.parametrize("former", FORMER_TARGETS)
def test_a_former_class_is_found_under_its_present_name(former):
    kind = "vpt.encoders.base.ReEncoder" if ".encoders." in former else "vpt.data.sources.base.Source"
    assert locate(former, "x", kind) is locate(FORMER_TARGETS[former], "x", kind)


@pytest.mark.parametrize("former", FORMER_METRICS)
def test_a_former_metric_is_drawn_as_the_present_one(former):
    present = FORMER_METRICS[former]
    shown = [panel for panels in SECTIONS.values() for panel in panels if panel.shown([present])]
    assert shown and present_metric(former) == present_metric(present) == present
    assert present_metric(f"{former}/dino") == f"{present}/dino"
    assert present_metric(f"{former}s") == f"{former}s"


def test_results_of_version_0_1_have_the_present_keys():
    former = {
        "accuracy": 1.0,
        "requests_mended": 3,
        "cut_off": 1,
        "metrics": {"plain": {"exact_match": {}}},
        "controls": {"plain": {"about": "x", "questions": 2, "plain": 0.5, "changed": 0.25}},
        "perception": {"same_kind": {}, "seconds": {}, "confusion": {"none": {}}},
    }
    assert with_present_results(former) == {
        "accuracy": 1.0,
        "requests_repaired": 3,
        "truncated": 1,
        "metrics": {"plain": {"exact_match": {}}},
        "ablations": {"plain": {"description": "x", "questions": 2, "reference": 0.5, "ablated": 0.25}},
        "perception": {"action_accuracy": {}, "latency_seconds": {}, "confusion": {"none": {}}},
    }
    assert with_present_results({}) == {}
