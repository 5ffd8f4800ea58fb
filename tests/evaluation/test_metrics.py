"""Metrics equal what is known of them: published rules, worked examples, other routes to the same number."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import ConfigError
from vpt.evaluation.metrics import METRICS, build_metrics
from vpt.evaluation.metrics.captions import treebank_words
from vpt.evaluation.metrics.perception import PERCEPTION, ActionChoice, RegionQuality, confusion, iogt, iou
from vpt.evaluation.metrics.vqa import normalise as vqa_normalise
from vpt.evaluation.predictions import Prediction, repeat_name
from vpt.evaluation.statistics import Ratio, difference, estimates, holm, paired_p, smallest_difference
from vpt.evaluation.summary import headline, image_clusters, metrics_table, summarise
from vpt.generation.row_state import IGNORED, REPAIRED, PerceptionStep


def said(answer: str, *accepted: str, **more) -> Prediction:
    return Prediction("record", "question", accepted[0], answer, False, accepted=list(accepted), **more)


def values(name: str, *items: Prediction) -> dict[str, float]:
    (metric,) = build_metrics([name], key="data.metrics")
    return {key: ratio.value for key, ratio in metric.measure(items).items()}


@pytest.mark.parametrize(("answer", "accepted", "want"), [
    ("The red circle.", ["a Red circle"], 1),
    ("red", ["blue", "red"], 1),
    ("reddish", ["red"], 0),
    ("", ["red"], 0),
    ("", [""], 1),
    ("a vase", ["vase"], 1),
    ("A.", ["A"], 1),
    ("(a)", ["A"], 1),
    *[(answer, ["A"], 0) for answer in ("", "...", "…", "?", "the", "vitamin A", "A, B")],
    ("A, B", ["B"], 0),
    ("vitamin", ["vitamin A"], 0),
    *[(one, [other], 0) for one, other in (
        ("3.5", "35"), ("$1.50", "$150"), ("-5", "5"), ("10:30", "1030"), ("5-10", "510"), ("1/2", "12"), ("1,5", "15"),
        (".5", "5"), ("−5 °C", "5 °C"), ("-$5", "$5"), ("$5", "€5"), ("5%", "$5"), ("<5", ">5"), ("5²", "52"),
        ("3½", "31/2"), ("O-", "O+"), ("C", "C++"), ("1.000", "1,000"),
    )],
    *[(one, [other], 1) for one, other in (
        ("1,000", "1000"), ("12,345.50.", "12345.50"), ("$1.50", "1.50"), ("0.5", ".5"), ("+5", "5"), ("−5", "-5"),
        ("10:30 a.m.", "10:30 am"), ("5–10", "5-10"), ("It’s", "it's"), ("‘A’", "A"), ("café", "cafe\u0301"),
        ("ＮＯ！", "no"), ("ﬁre", "fire"), ("a\u00a0red\u200b cup", "red cup"), ("STRASSE", "straße"), ("红。", "红"),
    )],
])  # fmt: skip
def test_exact_match(answer, accepted, want):
    assert values("exact_match", said(answer, *accepted))["exact_match"] == want


@pytest.mark.parametrize(("answer", "accepted", "want"), [
    ("Paris", ["paris"], 1),
    ("hallo", ["hello"], 1 - 1 / 5),  # one of five letters
    ("abcd", ["abef"], 0),  # half of it: not above the threshold
    ("abcde", ["abcdf", "abcde"], 1),  # the nearest one counts
    ("3,14", ["3.14"], 1 - 1 / 4),
    ("It’s  a Café", ["it's a cafe\u0301"], 1),
    ("", ["A"], 0),
])  # fmt: skip
def test_anls(answer, accepted, want):
    assert values("anls", said(answer, *accepted))["anls"] == pytest.approx(want)


@pytest.mark.parametrize(("same", "want"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people(same, want):
    """The published values for so many of ten people who gave the answer."""
    people = ["cat"] * same + [f"dog {number}" for number in range(10 - same)]
    assert values("vqa_accuracy", said("cat", *people))["vqa_accuracy"] == pytest.approx(want)


@pytest.mark.parametrize(("text", "want"), [
    ("The  Cat's\nhat", "cat's hat"),
    ("two dogs, and one cat", "2 dogs and 1 cat"),
    ("dont", "don't"),
    ("couldnt've wouldntve", "couldn't've wouldn't've"),
    ("1,000", "1000"),
    ("It is 1.5 m.", "it is 1.5 m"),
    ("there are 3.", "there are 3"),
    ("black/white", "black white"),
    ("yes , it is!", "yes it is"),
    ("none", "0"),
    ("A", "a"),
    ("...", "..."),
    ("don’t", "don't"),
])  # fmt: skip
def test_vqa_normalisation(text, want):
    assert vqa_normalise(text) == want


def test_yes_no():
    """Three of four questions to be answered by yes; one `yes` to a no; one answer that is neither."""
    items = [said("Yes, it is.", "yes"), said("yes", "yes"), said("There is no dog.", "yes"), said("yes", "no"),
             said("a dog", "no"), said("red", "red")]  # fmt: skip
    got = values("yes_no", *items)
    want = {"yes_no_accuracy": 2 / 5, "yes_precision": 2 / 3, "yes_recall": 2 / 3, "yes_f1": 2 / 3, "yes_rate": 3 / 5}
    assert got == pytest.approx(want)


def test_what_was_asked_for_is_in_the_summary_with_a_reason_where_it_is_no_number():
    metrics = {"test": build_metrics(["yes_no", "exact_match"], key="data.metrics")}
    summary = summarise([said("red", "red"), said("yes", "blue")], metrics)
    found = json.loads(json.dumps(summary, allow_nan=False))["metrics"]["test"]
    assert found["yes_no_accuracy"]["value"] is None and found["exact_match"]["value"] == 0.5
    assert "there are no targets that are yes or no" in metrics_table(summary).as_text()
    no = summarise([said("no", "no")], metrics)["metrics"]["test"]
    assert no["yes_no_accuracy"]["value"] == 1 and no["yes_precision"]["reason"].startswith("there are no answers yes")
    assert summarise([], metrics) == {"questions": 0} and headline({"questions": 0}) == "no test question was asked"


def test_rouge_l():
    """The longest common subsequence of `police killed the gunman` and `police kill the gunman` has 3 of 4 words."""
    assert values("rouge_l", said("police kill the gunman", "police killed the gunman"))["rouge_l"] == 0.75
    best = said("police kill the gunman", "nothing of it", "police kill the gunman")
    assert values("rouge_l", best)["rouge_l"] == 1


@pytest.mark.parametrize(("answer", "target", "want"), [
    ("红色的圆", "红色的圆。", 1),
    ("红色的圆", "红色方块", 2 * 2 / 8),  # a word is a letter here
    ("Красный круг!", "красный круг", 1),
    ("красный шар", "красный круг", 0.5),
    ("हिन्दी भाषा", "हिन्दी", 2 / 3),
    ("cafe\u0301 au lait", "Café", 0.5),
    ("iPhone手机", "iphone 手 机", 1),
    ("don't", "don’t", 1),
    ("", "红", 0),
])  # fmt: skip
def test_rouge_l_of_any_script(answer, target, want):
    assert values("rouge_l", said(answer, target))["rouge_l"] == pytest.approx(want)


def test_cider_d():
    """10 for the references themselves, 0 for nothing in common, the same for other case and punctuation, less for a
    word said again and again (the D).
    """
    truth = ["a cat sits on the mat", "a man rides a brown horse", "two dogs run over a field"]
    same = [said(text.capitalize() + ".", text) for text in truth]
    assert values("cider_d", *same)["cider_d"] == pytest.approx(10)
    other = [said("an unrelated remark altogether", text) for text in truth]
    assert values("cider_d", *other)["cider_d"] == 0
    again = [said(f"{text} {text.split()[-1]} {text.split()[-1]}", text) for text in truth]
    assert 0 < values("cider_d", *again)["cider_d"] < 9


def test_words_of_cider_d_are_the_originals():
    """Cut by its own program; punctuation in its list is dropped, and nothing else. A text is one line, also an empty
    one, so that the words stay with their texts.
    """
    want = {
        "A dog. A cat.": "a dog a cat", "": "", "50 % & $ #": "50 % & $ #", "It's (left);\nshe can't": "it 's -lrb- left -rrb- she ca n't",
        "U.S. flag\u2028Mr. X": "u.s. flag mr. x", " ": "", "«Да», 红。": "да 红 。",
    }  # fmt: skip
    assert dict(zip(want, treebank_words([*want]), strict=True)) == want


boxes = st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 1, max(b[1], b[3]) + 1)
)


@given(boxes, boxes)
def test_boxes_equal_counting_pixels(a, b):
    masks = np.zeros((2, 14, 14), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, (a, b), strict=True):
        mask[y0:y1, x0:x1] = True
    shared, union = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    assert iou(a, b) == pytest.approx(shared / union)
    assert iogt(a, b) == pytest.approx(shared / masks[1].sum())


def test_region_quality_counts_regions_with_a_true_box():
    items = [
        said("", "x", box=(0, 0, 2, 2), trace=[PerceptionStep("dino"), PerceptionStep("region", box=(0, 0, 4, 2))]),
        said("", "x", box=(0, 0, 2, 2), trace=[PerceptionStep("dino")]),
        said("", "x", trace=[PerceptionStep("region", box=(0, 0, 4, 2))]),
        said("", "x", box=(0, 0, 2, 2), trace=[PerceptionStep("region", status=IGNORED)]),
    ]
    found = RegionQuality().measure(items)
    assert found["region_iou"].value == 0.5 and found["region_iogt"].value == 1
    assert found["region_iou"].questions == 1


def test_free_choice():
    def item(asked, chosen):
        return said("", "x", expected_actions=asked, trace=[PerceptionStep(kind) for kind in chosen])

    items = [item(["region"], ["region"]), item(["region"], ["dino"]), item(["dino"], []), item([], ["dino"]),
             item([], [])]  # fmt: skip
    found = {name: ratio.value for name, ratio in ActionChoice().measure(items).items()}
    assert found == pytest.approx({"action_precision": 2 / 3, "action_recall": 2 / 3, "action_accuracy": 2 / 5})
    assert confusion(items) == {
        "dino": {"none": 1}, "none": {"dino": 1, "none": 1}, "region": {"dino": 1, "region": 1},
    }  # fmt: skip


def test_what_was_repaired_ignored_and_truncated_is_counted():
    items = [said("", "x", trace=[PerceptionStep("region", status=REPAIRED), PerceptionStep("region", status=IGNORED)]),
             said("", "x", complete=False, trace=[PerceptionStep("dino"), PerceptionStep("region", status=IGNORED)])]  # fmt: skip
    summary = summarise([replace(item, source="test") for item in items], {"test": [METRICS["exact_match"]()]})
    assert [summary[key] for key in ("requests_repaired", "requests_ignored", "truncated")] == [1, 2, 1]
    assert summary["perceptions"] == {"region": 1, "dino": 1}


def test_what_perceiving_costs():
    """Tokens of what was seen, not of what was ignored; time of every question."""
    items = [said("", "x", seconds=0.5, trace=[PerceptionStep("dino", visual_tokens=16), PerceptionStep("region", visual_tokens=4)]),
             said("", "x", seconds=1.0, trace=[PerceptionStep("region", status=IGNORED, visual_tokens=4)])]  # fmt: skip
    found = {name: ratio.value for metric in PERCEPTION for name, ratio in metric.measure(items).items()}
    assert (found["extra_visual_tokens"], found["latency_seconds"]) == (10, 0.75)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_takes_no_questions_and_empty_answers(name):
    (metric,) = build_metrics([name], key="data.metrics")
    assert all(math.isnan(ratio.value) for ratio in metric.measure([]).values())
    assert all(len(ratio.numerator) == 2 for ratio in metric.measure([said("", "yes"), said("", "a cat")]).values())


def test_a_missing_package_and_a_wrong_name_say_what_to_type(monkeypatch):
    with pytest.raises(ConfigError, match=r"exact_mach is not a metric; did you mean exact_match"):
        build_metrics(["exact_mach"], key="data.metrics")
    with pytest.raises(ConfigError, match="is no Metric"):
        build_metrics(["vpt.perception.regions.Region"], key="data.metrics")
    assert build_metrics(["vpt.evaluation.metrics.vqa.VQAAccuracy"], key="data.metrics")
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz", None)
    with pytest.raises(ConfigError, match=r"anls needs the package rapidfuzz; type: pip install 'vpt\[metrics\]'"):
        build_metrics(["anls"], key="data.metrics")


def test_intervals_equal_those_of_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    part, whole = generator.random(400), generator.integers(0, 2, 400).astype(float)
    part *= whole
    ours = estimates({"score": Ratio(part, whole)})["score"]
    theirs = scipy_stats.bootstrap(
        (part, whole), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=5000, rng=2,
    ).confidence_interval  # fmt: skip
    spread = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * spread)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * spread)


def test_a_paired_difference_is_surer_than_two_runs():
    """Questions differ more than runs do: the interval of the difference is that of the differences' mean."""
    generator = np.random.default_rng(1)
    hard = generator.random(2000)
    one, two = Ratio.mean(hard.tolist()), Ratio.mean((hard + 0.01 + 0.01 * generator.standard_normal(2000)).tolist())
    found = difference(one, two)
    assert found.value == pytest.approx(0.01, abs=0.001)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.01 / math.sqrt(2000), rel=0.1)
    single = estimates({"one": one})["one"]
    assert single.high - single.low > 10 * (found.high - found.low)


@pytest.mark.parametrize(("won", "lost", "p"), [(10, 2, 2 * (1 + 12 + 66) / 2**12), (3, 3, 1.0), (0, 0, 1.0)])
def test_mcnemar(won, lost, p):
    one = Ratio.mean([0.0] * won + [1.0] * lost + [1.0, 0.0] * 5)
    two = Ratio.mean([1.0] * won + [0.0] * lost + [1.0, 0.0] * 5)
    assert paired_p(one, two) == pytest.approx(p)
    assert paired_p(one, Ratio.mean([None] + [1.0] * (len(one.numerator) - 1))) is None
    halves = [Ratio(side.numerator / 2, side.denominator) for side in (one, two)]
    assert paired_p(*halves) == pytest.approx(p, abs=0.01)  # other scores, by flipping signs: 2 to the 12 of them


def test_flipped_signs_equal_scipy_s_permutation_test():
    stats = pytest.importorskip("scipy.stats")
    change = np.random.default_rng(3).standard_normal(40) + 0.3
    ours = paired_p(Ratio.mean([0.0] * 40), Ratio(change, np.ones(40)))
    theirs = stats.permutation_test(
        (change, np.zeros(40)), lambda a, b, axis: (a - b).sum(axis), permutation_type="samples", vectorized=True,
        n_resamples=20_000, rng=1,
    ).pvalue  # fmt: skip
    assert ours == pytest.approx(theirs, abs=0.01) and 0.001 < ours < 0.2


def test_questions_about_one_image_count_as_one():
    """Each of 100 images asked about four times, with the same answer: the interval is that of 100 questions."""
    generator = np.random.default_rng(1)
    one, two = (Ratio.mean(generator.integers(0, 2, 100).astype(float).tolist()) for _ in range(2))
    many = [Ratio(np.repeat(side.numerator, 4), np.repeat(side.denominator, 4)) for side in (one, two)]
    images = np.repeat(np.arange(100), 4)
    assert difference(*many, images) == replace(difference(one, two), questions=400)
    assert paired_p(*many, images) == pytest.approx(paired_p(one, two), abs=0.02)
    assert smallest_difference(*many, images) == pytest.approx(smallest_difference(one, two))
    assert difference(*many).high < difference(*many, images).high


def test_what_is_a_cluster():
    """The first look's images; without any, the question, however often it is asked."""
    items = [
        said("", "x", images={"image": ["a.png"]}), said("", "x", images={"image": ["a.png"], "dino": ["b.png"]}),
        said("", "x", images={"image": ["b.png"]}), said("", "x", images={"dino": ["b.png"]}), said("", "x"),
        said("", "x", images={"image": []}), said("", "x", source="other", images={"image": ["a.png"]}),
    ]  # fmt: skip
    items = [replace(item, record=f"file: record {n}") for n, item in enumerate(items)]
    assert image_clusters(items).tolist() == [0, 0, 1, 2, 3, 4, 5]
    again = [replace(item, record=repeat_name(item.record, time)) for time in (2, 11) for item in items]
    assert image_clusters([*items, *again]).tolist() == [0, 0, 1, 2, 3, 4, 5] * 3


def test_the_smallest_difference_is_found_in_80_of_100():
    """Simulated: of runs that differ by it, in as many answers, so many are told apart at a level of 5 %."""
    generator = np.random.default_rng(0)
    found, size = [], 0.0
    for _ in range(300):
        change = generator.choice([1.0, -1.0, 0.0], 500, p=[0.13, 0.07, 0.8])  # differs by 0.06
        one, two = Ratio.mean([0.5] * 500), Ratio.mean((0.5 + change).tolist())
        size += smallest_difference(one, two) / 300
        found.append(paired_p(one, two) < 0.05)
    assert size == pytest.approx(0.055, abs=0.002) and 0.8 < np.mean(found) < 0.95
    same = Ratio.mean([1.0] * 200)
    assert smallest_difference(same, same) == 6 / 200  # five answers, all for the better, have p = 0.0625


def test_holm():
    assert holm([0.01, None, 0.04, 0.03, 0.5]) == pytest.approx([0.04, None, 0.09, 0.09, 0.5])
