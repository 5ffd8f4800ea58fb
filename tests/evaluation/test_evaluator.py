"""Evaluations that are stopped, repeated, changed and compared."""

import json
import math
import signal
import time
from dataclasses import replace
from threading import Thread

import pytest

from conftest import TOKENS, compose_config, compose_eval, conversation, logged, mixed_records
from helpers.judge_server import Server
from helpers.programs import Program
from vpt.__main__ import main
from vpt.checkpoint.load import weights_digest
from vpt.cli.evaluate import Evaluation, evaluate_checkpoint
from vpt.cli.train import train
from vpt.data.images import to_rgb
from vpt.data.records import parse_record
from vpt.data.same_data import without_perception
from vpt.errors import ConfigError, DataError
from vpt.evaluation.paired import pair
from vpt.evaluation.prediction_log import PredictionLog
from vpt.evaluation.predictions import Prediction, read_predictions
from vpt.evaluation.questions import expected_actions
from vpt.evaluation.summary import image_clusters

SMALL = ("+debug=two_steps", "+experiment=all", "tracking=none", "training.final_eval_questions=8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their seed."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(compose_config(*SMALL, f"seed={seed}"), root / f"seed_{seed}")
    return root


def told(folder):
    """Everything but the time it took, probabilities to six digits."""
    items = [
        replace(item, seconds=0.0, confidence=round(item.confidence, 6))
        for item in read_predictions(folder / "predictions.jsonl")
    ]
    for item in items:
        for step in item.trace:
            step.seconds = 0.0
    return items


def test_stopped_by_hand_it_goes_on(runs):
    """Ctrl-C in a real process, half a line on the disk; the same command answers the rest and the same."""
    run = runs / "seed_0"
    options = ["generation.batch_size=4", "generation.action=dino", "pictures=false"]
    command = [f"checkpoint={run}", *options, "name=stopped"]
    program = Program("eval.py", *command, "data.limit=4000")
    path = run / "eval" / "stopped" / "predictions.jsonl"
    while not path.exists() or path.read_text().count("\n") < 8:
        assert program.process.is_alive(), program.output
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    ended = program.wait()
    assert ended.returncode == 130 and "type the same command to go on" in ended.stderr, program.output
    assert "Traceback" not in program.output
    before = path.read_text()
    answered = before.count("\n")
    assert 8 <= answered < 4000
    path.write_text(before + '{"record": "ea')
    evaluate_checkpoint(compose_eval(*command, f"data.limit={answered + 6}"))
    assert path.read_text().startswith(before)
    evaluate_checkpoint(compose_eval(f"checkpoint={run}", *options, "name=whole", f"data.limit={answered + 6}"))
    assert told(path.parent) == told(run / "eval" / "whole")
    summary = json.loads((path.parent / "summary.json").read_text())
    assert summary["questions"] == answered + 6


def test_what_was_answered_is_not_asked_again(runs, monkeypatch):
    run = runs / "seed_0"
    ask = [f"checkpoint={run}", "name=twice", "data.limit=6", "pictures=false"]
    evaluate_checkpoint(compose_eval(*ask))
    first = told(run / "eval" / "twice")
    monkeypatch.setattr("vpt.evaluation.evaluator.answer_or_skip", None)  # an answer would end in an error
    evaluate_checkpoint(compose_eval(*ask, "generation.batch_size=1", "data.metrics=[anls]"))
    assert told(run / "eval" / "twice") == first
    summary = json.loads((run / "eval" / "twice" / "summary.json").read_text())
    assert list(summary["metrics"]["easy_vqa"]) == ["anls"]
    evaluate_checkpoint(compose_eval(*ask, "data.limit=4"))
    assert json.loads((run / "eval" / "twice" / "summary.json").read_text())["questions"] == 4
    assert told(run / "eval" / "twice") == first


def test_several_answers_to_each_question(runs):
    """Avg@3: drawn apart, the first as if it were alone; questions and not answers are what intervals draw."""
    run = runs / "seed_0"
    drawn = ["generation.temperature=2", "generation.max_new_tokens=8", "pictures=false"]
    for name, more in (("once", ["data.limit=4"]), ("three", ["data.limit=4", "data.repeats=3"])):
        evaluate_checkpoint(compose_eval(f"checkpoint={run}", f"name={name}", *drawn, *more))
    once, three = (told(run / "eval" / name) for name in ("once", "three"))
    assert three[:4] == once and len(three) == 12
    texts = [[three[number + 4 * time].answer for time in range(3)] for number in range(4)]
    assert all(len({*said}) > 1 for said in texts)
    assert [item.record for item in three[4:8]] == [f"{item.record} (answer 2)" for item in once]
    assert len({*image_clusters(three)}) == len({*image_clusters(once)})
    summary = json.loads((run / "eval" / "three" / "summary.json").read_text())
    assert summary["questions"] == 12 and summary["accuracy"] == sum(item.correct for item in three) / 12
    with pytest.raises(ConfigError, match=r"greedy ones are the same: generation.temperature=1"):
        evaluate_checkpoint(compose_eval(f"checkpoint={run}", "data.repeats=2"))


def test_other_settings_begin_anew_and_nothing_is_lost(runs, capsys):
    run = runs / "seed_0"
    ask = [f"checkpoint={run}", "name=changed", "data.limit=4", "pictures=false"]
    evaluate_checkpoint(compose_eval(*ask))
    first = told(run / "eval" / "changed")
    capsys.readouterr()
    evaluate_checkpoint(compose_eval(*ask, "generation.action=dino"))
    said = capsys.readouterr().out
    assert "with other settings (generation): kept as earlier_predictions.jsonl; begins anew" in said
    kept = read_predictions(run / "eval" / "changed" / "earlier_predictions.jsonl")
    assert [item.answer for item in kept] == [item.answer for item in first]
    assert all(item.actions[0] == "dino" for item in told(run / "eval" / "changed"))


def line(record: str) -> Prediction:
    return Prediction(record, "q", "a", "a", True)


def test_other_questions_begin_anew(tmp_path):
    with PredictionLog(tmp_path, {"weights": "x"}, ["1", "2"]) as log:
        log.add([line("1")])
    assert [item.record for item in PredictionLog(tmp_path, {"weights": "x"}, ["1", "3", "4"]).done] == ["1"]
    assert PredictionLog(tmp_path, {"weights": "x"}, ["2", "1"]).done == []
    assert (tmp_path / "earlier_predictions.jsonl").read_text().count("\n") == 1
    assert not (tmp_path / "predictions.jsonl").exists()


def test_no_earlier_answers_are_lost(tmp_path):
    """Under settings a, b, a, b: all are kept, each with the settings and the summary that they had."""
    for number, settings in enumerate("abab"):
        with PredictionLog(tmp_path, {"weights": settings}, ["1"]) as log:
            assert log.done == []
            log.add([line(f"{settings}{number}")])
        (tmp_path / "summary.json").write_text(str(number))
    for number, suffix in enumerate(("", "_2", "_3")):
        (kept,) = read_predictions(tmp_path / f"earlier_predictions{suffix}.jsonl")
        assert kept.record == f"{'abab'[number]}{number}"
        assert json.loads((tmp_path / f"earlier_settings{suffix}.json").read_text()) == {"weights": "abab"[number]}
        assert (tmp_path / f"earlier_summary{suffix}.json").read_text() == str(number)
    assert read_predictions(tmp_path / "predictions.jsonl") == [line("b3")]


def test_an_image_that_breaks_in_the_middle(runs, monkeypatch):
    """What was answered before is kept, and once the image is repaired the same command goes on."""
    run = runs / "seed_0"
    ask = [f"checkpoint={run}", "data.limit=20", "generation.batch_size=4", "pictures=false"]
    evaluate_checkpoint(compose_eval(*ask, "name=sound"))
    sound = told(run / "eval" / "sound")
    last = sound[-1].images["image"][0]

    def broken(image):
        if image.filename.endswith(f"/{last}"):
            raise OSError("a bad sector")
        return to_rgb(image)

    with monkeypatch.context() as patched:
        patched.setattr("vpt.data.images.to_rgb", broken)
        with pytest.raises(DataError, match=r"cannot be read \(a bad sector\); replace the file"):
            evaluate_checkpoint(compose_eval(*ask, "name=broken"))
    kept = told(run / "eval" / "broken")
    assert 4 <= len(kept) < 20 and kept == sound[: len(kept)]
    evaluate_checkpoint(compose_eval(*ask, "name=broken"))
    assert told(run / "eval" / "broken") == sound


def test_a_judge_of_an_evaluation(runs, tmp_path):
    """`judge.url` beside the metrics of the data set, and its interval in the summary."""
    server = Server({"": "score: 0.5"})
    Thread(target=server.serve_forever, daemon=True).start()
    ask = [f"checkpoint={runs / 'seed_0'}", "name=judged", "data.limit=6", "pictures=false", "judge.questions=4"]
    try:
        evaluate_checkpoint(
            compose_eval(*ask, f"judge.url={server.url}", "judge.model=stub", f"judge.cache={tmp_path / 'j.sqlite'}")
        )
    finally:
        server.shutdown()
        server.server_close()
    found = json.loads((runs / "seed_0" / "eval" / "judged" / "summary.json").read_text())["metrics"]["easy_vqa"]
    assert next(iter(found)) == "exact_match", "the score is not the judge's"
    assert (found["judge"]["value"], found["judge"]["questions"], found["judge_unscored"]["value"]) == (0.5, 4, 0)


def test_weights_are_told_apart(runs):
    digests = {weights_digest(runs / f"seed_{seed}") for seed in (0, 1)}
    assert len(digests) == 2


def test_ablations_beside_a_baseline(runs, capsys):
    run = runs / "seed_0"
    evaluate_checkpoint(
        compose_eval(
            f"checkpoint={run}",
            "+ablations=features",
            f"baseline={runs / 'seed_1'}",
            "data.limit=12",
            "name=controlled",
            "generation.action=sam",
        )
    )
    folder = run / "eval" / "controlled"
    summary = json.loads((folder / "summary.json").read_text())
    names = ("zeroed", "noise", "blank", "repeated", "swapped", "evidence")
    assert list(summary["ablations"]) == [*(f"features_{name}" for name in names), "baseline"]
    for found in summary["ablations"].values():
        assert found["questions"] == 12 and found["reference"] == summary["accuracy"]
        assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
        assert found["difference"]["value"] == pytest.approx(found["ablated"] - found["reference"])
    other = runs / "seed_1" / "eval" / "controlled"
    right = [item.correct for item in read_predictions(other / "predictions.jsonl")]
    assert summary["ablations"]["baseline"]["ablated"] == sum(right) / 12
    assert {path.name for path in other.iterdir()} == {"predictions.jsonl", "settings.json"}, (
        "its own report is its own"
    )
    assert (folder / "ablations.png").stat().st_size > 10_000
    assert "perceived features zeroed" in capsys.readouterr().out


def test_an_earlier_checkpoint_of_the_run_as_baseline(runs):
    """It answers in a folder of its own, and what was answered here stays."""
    run = runs / "seed_0"
    ask = [f"checkpoint={run}", "name=steps", "data.limit=4", "pictures=false"]
    evaluate_checkpoint(compose_eval(*ask))
    first = told(run / "eval" / "steps")
    evaluate_checkpoint(compose_eval(*ask, f"baseline={run / 'checkpoints' / 'step_00000001'}"))
    folders = run / "eval" / "steps", run / "eval" / "steps_baseline"
    assert told(folders[0]) == first and not list(folders[0].glob("earlier*"))
    weights = [json.loads((folder / "settings.json").read_text())["weights"] for folder in folders]
    assert weights == [weights_digest(run), weights_digest(run / "checkpoints" / "step_00000001")]
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["step"] == 2 and summary["questions"] == 4
    right = [item.correct for item in read_predictions(folders[1] / "predictions.jsonl")]
    assert summary["ablations"]["baseline"]["ablated"] == sum(right) / 4


def test_another_test_split_is_no_baseline(runs, monkeypatch):
    """Told before anything is answered, not at the end of all ablations."""
    monkeypatch.setattr("vpt.cli.evaluate.load_pretrained", None)  # a call would end in another error
    ask = [f"checkpoint={runs / 'seed_0'}", f"baseline={runs / 'seed_1'}", "name=apart", "data.limit=6"]
    asked = Evaluation.questions
    monkeypatch.setattr(Evaluation, "questions", lambda self: asked(self)[: 4 if "seed_1" in self.checkpoint else None])
    with pytest.raises(ConfigError, match=r"baseline: .*seed_1 does not answer 2 of the 6 questions, .*data.limit"):
        evaluate_checkpoint(compose_eval(*ask))
    assert not (runs / "seed_0" / "eval" / "apart").exists()


@pytest.mark.parametrize("key", ["data.limit", "data.max_length"])
def test_no_questions_are_no_evaluation(key):
    assert compose_eval("checkpoint=x", f"{key}=null").data.limit is None
    with pytest.raises(ConfigError, match=f"{key}=0 must lie between 1 and inf"):
        compose_eval("checkpoint=x", f"{key}=0")


def test_a_run_that_asks_nothing_tells_no_accuracy(tmp_path, capsys):
    """Neither at its end, nor teacher-forced, nor in its report; a number below 0 is refused."""
    with pytest.raises(ConfigError, match=r"final_eval_questions=-1 must lie between 0"):
        compose_config("training.final_eval_questions=-1")
    few = (
        "+debug=two_steps",
        "tracking=none",
        "training.final_eval_questions=0",
        "training.eval_rows=0",
        "pictures=true",
    )
    assert math.isnan(train(compose_config(*few), tmp_path / "run"))
    said, summary = capsys.readouterr().out, json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "no test question was asked" in said and "accuracy" not in said
    assert summary["questions"] == 0 and not {"accuracy", "metrics"} & {*summary} and summary["teacher_forced"] == {}
    assert not logged(tmp_path / "run", "eval/loss") and not (tmp_path / "run" / "samples.png").exists()
    assert "No answers yet" in (tmp_path / "run" / "report.html").read_text()


def test_comparing_two_runs(runs, tmp_path, capsys):
    paths = [str(runs / f"seed_{seed}") for seed in (0, 1)]
    main(["compare", "--paired", *paths, "--metrics", "exact_match,anls", "--out", str(tmp_path / "table.json")])
    said = capsys.readouterr().out
    assert "8 questions answered by both" in said and "easy_vqa  anls" in said
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["metric"] for row in rows] == ["exact_match", "anls"]
    ours, theirs = (read_predictions(runs / f"seed_{seed}" / "predictions" / "predictions.jsonl") for seed in (0, 1))
    assert rows[0]["a"] == sum(item.correct for item in ours) / 8
    assert rows[0]["difference"]["value"] == pytest.approx(rows[0]["b"] - rows[0]["a"])
    with pytest.raises(DataError, match="no question in common"):
        pair(ours, [replace(item, record="another") for item in theirs])
    with pytest.raises(SystemExit):
        main(["compare", "--paired", paths[0], str(tmp_path)])
    assert "holds no predictions.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--paired", *paths, "--out", str(tmp_path / "nowhere" / "table.json")])
    assert "nowhere does not exist; type: mkdir -p" in capsys.readouterr().err


@pytest.mark.parametrize(("override", "message"), [
    ("data.metrics=[exact_mach]", "data.metrics: exact_mach is not a metric; did you mean exact_match"),
    ("data.metrics=[]", "names no metric"),
    ("+data.test.easy_vqa.metrics=[yes_know]", "data.test.easy_vqa.metrics: yes_know is not a metric"),
])  # fmt: skip
def test_wrong_metrics_stop_the_run_before_it_starts(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        train(compose_config(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_records_say_what_is_right_and_where(folder):
    raw = {"messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}],
           "images": ["0.png"], "answers": ["red", "scarlet"], "box": [1, 2, 30, 40]}  # fmt: skip
    record = parse_record(raw, where="here", encoder_tokens={})
    assert record.accepted == ("red", "scarlet") and record.box == (1, 2, 30, 40)
    assert without_perception(record, {}).accepted == record.accepted
    for wrong in ({"answers": "red"}, {"answers": []}, {"box": [1, 2, 3]}, {"box": [5, 0, 4, 9]}):
        with pytest.raises(DataError, match=r"^here: `(answers|box)` must be"):
            parse_record(raw | wrong, where="here", encoder_tokens={})


def test_what_a_record_asks_for():
    """Regions in tokens or in numbers, re-encodings; a further image that nobody asked for is none of them."""
    by_name = [parse_record(raw, where="", encoder_tokens=TOKENS) for raw in mixed_records()]
    found = [expected_actions(record, TOKENS) for record in by_name]
    assert found == [
        ["dino", "clip", "dino"], ["clip"], ["region"], ["region", "sam"], [], [], ["dino"], ["sam"],
        ["dino", "clip"], ["region", "sam"],
    ]  # fmt: skip
    turns = [{"role": "assistant", "content": "[1, 2, 5, 6]"}, {"role": "user", "content": "<image>"},
             {"role": "assistant", "content": "so?"}, {"role": "user", "content": "<image>"}]  # fmt: skip
    raw = conversation("0.png", turns)
    raw["images"] = ["0.png"] * 3
    assert expected_actions(parse_record(raw, where="", encoder_tokens=TOKENS), TOKENS) == ["region"]
