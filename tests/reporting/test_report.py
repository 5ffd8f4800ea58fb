"""Reports: what they show is what is on disk, nothing runs in them, nothing is fetched, W&B gets the same."""

import json
import re
import warnings
from dataclasses import asdict, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import markupsafe
import pytest
import torch
from PIL import Image
from wandb.proto import wandb_internal_pb2

from conftest import compose_config, compose_eval, conversation, samples_of
from helpers.scripted_generator import Scripted
from vpt.__main__ import main
from vpt.checkpoint.load import load_any_config, load_pretrained
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.cli.train import train
from vpt.data.collate import collate
from vpt.errors import CheckpointError
from vpt.evaluation.predictions import Prediction, read_predictions
from vpt.generation.answer_images import REGION_COLOUR, SIDE, answer_images
from vpt.generation.pipeline import Pipeline
from vpt.generation.row_state import GenerationLimits, PerceptionStep
from vpt.reporting.examples import BEST, RANDOM, WORST, read_examples, select_examples
from vpt.reporting.figures import draw_sheet
from vpt.reporting.report import write_report
from vpt.reporting.report_sections import results
from vpt.reporting.run_artifacts import REPORT
from vpt.reporting.runs import read_answers

NASTY = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> $x_1$ & \"'"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps with every kind of perception, and an evaluation of it with ablations, both logged to W&B."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    mirrored = ("tracking=wandb", "tracking.mode=offline", "pictures=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder.parent))
        train(
            compose_config("+experiment=all", "+debug=two_steps", "training.final_eval_questions=12", *mirrored), folder
        )
        evaluate_checkpoint(
            compose_eval(
                f"checkpoint={folder}",
                "+ablations=[requests,features,regions,attention]",
                "data.limit=12",
                "generation.action=dino",
                *mirrored,
            )
        )
    return folder


GAIN = "What perception gains, and at what price"


class Reader(HTMLParser):
    """Tags with their attributes, headings, and all text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "h2" and data.strip():
            self.headings.append(data)
        self.text += data


def fetched(page: Reader) -> list[str]:
    """Whatever a browser would load or run."""
    loads = [value for _, given in page.tags for key, value in given.items() if key in ("src", "srcset", "xlink:href")]
    runs = [key for _, given in page.tags for key in given if key.startswith("on")]
    tags = [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "link", "base", "form")]
    return [value for value in loads if not value.startswith(("data:image/", "#"))] + runs + tags


def test_a_run_and_its_evaluation_show_what_they_have(run):
    for folder in (run, run / "eval" / "test"):
        page = Reader((folder / REPORT).read_text())
        assert fetched(page) == []
        summary = json.loads((folder / "summary.json").read_text())
        assert f"{summary['metrics']['easy_vqa']['exact_match']['value']:.3f}" in page.text
        for example in read_examples(run / "predictions" if folder == run else folder):
            assert read_predictions(run / "predictions" / "predictions.jsonl")[example.number].question in page.text
        for name, given in page.tags:
            if name == "a" and not given["href"].startswith("#"):
                assert (folder / given["href"]).is_file()
    assert {"Results", "Single answers", "Curves of training", "Settings"} <= set(page.headings)
    assert "Does the perception do the work?" in page.headings
    for item in summary["ablations"].values():
        assert item["description"] in page.text
        assert not item["difference"] or f"{item['difference']['value']:+.4f}" in page.text


def test_a_sheet_has_questions_of_any_script_and_without_an_image(run, tmp_path):
    items = read_predictions(run / "predictions" / "predictions.jsonl")
    items[1:3] = replace(items[1], images={}), replace(items[2], question="图中的圆形是什么颜色？" * 9, answer="")
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sheet = draw_sheet(tmp_path, load_any_config(run), columns=4, rows=3)
    with Image.open(sheet) as image:
        assert image.width > 1000


def test_it_shows_the_answers_that_its_summary_is_about(run, tmp_path, monkeypatch):
    """Of a smaller data.limit than before: the log keeps 12 lines, and the first four of them were asked again."""
    items = read_predictions(run / "predictions" / "predictions.jsonl")
    items[1] = replace(items[1], skipped="its image is broken")
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))
    assert len(read_answers(tmp_path)) == len(items) - 1 == 11, "without a summary, all that were answered"
    summary = json.loads((run / "summary.json").read_text()) | {"questions": 3, "skipped_questions": 1}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert read_answers(tmp_path) == [items[0], *items[2:4]]
    assert "Answers to 3 questions of" in Reader(write_report(tmp_path, config=load_any_config(run)).read_text()).text
    drawn = []
    monkeypatch.setattr(
        "vpt.reporting.figures.draw_grid", lambda path, shown, **options: drawn.append((shown, options))
    )
    draw_sheet(tmp_path, load_any_config(run))
    assert len(drawn[0][0]) == 3 and "of 3 test questions right" in drawn[0][1]["title"]


def test_it_is_the_same_rebuilt_from_what_is_on_disk(run, tmp_path, capsys):
    before = {path: path.read_text() for path in (run / REPORT, run / "eval" / "test" / REPORT)}
    main(["report", str(run)])
    assert "see " in capsys.readouterr().out
    page = (run / "eval" / "test" / REPORT).read_text()
    assert page == before[run / "eval" / "test" / REPORT]
    assert len((run / REPORT).read_text()) > len(before[run / REPORT])  # it links to the evaluation now


def test_every_section_needs_its_data(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert Reader(write_report(tmp_path).read_text()).headings == ["Curves of training"]
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "predictions.jsonl").write_text((run / "predictions" / "predictions.jsonl").read_text())
    assert "Does the perception do the work?" not in Reader(write_report(answers).read_text()).headings
    with pytest.raises(CheckpointError, match="holds neither"):
        write_report(tmp_path / "nowhere")


def test_shares_have_a_bar_and_amounts_have_none():
    one = {"value": 0.5, "low": 0.4, "high": 0.6, "questions": 9}
    summary = {
        "metrics": {"x": {"anls": one, "cider_d": one}},
        "perception": {"action_recall": one, "latency_seconds": one},
    }
    rows = results(SimpleNamespace(summary=summary, predictions=[])).split("<tr>")[2:]
    assert [("anls" in row, "latency_seconds" in row, "<svg" in row) for row in rows] == [
        (True, False, True), (False, False, False), (False, False, True), (False, True, False),
    ]  # fmt: skip


def test_texts_cannot_run(run, tmp_path):
    """Every text of every file says something nasty."""
    evaluation = run / "eval" / "test"
    items = read_predictions(evaluation / "predictions.jsonl")
    step = PerceptionStep("region", NASTY, box=(1, 2, 30, 40), visual_tokens=4)
    nasty = [replace(item, question=NASTY, answer=NASTY, target=NASTY, type=NASTY, trace=[step]) for item in items]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(asdict(item)) + "\n" for item in nasty))
    (tmp_path / "examples.json").write_text((evaluation / "examples.json").read_text())
    summary = json.loads((evaluation / "summary.json").read_text())
    summary["metrics"] = {NASTY: {NASTY: summary["metrics"]["easy_vqa"]["exact_match"]}}
    summary["accuracy_by_type"] = {NASTY: 0.5, "b": 0.5}
    summary["perception"]["confusion"] = {NASTY: {NASTY: 3}, "none": {"none": 2}}
    summary["ablations"] = {NASTY: summary["ablations"]["features_zeroed"] | {"description": NASTY}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, f"data/{NASTY}": 1.0, "data/b": 2.0}) + "\n")
    (tmp_path / "config.yaml").write_text(NASTY)
    (tmp_path / "predictions").mkdir()
    for name in ("predictions.jsonl", "examples.json"):
        (tmp_path / name).rename(tmp_path / "predictions" / name)
    text = write_report(tmp_path, config=load_pretrained(run).config).read_text()
    page = Reader(text)
    assert fetched(page) == [] and "default-src 'none'" in text
    assert page.text.count(NASTY) > 10 and "evil" not in re.sub(re.escape(escape(NASTY)), "", text).replace(
        escape(NASTY, quote=False), ""
    ).replace(str(markupsafe.escape(NASTY)), "")


def prediction(right: bool, confidence: float) -> Prediction:
    return Prediction("r", "q", "t", "a", right, confidence=confidence)


def test_which_answers_are_shown():
    items = [prediction(n % 3 == 0, (n * 37 % 100) / 100) for n in range(100)]
    chosen = select_examples(items, [float(item.correct) for item in items])
    by = {why: [n for given, n in chosen if given == why] for why in (RANDOM, WORST, BEST)}
    assert [len(found) for found in by.values()] == [6, 6, 6] and len({n for _, n in chosen}) == 18
    rest = [n for n in range(100) if n not in by[RANDOM]]
    for why, right in ((WORST, False), (BEST, True)):
        among = sorted((n for n in rest if items[n].correct == right), key=lambda n: -items[n].confidence)
        assert [items[n].confidence for n in by[why]] == [items[n].confidence for n in among[:6]]
    good = select_examples(items[:1], [1.0])
    assert good == [(RANDOM, 0)] and select_examples([], []) == []


def test_maps_are_those_of_a_reply(run, tmp_path):
    """What the report shows of an answer is what asking that question again shows."""
    from vpt.evaluation.questions import questions

    parts = load_pretrained(run)
    examples = [example for example in read_examples(run / "predictions") if any(example.maps)]
    items = read_predictions(run / "predictions" / "predictions.jsonl")
    asked = questions(parts.config, limit=12)
    for example in examples[:2]:
        question = asked[example.number]
        path = tmp_path / "image.png"
        question.folder.full_resolution(question.record.image, where="").save(path)
        text = next(m.content for m in question.record.messages if m.role == "user").removeprefix("<image>\n")
        reply = Pipeline(**vars(parts)).ask(path, text, action_prompt=False)
        assert str(reply) == items[example.number].answer
        for kept, found in zip(example.maps, reply.maps(), strict=True):
            assert (kept is None) == (found is None)
            assert kept is None or torch.allclose(torch.tensor(kept.values), torch.tensor(found.values), atol=1e-4)


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (100, 50))
    item = Prediction(
        "r", "q", "t", "a", True, box=(60, 20, 80, 40), trace=[PerceptionStep("region", box=(10, 10, 30, 30))]
    )
    whole, crop = answer_images(image, item.trace, [], evidence=item.box)
    scale = SIDE / 100
    for x in (10, 30 - 1 / scale):
        assert whole.image.getpixel((round(x * scale), round(20 * scale))) == REGION_COLOUR
    assert whole.image.getpixel((round(20 * scale), round(20 * scale))) == (0, 0, 0)
    assert crop.image.size[0] == crop.image.size[1] and "20 x 20" in crop.caption


def test_confidence_is_the_probability_of_the_answer(make_parts, folder):
    """Of the last turn: the product over its tokens of what a forward of training gives them."""
    parts = make_parts("encoder=[dino]", "model.region_bins=8")
    samples = samples_of(
        parts, folder, [conversation("0.png", answer="red"), conversation("1.png", answer="a blue one")]
    )
    prompts = [parts.processor.encode_prompt(sample.record, folder) for sample in samples]
    generator = Scripted(parts, samples, GenerationLimits())
    for sample, said in zip(samples, generator.generate(prompts, [folder] * 2), strict=True):
        with torch.no_grad():
            nll = parts.model(collate([sample])).nll
        assert said.confidence == pytest.approx(float((-nll.sum()).exp()), rel=1e-3)


def logged(folder: Path) -> dict[str, dict]:
    """What an offline W&B run has of media and tables: name -> what is said of it, its file among it."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: dict[str, dict] = {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for entry in record.artifact.manifest.contents:
            found.setdefault("pictures in tables", {})[entry.path] = Path(entry.local_path).is_file()
        for item in record.history.item:
            for name, key in [item.nested_key] if len(item.nested_key) == 2 else []:  # media and tables
                found.setdefault(name, {})[key] = json.loads(item.value_json)
    return found


def records(log: bytes):
    """The records of W&B's file: LevelDB's log format behind 7 bytes. A record may go on over blocks of 32 KiB."""
    block, at, parts = 32768, 7, b""
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_gets_the_same(run):
    for folder, names in ((run, {"curves", "samples"}), (run / "eval" / "test", {"samples", "ablations"})):
        found = logged(folder)
        assert {f"report/{name}" for name in {"page", "metrics", "answers", *names}} <= set(found)
        media = next(folder.glob("wandb/offline-run-*/files"))
        page = media / found["report/page"]["path"]
        later = set(Reader((folder / REPORT).read_text()).headings)  # a run's report knows its evaluations by now
        assert later - set(Reader(page.read_text()).headings) == ({GAIN} if folder == run else set())
        answers = json.loads((media / found["report/answers"]["path"]).read_text())
        assert answers["columns"][1] == "question" and len(answers["data"]) == len(
            read_examples(run / "predictions" if folder == run else folder)
        )
        kept = found["pictures in tables"]
        assert sum(path.endswith(".png") for path in kept) >= 2 and all(kept.values())
    ablations = json.loads((media / found["report/ablations table"]["path"]).read_text())
    assert ablations["columns"][0] == "what is changed" and ablations["data"]
