"""The benchmarks' preset, their table, and a few stand-in rows of each schema through lmms-eval's own runner."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.served import serving
from vpt.checkpoint.format import save_weights
from vpt.cli.benchmarks import read_arguments
from vpt.errors import ConfigError
from vpt.evaluation.statistics import smallest_difference_unpaired
from vpt.integrations import benchmarks
from vpt.integrations.benchmarks import Scored, clusters_of, preset, run, score_of, table

SCHEMAS = {  # benchmark -> the task file of lmms-eval, and a row of its data
    "vstar": ("vstar_bench/vstar_bench", {"text": "What colour is it? (A) red (B) blue", "label": "A",
              "category": "direct_attributes", "question_id": "0"}),
    "hrbench_4k": ("hrbench/hrbench4k", {"index": 0, "question": "what?", "answer": "A", "category": "single", "A": "red",
                   "B": "blue", "cycle_category": "0"}),
    "hrbench_8k": ("hrbench/hrbench8k", {"index": 0, "question": "where?", "answer": "A", "category": "cross", "A": "here",
                   "B": "there", "cycle_category": "0"}),
    "cv_bench": ("cv_bench/cv_bench", {"idx": 0, "type": "2D", "task": "Count", "source": "COCO", "choices": ["1", "2"],
                 "question": "how many?", "prompt": "how many?\n(A) 1 (B) 2", "answer": "(A)"}),
    "mmvp": ("mmvp/mmvp", {"Index": 1, "Question": "is it?", "Options": "(a) yes (b) no", "Correct Answer": "(a)"}),
    "blink": ("blink/blink_counting", {"idx": "0", "prompt": "how many?\n(A) 1 (B) 2", "choices": ["1", "2"], "answer": "(A)",
              "sub_task": "Counting"}),
    "realworldqa": ("realworldqa/realworldqa", {"question": "how many?\nA. 1\nB. 2", "answer": "A", "image_path": ""}),
    "pope": ("pope/pope", {"question_id": "0", "question": "is there a dog?", "answer": "no", "category": "random"}),
}  # fmt: skip


def test_the_preset_and_its_table():
    known = preset()
    assert [*known] == [*SCHEMAS]
    scores = {"vstar": [1.0] * 96 + [0.0] * 95, "pope": [1.0, 1.0]}
    text = table({name: Scored(found, [*range(len(found))]) for name, found in scores.items()}).as_text()
    assert "0.5026" in text and "0.4346 to 0.5759" in text and "191" in text and "0.1433" in text
    assert smallest_difference_unpaired([1.0, 0.0] * 500) == pytest.approx(2.8 * (0.5 / 1000) ** 0.5)
    for right in (0.0, 1.0):  # two of two: as if three of four, not surely all
        assert smallest_difference_unpaired([right] * 2) == pytest.approx(2.8 * (2 * 3 / 16 / 2) ** 0.5)
    assert (
        score_of({"m": 1.0}, "m")
        == score_of({"m": {"is_correct": True}}, "m")
        == score_of({"m": {"gpt_score": 1}}, "m")
    )
    with pytest.raises(ConfigError, match="gives no score called m"):
        score_of({"m": "yes"}, "m")


def test_four_orders_of_a_question_are_no_four_questions():
    """HR-Bench has every image four times: where the answers to them agree, intervals are those of the images."""
    alone = Scored([1.0] * 120 + [0.0] * 80, [*range(200)])
    rows = [{"doc": {"image": f"image {number % 200}", "index": number}} for number in range(800)]
    every = Scored(alone.scores * 4, clusters_of(rows, preset()["hrbench_4k"].cluster))
    one, four = (table({"hrbench_4k": found}).rows[0] for found in (alone, every))
    assert one[2:4] == four[2:4] and four[4] == 800 and four[6] == pytest.approx(one[6])
    assert clusters_of(rows[:3], preset()["vstar"].cluster) == clusters_of([{}] * 3, "image") == [0, 1, 2]
    graded = smallest_difference_unpaired([0.0, 1.0] * 400, np.repeat(np.arange(400), 2))
    assert graded < smallest_difference_unpaired([0.0, 1.0] * 400) / 5, "images that are all half right are much alike"


@pytest.mark.parametrize(("arguments", "said"), [
    (["checkpoint=a", "benchmarks=[vstr]"], "is not one of vstar"), (["limit=3"], "give one of checkpoint"),
    (["checkpoint=a", "url=b"], "give one of"), (["chekpoint=a"], "did you mean checkpoint"),
    (["url=b", "action=region"], "action=region is of a checkpoint; .*generation.action=region"),
    (["url=b", "device=cuda"], "device=cuda is of a checkpoint"), (["checkpoint=a", "name=b"], "name=b is of a server"),
    (["url=b", "max_side=9"], "max_side"),
])  # fmt: skip
def test_wrong_arguments(arguments, said):
    with pytest.raises(ConfigError, match=said):
        read_arguments(arguments)


def stand_ins(folder, rows=3):
    """Task files like lmms-eval's, that read a few rows of the same schema from here."""
    datasets, lmms = pytest.importorskip("datasets"), pytest.importorskip("lmms_eval")
    random = np.random.default_rng(0)
    for name, (task, row) in SCHEMAS.items():
        pictures = [Image.fromarray(random.integers(0, 255, (96, 160, 3)).astype(np.uint8)) for _ in range(rows)]
        docs = [dict(row) for _ in range(rows)]
        for number, (doc, picture) in enumerate(zip(docs, pictures)):
            doc.update({key: type(doc[key])(number) for key in ("index", "idx", "question_id") if key in doc})
            if name.startswith("hrbench"):
                buffer = io.BytesIO()
                picture.save(buffer, "png")
                doc["image"] = base64.b64encode(buffer.getvalue()).decode()
            else:
                doc["image_1" if name == "blink" else "image"] = picture
        path = folder / f"{name}.parquet"
        datasets.Dataset.from_list(docs).to_parquet(str(path))
        original = Path(lmms.__file__).parent / "tasks" / f"{task}.yaml"
        split = "train" if name == "mmvp" else "test"
        (folder / f"{name}.yaml").write_text(
            f"include: {original}\ntask: {preset()[name].tasks[0]}\ndataset_path: parquet\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{split}: {path}}}}}\ntest_split: {split}\ntag: []\n"
        )
    return folder


@pytest.mark.slow
def test_every_benchmark_runs_and_a_server_scores_alike(all_parts, tmp_path, monkeypatch):
    evals = pytest.importorskip("lmms_eval.tasks.hrbench.hrbench_evals", reason="pip install lmms-eval")
    monkeypatch.setattr(
        evals.HRBenchEval, "get_chat_response", lambda self, given: {"gpt_prediction": given["prediction"][:1]}
    )
    tasks = stand_ins(tmp_path)
    (tmp_path / "model").mkdir()
    save_weights(tmp_path / "model", all_parts)
    scores = run(read_arguments([f"checkpoint={tmp_path / 'model'}", f"tasks={tasks}", "device=cpu", "limit=3"]))
    assert {name: len(found.scores) for name, found in scores.items()} == dict.fromkeys(SCHEMAS, 3)
    said = {}

    def noted(sample, metric, score=score_of):
        said.setdefault(metric, []).append(sample["filtered_resps"])
        return score(sample, metric)

    monkeypatch.setattr(benchmarks, "score_of", noted)
    own = run(
        read_arguments([f"checkpoint={tmp_path / 'model'}", f"tasks={tasks}", "device=cpu", "benchmarks=[pope,blink]"])
    )
    first, said = said, {}
    with serving(all_parts, max_prompt_tokens=8192) as service:
        url = [f"url={service.url}/v1", "name=tiny", f"tasks={tasks}", "benchmarks=[pope,blink]"]
        assert run(read_arguments(url)) == own
    assert said == first
    torch.set_grad_enabled(True)  # the runner turns it off for good
