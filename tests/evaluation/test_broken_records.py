"""Test records that cannot be used are found before the first step, or skipped, counted and named; and text alone."""

import json

import pytest
from PIL import Image, ImageFilter

from conftest import compose_config, compose_eval
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.cli.train import train
from vpt.data.skipping import too_many
from vpt.errors import DataError
from vpt.evaluation.predictions import read_predictions
from vpt.reporting.report import write_report


def record(*images: str, messages: list[dict] | None = None) -> dict:
    question = "<image>" * len(images) + "\nwhat is it?"
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": "it"}]
    return {"messages": said if messages is None else messages, "images": list(images)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    noise = Image.effect_noise((90, 60), 80).filter(ImageFilter.BLUR).convert("RGB")
    for name in ("a.png", "b.png", "spoilt.png", "half.jpg"):
        noise.save(root / name)
    half = (root / "half.jpg").read_bytes()
    (root / "half.jpg").write_bytes(half[: len(half) // 2])
    spoilt = bytearray((root / "spoilt.png").read_bytes())
    spoilt[len(spoilt) // 2 : len(spoilt) // 2 + 50] = bytes(50)  # its header and its end are sound
    (root / "spoilt.png").write_bytes(spoilt)
    files = {
        "good": [record("a.png"), record("b.png")],
        "mixed": [record("a.png"), record(), record("half.jpg"), record("none.png"), record("spoilt.png"),
                  record("b.png"), record(messages=[]), record("a.png_0,0,99,99")],
        "broken": [record("none.png"), record("half.jpg")],
        "other": [record("b.png"), record(), record("b.png", "a.png_0,0,45,60")],
    }  # fmt: skip
    for name, records in files.items():
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in records))
    return root


def config_of(root, test: str, *overrides: str):
    return compose_config(
        "encoder=[]", "data=vpt", f"data.root={root}", "+debug=two_steps", "data.train.vpt.options.path=good.jsonl",
        f"data.test.vpt.options.path={test}.jsonl", "training.final_eval_questions=null", "training.eval_rows=9", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config_of(root, "mixed", "data.on_error=skip", "data.max_skipped_fraction=0.9", "pictures=true"), folder)
    return folder


def test_skipped_questions_are_counted_and_named_and_text_alone_is_answered(run):
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["questions"], summary["skipped_questions"]) == (3, 5)
    reasons = list(summary["skipped"].values())
    for name, reason in zip(("half.jpg", "none.png", "spoilt.png", "messages", "99,99"), reasons, strict=True):
        assert name in reason and "mixed.jsonl" in reason
    answers = read_predictions(run / "predictions" / "predictions.jsonl")
    assert [item.images.get("image", []) for item in answers] == [["a.png"], [], ["b.png"]]
    report = (run / "report.html").read_text()
    assert report.count("a question without an image") == 1 and report.count("what is it?") >= 3
    assert (run / "samples.png").stat().st_size > 10_000


def test_what_the_headers_show_is_told_before_the_first_step(root, tmp_path, capsys):
    with pytest.raises(DataError, match=r"mixed\.jsonl.*half\.jpg cannot be read.*truncated"):
        train(config_of(root, "mixed"), tmp_path)
    with pytest.raises(
        DataError, match=r"4 of 8 test records cannot be used:\n.*half\.jpg(.|\n)*max_skipped_fraction=0.01"
    ):
        train(config_of(root, "mixed", "data.on_error=skip"), tmp_path)
    with pytest.raises(DataError, match="2 of 2 test records"):
        train(config_of(root, "broken", "data.on_error=skip", "data.max_skipped_fraction=1.0"), tmp_path)
    assert not [*tmp_path.iterdir()] and not capsys.readouterr().out


def test_another_test_file(run, capsys):
    """Its questions alone; and what has answered before goes on although a broken record is now left out."""
    evaluate_checkpoint(compose_eval(f"checkpoint={run}", "data.test.vpt.options.path=other.jsonl", "name=other"))
    answers = read_predictions(run / "eval" / "other" / "predictions.jsonl")
    assert [item.images.get("image", []) for item in answers] == [["b.png"], [], ["b.png", "a.png_0,0,45,60"]]
    assert "a question without an image" in (run / "eval" / "other" / "report.html").read_text()
    ask = compose_eval(f"checkpoint={run}", "name=mixed", "pictures=false", "data.on_error=raise", "data.limit=3")
    with pytest.raises(DataError, match=r"half\.jpg"):
        evaluate_checkpoint(ask)
    capsys.readouterr()
    evaluate_checkpoint(compose_eval(f"checkpoint={run}", "name=mixed", "pictures=false", "data.limit=3"))
    assert "2 questions; 1 left out" in capsys.readouterr().out


def test_a_report_written_anew_finds_the_images_of_another_data_set(run, root, tmp_path):
    """Another test set, under another name, in another folder of data, all of which the run was not trained with."""
    (tmp_path / "own.jsonl").write_text(json.dumps(record("c.png")) + "\n")
    (tmp_path / "c.png").write_bytes((root / "a.png").read_bytes())
    own = "data.test={mine:{options:{path:own.jsonl}}}"
    evaluate_checkpoint(compose_eval(f"checkpoint={run}", f"data.root={tmp_path}", own, "name=own"))
    page = run / "eval" / "own" / "report.html"
    before = page.read_text()
    assert "no picture" not in before and before.count("data:image/") >= 1
    write_report(page.parent)
    assert page.read_text() == before
    again = compose_eval(f"checkpoint={run}", f"data.root={tmp_path}/.", own, "name=own", "pictures=false")
    evaluate_checkpoint(again)
    assert not list(page.parent.glob("earlier*")), "the folder of data changes no answer"


@pytest.mark.parametrize(("skipped", "rows", "share", "refused"), [
    (1, 4, 0.01, False), (2, 4, 0.01, True), (3, 64, 0.01, False), (4, 64, 0.01, True), (10, 1000, 0.01, False),
    (20, 1000, 0.01, True), (1, 1000, 0.0, True), (0, 8, 0.0, False), (7, 8, 1.0, False), (8, 8, 1.0, True),
    (1, 1, 0.01, False),
])  # fmt: skip
def test_how_many_are_too_many(skipped, rows, share, refused):
    assert too_many(skipped, rows, share) == refused


def test_the_only_one_there_is_may_not_be_skipped():
    assert too_many(1, 1, 0.5, complete=True) and not too_many(0, 0, 0.5, complete=True)
