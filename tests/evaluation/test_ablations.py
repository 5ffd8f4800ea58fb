"""Ablations: what each of them changes, for which questions, and that nothing else decides what it draws."""

import json
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch

from conftest import ALL, compose_config, compose_eval
from vpt.checkpoint.load import build_model
from vpt.data.collate import collate
from vpt.errors import ConfigError
from vpt.evaluation.ablations.attention import AttentionMeasured
from vpt.evaluation.ablations.base import AblationContext
from vpt.evaluation.ablations.evidence import FeaturesEvidence, TokensOfEvidence
from vpt.evaluation.ablations.features import (
    FeaturesBlank,
    FeaturesNoise,
    FeaturesRepeated,
    FeaturesSwapped,
    FeaturesZeroed,
    MarkersOnly,
)
from vpt.evaluation.ablations.kinds import kinds_table, scores_by_kind
from vpt.evaluation.ablations.regions import RegionOracle, RegionRandom, RegionWhole
from vpt.evaluation.ablations.requests import NoPerception, gain_table, perception_gain
from vpt.evaluation.ablations.runner import (
    Comparison,
    ablation_table,
    as_json,
    check_ablations,
    compare_answers,
    corrected,
    details_table,
    from_json,
    gain_of,
    run_ablations,
)
from vpt.evaluation.ablations.states import StateShuffled, StateShuffledWithinImage, StateZeroed
from vpt.evaluation.evaluator import answer_questions
from vpt.evaluation.metrics.base import Metric
from vpt.evaluation.predictions import read_predictions
from vpt.evaluation.questions import questions
from vpt.evaluation.statistics import Ratio
from vpt.evaluation.summary import metrics_of
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region

FEATURES = (
    NoPerception, FeaturesZeroed, FeaturesNoise, FeaturesBlank, FeaturesRepeated, FeaturesSwapped, MarkersOnly,
    AttentionMeasured,
)  # fmt: skip
STATES = (StateZeroed, StateShuffled, StateShuffledWithinImage, FeaturesEvidence)
REGIONS = (RegionRandom, RegionWhole, RegionOracle)
NODES = compose_eval("checkpoint=x", "+ablations=all").ablations
QUESTIONS = 16  # of two images


class Bench:
    """A tiny model and its answers without ablation, begun by one kind of action."""

    def __init__(self, action, folder):
        self.config = compose_config(*ALL, f"generation.action={action}", "generation.max_new_tokens=14")
        torch.manual_seed(0)
        self.parts = build_model(self.config)
        self.asked = questions(self.config, limit=QUESTIONS)
        self.plain = answer_questions(self.parts, self.config, self.asked, folder, weights="w")
        self.setting = AblationContext(self.parts, self.config, self.asked, self.plain)
        self.ablated = folder / "ablated"

    @cached_property
    def compared(self):
        """All comparisons; the answers are in `ablated`."""
        return self.run(self.ablated)

    def run(self, folder, *, batch_size=256, nodes=NODES):
        config = replace(self.config, generation=replace(self.config.generation, batch_size=batch_size))
        return run_ablations(
            self.parts, config, self.asked, self.plain, folder, nodes=nodes, metrics=metrics_of(config.data),
            weights="w",
        )  # fmt: skip


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    return {action: Bench(action, tmp_path_factory.mktemp(action)) for action in ("none", "region", "dino")}


def answers(folder):
    return {path.parent.name: [(item.record, item.answer, item.trace[:1] and item.trace[0].box)
            for item in read_predictions(path)] for path in folder.glob("*/predictions.jsonl")}  # fmt: skip


@pytest.mark.parametrize(("action", "concerned"), [
    ("none", ()), ("dino", (*FEATURES, *STATES)), ("region", (*FEATURES, *REGIONS)),
])  # fmt: skip
def test_they_concern_answers_that_perceive_in_their_way(benches, action, concerned):
    bench = benches[action]
    for kind in (*FEATURES, *STATES, *REGIONS):
        ablation = kind(bench.setting)
        assert all(ablation.applies_to(item) for item in bench.plain) == (kind in concerned)
    compared = bench.compared
    gap = {"crop_gap"} if action == "region" else set()
    assert {name for name, found in compared.items() if found.questions == QUESTIONS} == gap | {
        name for name, node in NODES.items() if node.target.rpartition(".")[2] in {kind.__name__ for kind in concerned}
    }
    assert len(ablation_table(compared).as_text().splitlines()) == 1 + len(NODES) + len(gap)
    details = details_table(compared)
    assert (details is None) == (action == "none")
    if details:
        told = {row[0] for row in details.rows}
        assert (
            told >= {f"state cosine dino ({name})" for name in ("state_shuffled", "state_shuffled_within_image")}
        ) == (action == "dino")
        assert "attention to perceived (attention_measured)" in told
        assert all(-1 <= low <= value <= high <= 1.0001 for _, value, (low, high), _ in details.rows)


DRAWN = ["features_noise", "features_swapped", "region_random", "state_shuffled", "state_shuffled_within_image"]


@pytest.mark.parametrize("action", ["dino", "region"])
@pytest.mark.parametrize("names", [DRAWN, pytest.param([*NODES], marks=pytest.mark.slow)], ids=["drawn", "all"])
def test_no_answer_depends_on_its_batch(benches, action, names, tmp_path):
    assert benches[action].compared
    benches[action].run(tmp_path, batch_size=5, nodes={name: NODES[name] for name in names})
    together = answers(benches[action].ablated)
    assert answers(tmp_path) == {name: said for name, said in together.items() if name in names}


def test_regions_that_are_shown(benches):
    bench = benches["region"]
    assert bench.compared
    boxes = {name: [box for _, _, box in found] for name, found in answers(bench.ablated).items()}
    own = [item.region for item in bench.plain]
    assert boxes["features_zeroed"] == own
    assert boxes["region_whole"] == [(0, 0, 64, 64)] * QUESTIONS
    true = [Region.from_box(item.box, (64, 64), bins=8).to_box((64, 64), bins=8) for item in bench.plain]
    assert boxes["region_oracle"] == true
    for (x0, y0, x1, y1), (a0, b0, a1, b1) in zip(boxes["region_random"], own, strict=True):
        assert (x1 - x0, y1 - y0) == (a1 - a0, b1 - b0)
    moved = [random != shown for random, shown in zip(boxes["region_random"], own, strict=True)]
    assert all(moved[place] for place, box in enumerate(own) if box != (0, 0, 64, 64))


def test_what_takes_the_place_of_an_image(benches):
    bench = benches["dino"]
    question = bench.asked[0]
    own = question.folder.original(question.record.images[VISION_TOWER][0], where="")
    blank = FeaturesBlank(bench.setting).image(own, record=question.record)
    assert blank.size == own.size and blank.getcolors() == [(own.width * own.height, (128, 128, 128))]
    shown = np.asarray(FeaturesEvidence(bench.setting).image(own, record=question.record))
    x0, y0, x1, y1 = question.record.box
    inside = np.zeros(shown.shape[:2], dtype=bool)
    inside[y0:y1, x0:x1] = True
    assert (shown[inside] == np.asarray(own)[inside]).all() and (shown[~inside] == 128).all()


def test_the_first_look_again_is_what_the_first_look_was(benches):
    """A row's tokens in the prompt, from the model's own encoding of it, over and over."""
    bench = benches["dino"]
    parts, question = bench.parts, bench.asked[0]
    batch = collate([parts.processor.encode_prompt(question.record, question.folder)])
    with torch.no_grad():
        first = parts.model.project_features(parts.model.encode_images(batch.images), batch)[VISION_TOWER]
        again = FeaturesRepeated(bench.setting).tokens(
            torch.zeros(37, first.shape[1]), source="dino", record=question.record
        )
    assert torch.allclose(again, first.repeat(37 // len(first) + 1, 1)[:37], atol=1e-6) and len(first) < 37


@pytest.mark.parametrize("action", ["dino", "region"])
def test_attention_to_what_was_perceived(benches, action):
    """Weights of queries that are zero attend to all alike: then the share of attention is that of positions. And nothing
    is changed."""
    bench = benches[action]
    parts = build_model(bench.config)
    for layer in parts.model.language.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.q_proj.bias)
    setting = AblationContext(parts, bench.config, bench.asked, bench.plain)
    ablation = AttentionMeasured(setting, questions=5)
    assert sum(map(ablation.applies_to, bench.plain)) == 5
    found = ablation.details(bench.plain, bench.plain, {})
    for name in ("perceived", "first_look"):
        attention, positions = found[f"attention_to_{name}"], found[f"{name}_positions"]
        assert attention.value == pytest.approx(positions.value, rel=1e-5) and 0.02 < positions.value < 0.9
    own = AttentionMeasured(bench.setting, questions=5).details(bench.plain, bench.plain, {})
    assert own["perceived_positions"].value == pytest.approx(found["perceived_positions"].value, rel=0.2)
    assert own["attention_to_perceived"].value != pytest.approx(own["perceived_positions"].value, rel=1e-3)


def test_states_of_another_question_about_the_same_image(benches):
    bench = benches["dino"]
    ablation = StateShuffledWithinImage(bench.setting)
    numbers = {question.record.where: number for number, question in enumerate(bench.asked)}
    donors = {name: ablation._donor(bench.asked[number].record, "dino") for name, number in numbers.items()}
    images = [question.record.image for question in bench.asked]
    assert all(images[donor] == images[numbers[name]] and donor != numbers[name] for name, donor in donors.items())
    alone = AblationContext(bench.parts, bench.config, bench.asked[:1], bench.plain[:1])
    assert not StateShuffledWithinImage(alone).applies_to(bench.plain[0])


def test_another_image_is_another_image(benches):
    bench = benches["dino"]
    ablation = FeaturesSwapped(bench.setting)
    assert len(ablation.images) == 2
    for question in bench.asked:
        own = question.folder.original(question.record.images[VISION_TOWER][0], where="")
        assert ablation.image(own, record=question.record).tobytes() != own.tobytes()
    alone = AblationContext(bench.parts, bench.config, bench.asked[:1], bench.plain[:1])
    assert not FeaturesSwapped(alone).applies_to(bench.plain[0])


def test_tokens_of_evidence_are_those_over_the_box(benches):
    bench = benches["dino"]  # images of 64 pixels, 4 x 4 tokens
    ablation = TokensOfEvidence(bench.setting)
    assert all(map(ablation.applies_to, bench.plain)) and not any(map(ablation.applies_to, benches["region"].plain))
    record = replace(bench.asked[0].record, box=(17, 0, 32, 40))
    kept = ablation.tokens(torch.ones(16, 3), source="dino", record=record).view(4, 4, 3)
    assert kept[:3, 1].all() and kept.sum() == 9


def test_scores_apart_for_what_was_perceived(benches):
    region, dino = benches["region"], benches["dino"]
    metrics = metrics_of(region.config.data)
    mixed = [*region.plain[:6], *dino.plain[6:]]
    plain = scores_by_kind(mixed, mixed, metrics)
    assert {kind: estimate.questions for kind, estimate in plain.items()} == {"dino": 10, "region": 6}
    found = Comparison.of("other", mixed[:6], mixed[:6], metrics)
    assert found.kinds["region"].value == plain["region"].value
    _, own, other = kinds_table(plain, {"other": found.kinds}).as_text().splitlines()
    assert own.count("[") == 2 and other.split()[1] == "-"


def test_noise_has_the_moments_of_the_features(benches):
    bench = benches["dino"]
    ablation = FeaturesNoise(bench.setting)
    first, second = (question.record for question in bench.asked[:2])
    like = torch.zeros(16, bench.parts.model.language.config.hidden_size)
    with torch.no_grad():
        noise = [ablation.tokens(like, source="dino", record=record) for record in (first, second, first)]
        features = ablation._features("dino")
        many = ablation.tokens(like.repeat(1000, 1), source="dino", record=first)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    deviation = features.std(dim=0)
    torch.testing.assert_close(many.mean(dim=0), features.mean(dim=0), rtol=0, atol=0.05 * deviation.max().item())
    torch.testing.assert_close(many.std(dim=0), deviation, rtol=0.05, atol=1e-6)


def test_shuffled_states_are_those_of_another_question(benches):
    bench = benches["dino"]
    ablation = StateShuffled(bench.setting)
    records = [question.record for question in bench.asked]
    with torch.no_grad():
        ablation.on_batch(records)
        given = {record.where: ablation.states(torch.zeros(1, 1), kind="dino", record=record) for record in records}
        own = {}
        for question, said in zip(bench.asked, answers_with_their_states(bench), strict=True):
            own[question.record.where] = said.states[0]
    for where, states in given.items():
        near = {other: (states - theirs).abs().max().item() for other, theirs in own.items()}
        assert min(near.values()) < 1e-4 < near[where]


def answers_with_their_states(bench):
    from vpt.evaluation.evaluator import answer_batch

    return answer_batch(StateShuffled(bench.setting).generator, bench.asked)


def test_what_is_no_ablation_stops_before_anything_runs():
    nodes = compose_eval("checkpoint=x", "+ablations=all").ablations
    check_ablations(nodes)
    nodes["features_noise"].options = {"imges": 3}
    with pytest.raises(ConfigError, match=r"features_noise.options.imges is not an option.*did you mean images"):
        check_ablations(nodes)
    nodes["features_noise"].target = "vpt.perception.regions.Region"
    with pytest.raises(ConfigError, match="is no Ablation"):
        check_ablations(nodes)
    with pytest.raises(ConfigError, match=r"ablations.x.traget is not a key"):
        compose_eval("checkpoint=x", "+ablations.x={traget: a.b}")


def test_a_difference_is_of_the_same_questions(benches):
    bench = benches["dino"]
    metrics = metrics_of(bench.config.data)
    same = compare_answers("itself", bench.plain, bench.plain[::-1], metrics)
    assert (same.difference.value, same.p, same.questions) == (0.0, 1.0, QUESTIONS)
    with pytest.raises(ConfigError, match="does not answer 1 of the 16 questions"):
        compare_answers("another", bench.plain, bench.plain[1:], metrics)
    asked = [replace(bench.plain[0], record=str(n), images={VISION_TOWER: [f"{n}.png"]}) for n in range(20)]
    before, after = ([replace(item, answer=item.target if n < right else "?") for n, item in enumerate(asked)]
                     for right in (12, 2))  # fmt: skip
    found = Comparison.of("", before, after, metrics)
    assert found.difference.value == -0.5 and found.difference.high < 0 and found.p == pytest.approx(2 / 2**10)
    assert 0.2 < found.smallest < 0.5
    both = corrected({"a": found, "b": Comparison("", 0), "c": replace(found, p=0.04)})
    assert [item.p_holm for item in both.values()] == pytest.approx([2 * found.p, None, 0.04])
    assert from_json(json.loads(json.dumps(as_json(both)))) == both


def test_the_split_of_what_perception_gains():
    """Eight questions, counted by hand: right with perception, right without, whether it perceived."""
    counted = [(1, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 1), (1, 1, 0), (0, 0, 0), (1, 0, 0)]
    right, before, acted = (np.array(values, dtype=float) for values in zip(*counted, strict=True))
    one = np.ones(8)
    found = perception_gain(Ratio(right, one), Ratio(before, one), acted.astype(bool))
    assert {name: estimate.value for name, estimate in found.items()} == {
        "with_perception": 5 / 8, "without_perception": 3 / 8, "gain": 2 / 8, "call_gain": 2 / 8, "call_harm": 1 / 8,
        "schema_gain": 1 / 8, "schema_harm": 0, "trigger_rate": 5 / 8, "trigger_rate_where_needed": 3 / 5,
        "trigger_rate_where_needless": 2 / 3,
    }  # fmt: skip
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in found.values())


@pytest.mark.parametrize("action", ["none", "dino"])
def test_without_perception_a_question_is_answered_as_if_it_were_forbidden(benches, action):
    bench = benches[action]
    compared = bench.compared
    gain = gain_of(compared)
    if action == "none":  # nothing to forbid
        assert compared["no_perception"].questions == 0 and not gain
        return
    ablated = read_predictions(bench.ablated / "no_perception/predictions.jsonl")
    assert [item.answer for item in ablated] == [item.answer for item in benches["none"].plain]
    assert not any(item.trace for item in ablated)
    assert gain["trigger_rate"].value == 1 and gain["gain"].value == pytest.approx(
        gain["with_perception"].value - gain["without_perception"].value
    )
    assert from_json(json.loads(json.dumps(as_json(compared)))) == compared
    assert "trigger rate where needed" in gain_table(gain).as_text()


def test_questions_that_do_not_count_are_none_of_the_split():
    """As of a metric for some questions only: the fourth of four counts nowhere."""
    counts = np.array([1.0, 1.0, 1.0, 0.0])
    right, before = Ratio(np.array([1.0, 1.0, 0.0, 0.0]), counts), Ratio(np.array([0.0, 1.0, 0.0, 0.0]), counts)
    found = perception_gain(right, before, np.array([True, True, False, True]))
    values = {name: (estimate.value, estimate.questions) for name, estimate in found.items()}
    assert values["with_perception"] == (2 / 3, 3) and values["call_gain"] == (1 / 3, 3)
    assert values["trigger_rate"] == (2 / 3, 3)
    assert values["trigger_rate_where_needed"] == (1 / 2, 2) and values["trigger_rate_where_needless"] == (1, 1)


class Relative(Metric):
    """A score that depends on which questions are scored together, as CIDEr-D's does."""

    NAME = "relative"

    def measure(self, items):
        return {self.NAME: Ratio.mean([1 / len(items)] * len(items))}


def test_both_sides_of_a_comparison_are_scored_over_the_same_questions(benches, tmp_path):
    bench = benches["region"]
    few = [replace(item, trace=[]) if number % 2 else item for number, item in enumerate(bench.plain)]
    nodes = {"region_whole": NODES["region_whole"]}
    metrics = {name: [Relative()] for name in bench.config.data.test}
    found = run_ablations(
        bench.parts, bench.config, bench.asked, few, tmp_path, nodes=nodes, metrics=metrics, weights="w"
    )["region_whole"]
    assert found.questions == QUESTIONS // 2 and found.reference == found.ablated == 2 / QUESTIONS
