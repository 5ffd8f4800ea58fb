"""A damaged or hostile checkpoint loads with the very same weights, or an error of ours names what is wrong with it."""

import logging
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import compose_config
from helpers.corrupt_checkpoints import copied, corrupt
from helpers.fuzzing import RANDOM, examples, fuzz
from vpt.checkpoint.checksums import CHECKSUMS, write_checksums
from vpt.checkpoint.load import load_pretrained
from vpt.checkpoint.tensors import unique_state_dict
from vpt.errors import UserError
from vpt.training.trainer import Trainer

RUN = ("+experiment=dino", "+debug=easy_vqa", "run_name=run", "model.config.num_hidden_layers=1",
       "model.config.vision_config.depth=1", "training.final_eval_questions=0")  # fmt: skip
SECRET = "not-for-error-messages"
ENOUGH = 1 << 28  # bytes by which a tiny checkpoint may raise the process's peak, several times what it takes
OPENED: list[str] = []  # files that Python has opened
WATCHING = [False]


def _watch(event: str, arguments: tuple) -> None:
    if WATCHING[0] and event == "open":
        OPENED.append(str(arguments[0]))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of two steps, its checkpoint, and its weights."""
    folder = tmp_path_factory.mktemp("corrupt") / "run"
    trainer = Trainer(compose_config(*RUN), folder)
    trainer.fit()
    sys.addaudithook(_watch)
    return folder, {name: tensor.clone() for name, tensor in unique_state_dict(trainer.model).items()}


def resumed(folder: Path) -> torch.nn.Module:
    """The model of the run that is taken up again, as train.py does."""
    return Trainer(compose_config(*RUN), folder.parents[1]).model


def loaded(folder: Path) -> torch.nn.Module:
    return load_pretrained(folder, device="cpu").model


@pytest.fixture(autouse=True)
def nothing_logged():
    """What libraries say about damaged files may be text that no test report can hold."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@examples(12, 1_500)
@pytest.mark.parametrize("take", [loaded, resumed])
def test_corrupt_checkpoints(run, tmp_path, monkeypatch, take, count):
    folder, weights = run
    monkeypatch.setenv("VPT_SECRET", SECRET)
    outside, tried = tmp_path / "outside", []

    def check(random):
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        found = copied(folder / "checkpoints" / "step_00000002", tmp_path / "run" / "checkpoints" / "step_00000002")
        name, way = corrupt(found, random, outside)
        sums = random.choice(["as it was", "as it was", "gone", "anew"])
        if sums != "as it was":
            (found / CHECKSUMS).unlink()
        if sums == "anew":
            _write_checksums_anew(found)
        what = f"{name} {way} checksums {sums}"
        result = _outcome(take, found, outside)
        refused = isinstance(result, str)
        tried.append((way, sums, "refused" if refused else "loads"))
        if refused:
            result.encode()  # it can be printed
            assert str(tmp_path) in result and SECRET not in result, f"{what}: {result}"
            return
        assert way not in ("_link", "_pipe", "_pickle") or name.startswith("optimizer"), what
        if sums == "as it was" or not name.startswith("model"):
            own = unique_state_dict(result)
            assert own.keys() == weights.keys() and all(torch.equal(own[key], weights[key]) for key in own), what

    fuzz(count, check, random=RANDOM)
    for (way, sums, result), times in sorted(Counter(tried).items()):
        print(f"{way:15} checksums {sums:10} {result:8} {times:5}")
    assert "refused" in {result for *_, result in tried}


def _write_checksums_anew(folder: Path) -> None:
    try:
        write_checksums(folder)
    except OSError:  # a pipe or a circle: those have no checksum
        (folder / CHECKSUMS).unlink(missing_ok=True)


def _outcome(take, found: Path, outside: Path) -> torch.nn.Module | str:
    """The model, or our error's message. Nothing is unpickled, opened elsewhere, or takes much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    OPENED.clear()
    WATCHING[0] = True
    try:
        result = take(found)
    except UserError as error:
        result = str(error)
        cause = repr(error.__cause__)
        assert "MemoryError" not in cause and "allocate" not in cause, cause
    finally:
        WATCHING[0] = False
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < ENOUGH, f"{grown:,} bytes more"
    assert not (outside / "ran").exists(), "unpickled"
    assert not [path for path in OPENED if path.startswith(str(outside))], OPENED
    return result


UPSTREAM = {
    "other JSON": ("[]", "config.json cannot be read: it is not an object"), "no JSON": ("{", "config.json cannot be read"),
    "nesting": ("[" * 100_000, "config.json cannot be read"), "bytes": ("\x00", "config.json cannot be read"),
    "a word for a list": ('{"model_type": "qwen2_vl_vpt", "vision_encoder_ls": "dino"}', "cannot be read"),
    "an override": ('{"model_type": "qwen2_vl_vpt", "vision_encoder_ls": ["dino]", "hydra.run.dir=x"]}', "cannot be read"),
    "no sizes": ('{"model_type": "qwen2_vl_vpt"}', "is not that of its config.json"),
    "layers": ('{"model_type": "qwen2_vl_vpt", "num_hidden_layers": 1e9}', "num_hidden_layers=1e.09 is beyond"),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_folders_that_are_none(run, tmp_path, name):
    text, message = UPSTREAM[name]
    parts = load_pretrained(run[0], device="cpu")
    parts.tokenizer.save_pretrained(tmp_path)
    shutil.copy(run[0] / "checkpoints" / "step_00000002" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)
