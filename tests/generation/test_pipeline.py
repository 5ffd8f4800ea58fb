"""One question about one image: from the command line and from Python, and the picture of it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ALL, TOKENS, action_turns, compose_config, conversation, samples_of
from helpers.programs import run_program
from vpt.checkpoint.format import save_weights
from vpt.cli.ask import main, read_arguments
from vpt.config.validate import generation_settings
from vpt.data.collate import collate
from vpt.data.records import REENCODE_PROMPT, REGION_PROMPT, with_prompt
from vpt.encoders.transforms import ResizeLongestSide, SquareTransform
from vpt.errors import ConfigError, DataError, UserError
from vpt.generation.pipeline import Pipeline, action_prompt_text
from vpt.generation.row_state import IGNORED, Answer, PerceptionStep
from vpt.generation.streaming import AnswerStreamer
from vpt.models.inner_forward import StagedKVCache


@pytest.fixture(scope="module")
def checkpoint(all_parts, tmp_path_factory):
    """A folder with a model of every kind."""
    folder = tmp_path_factory.mktemp("run")
    save_weights(folder, all_parts)
    return folder


@pytest.fixture
def image(folder):
    return folder.root / "3.png"  # 200 x 150


VIEWS = {
    "whole": SquareTransform("v", 56, 16, mean=(0.0,) * 3, std=(1.0,) * 3),
    "centre": SquareTransform("v", 56, 16, mean=(0.0,) * 3, std=(1.0,) * 3, view="centre", resize_to=64),
    "padded": ResizeLongestSide("v", 64, 16),
}


@pytest.mark.parametrize("size", [(80, 80), (200, 150), (90, 240)])
@pytest.mark.parametrize("name", VIEWS)
def test_the_extent_of_a_view(name, size):
    """A white patch at a cell of the extent is what the encoder sees brightest at that cell."""
    view = VIEWS[name]
    x0, y0, x1, y1 = view.coverage(size)
    wide, high = (x1 - x0) / 4, (y1 - y0) / 4
    checked = 0
    for row, column in np.ndindex(4, 4):
        box = [round(v) for v in (x0 + column * wide, y0 + row * high, x0 + (column + 1) * wide, y0 + (row + 1) * high)]
        if box[0] < 0 or box[1] < 0 or box[2] > size[0] or box[3] > size[1]:
            continue  # in the padding
        picture = Image.new("RGB", size)
        picture.paste("white", tuple(box))
        pixels = view(picture).pixels.mean(dim=0)
        side = pixels.shape[0] // 4
        cells = pixels.unfold(0, side, side).unfold(1, side, side).mean(dim=(2, 3))
        others = cells.flatten().sort(descending=True).values
        assert cells[row, column] == others[0] and others[0] > 4 * others[1].clamp(min=0)
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("kind", ["dino", "sam", "clip"])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_map_is_what_training_adds(make_parts, folder, image, kind, scale):
    """f . c from the reply equals how far the forward of training moves each token along its direction."""
    parts = make_parts(*ALL, f"model.projector_scale={scale}")
    parts.model.eval()
    reply = Pipeline(**vars(parts)).ask(
        image, "what is the red shape?", action_prompt=False, action=kind, max_new_tokens=8
    )
    (found, *_) = reply.maps()
    token = TOKENS[kind]
    raw = conversation("3.png", action_turns(token), **{f"{token}_images": ["3.png"]})
    with torch.no_grad():
        batch, model = collate(samples_of(parts, folder, [raw])), parts.model
        tokens, plan = model.project_features(model.encode_images(batch.images), batch), model.plan_forward(batch)
        _, states = model.run_stages(batch, plan, tokens, StagedKVCache())
        (perceived,) = [one for stage in plan.stages for one in stage.inserts if one.states is not None]
        moved = model.condition(perceived, tokens, states) - tokens[kind][perceived.tokens]
        direction = model.encoder(kind).projector.condition_vector(states[perceived.states])[0]
    expected = (moved @ direction) / direction.square().sum()
    torch.testing.assert_close(torch.from_numpy(found.values).flatten(), expected, rtol=1e-4, atol=1e-4)
    assert found.values.shape == ((4, 4) if kind != "clip" else parts.processor.position_scheme.grid_shape(
        parts.processor.apply_transform("clip", folder.resize(reply.question.image))
    ))  # fmt: skip


def test_from_python(all_parts, image, tmp_path):
    reply = all_parts.ask(image, "what is the red shape?", action="region", max_new_tokens=12, crop_margin=1)
    assert str(reply) == reply.answer.text and reply.trace[0].kind == "region"
    assert reply.maps()[0] is None
    again = all_parts.ask(str(image), "what is the red shape?", action="region", max_new_tokens=12, crop_margin=1)
    assert again.answer.ids == reply.answer.ids
    drawn = reply.draw(tmp_path / "reply.png")
    assert min(Image.open(drawn).size) > 400


def test_a_picture_of_every_kind_and_of_none(all_parts, image, tmp_path):
    """Several steps, an ignored one, an answer of many lines with a dollar in it."""
    reply = all_parts.ask(image, "costs it $5 or $6?", action="dino", max_new_tokens=8)
    sam, clip, region = (
        all_parts.ask(image, "what?", action=kind, max_new_tokens=8) for kind in ("sam", "clip", "region")
    )
    for other in (sam, clip, region):
        reply.answer.trace.extend(other.trace)
        reply.answer.states.extend(other.answer.states)
    reply.answer.text = "a long answer of $1 or $2 " * 12
    size = Image.open(reply.draw(tmp_path / "many.png")).size
    single = Image.open(all_parts.ask(image, "what?", action="none", max_new_tokens=2).draw(tmp_path / "one.png")).size
    assert size[0] > single[0] and size[1] > single[1]


def test_the_sentence_that_training_asked_with():
    def of(*overrides, action="free", action_prompt=None):
        config = compose_config("encoder=[dino,sam]", *overrides)
        return action_prompt_text(config, generation_settings(config, {"action": action}), action_prompt=action_prompt)

    dino, both = "data.actions={none:0,dino:1}", "data.actions={none:0,dino:1,region:1}"
    assert of(dino) == of(both, action="sam") == REENCODE_PROMPT
    assert of(dino, action="region") == REGION_PROMPT
    assert of(both) == of(dino, action="none") == of() == ""
    assert of(dino, "data.action_prompt=false") == of(dino, action_prompt=False) == ""
    assert of(dino, "data.action_prompt=false", action_prompt=True) == REENCODE_PROMPT


def test_it_prints_while_it_answers(all_parts, image, capsys):
    """Words come out round by round, each act of perception before the words that follow it."""
    streamer, pieces = AnswerStreamer(all_parts.tokenizer), []

    def listen(row):
        streamer(row)
        pieces.append(capsys.readouterr().out)

    reply = all_parts.ask(image, "what is the red shape?", action="dino", max_new_tokens=24, on_step=listen)
    streamer.end(reply.answer)
    rest = capsys.readouterr().out
    said = "".join([*pieces, rest])
    first, seen, *_ = said.splitlines()
    assert first == "<|detection_action_start|><|detection_action|><|detection_action_end|>"
    assert re.fullmatch(r"  -> dino: control state of norm \d+\.\d\d, 16 tokens, \d+ ms", seen)
    assert "".join(pieces).startswith(first) and len(pieces) > 10
    assert all_parts.tokenizer.decode(reply.answer.ids[4:], skip_special_tokens=True).strip() in said


def test_the_command_line(checkpoint, image, tmp_path, capsys):
    out = tmp_path / "answer.png"
    settings = ["action=sam", f"checkpoint={checkpoint}", f"out={out}", "generation.max_new_tokens=8", "device=cpu"]
    main([str(image), "Is 1+1=2?", *settings])
    printed = capsys.readouterr().out
    assert "<|seg_action|>" in printed and "-> sam: control state" in printed and f"wrote {out}" in printed
    assert "cut off: generation.max_new_tokens" in printed
    assert min(Image.open(out).size) > 400


WRONG = {
    "no image": (["{root}/nowhere.png", "what?"], "nowhere.png does not exist"),
    "no file": (["{root}", "what?"], "is a folder; give the path of an image file"),
    "no picture": (["{root}/text.png", "what?"], "text.png cannot be read"),
    "half a picture": (["{root}/half.png", "what?"], "half.png cannot be read (image file is truncated); replace the file"),
    "no question": (["{image}", " "], "the question is empty"),
    "words apart": (["{image}", "what", "is", "it?"], "the question in quotes"),
    "a placeholder": (["{image}", "what is in <image>?"], "the question holds <image>"),
    "a key": (["{image}", "what?", "generation.temprature=1"], "did you mean generation.temperature"),
    "a key at the top": (["{image}", "what?", "actoin=none"], "did you mean action"),
    "a range": (["{image}", "what?", "generation.top_p=2"], "must lie between"),
    "an encoder": (["{image}", "what?", "action=siglip"], "this model can do; it knows free, none, region, dino, sam, clip"),
    "two actions": (["{image}", "what?", "action=sam", "generation.action=dino"], "give one"),
    "a long prompt": (["{image}", "what? " * 200, "data.max_length=300"], "tokens, data.max_length is 300"),
    "a folder": (["{image}", "what?", "out=/nowhere/a.png"], "folder /nowhere does not exist"),
    "a format": (["{image}", "what?", "out={root}/a.txt"], "is no picture format"),
    "a stop": (["{image}", "what?", "generation.stop=[red circle]"], "a stop is one token"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_says_what_to_do(name, checkpoint, image, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    arguments, message = WRONG[name]
    filled = [argument.format(root=tmp_path, image=image) for argument in arguments]
    with pytest.raises(UserError, match=re.escape(message)):
        main([*filled, f"checkpoint={checkpoint}", "device=cpu"])


def test_a_gpu_that_is_not_there(checkpoint, image, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU here; type device=cpu"):
        main([str(image), "what?", f"checkpoint={checkpoint}", "device=cuda"])


def test_an_answer_without_words_is_told(all_parts, capsys):
    streamer = AnswerStreamer(all_parts.tokenizer)
    streamer.end(Answer("", [], [PerceptionStep("region", status=IGNORED)], complete=True))
    printed = capsys.readouterr().out
    assert "region: ignored; it cannot be read" in printed and "(no answer)" in printed and "cut off" not in printed


def test_a_limit_can_be_raised_as_the_message_says(checkpoint, image, capsys):
    question = [str(image), "what? " * 200, f"checkpoint={checkpoint}", "generation.max_new_tokens=2", "device=cpu"]
    with pytest.raises(DataError, match="the prompt has"):
        main(question)
    main([*question, "data.max_length=4000"])
    assert "cut off" in capsys.readouterr().out


def test_settings_from_python_that_do_not_exist(all_parts, image):
    with pytest.raises(ConfigError, match=r"did you mean generation\.temperature"):
        all_parts.ask(image, "what?", temprature=1.0)


def test_arguments_in_any_order():
    image, question, config = read_arguments(["checkpoint=a", "b.png", "action=none", "Is x = 3 there?", "out=c.png"])
    assert (image, question, config.checkpoint, config.out) == ("b.png", "Is x = 3 there?", "a", "c.png")
    assert config.generation["action"] == "none"


def test_help_and_an_error_from_the_shell(image):
    def run(*arguments):
        return run_program("-m", "vpt", "ask", *arguments)

    assert "vpt ask IMAGE QUESTION" in run("--help").stdout
    done = run(str(image), "what?", "chekpoint=x")
    assert done.returncode == 2 and "did you mean checkpoint" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text", ["Is it <image> red?", f"Is it <image> red? {REENCODE_PROMPT}", f"Is it <image> red? {REGION_PROMPT} "]
)
def test_a_question_has_one_sentence_that_asks_for_perception(text):
    """Also where the user, or an example of the page, has written one: that of the action that is forced."""
    assert with_prompt(text, REGION_PROMPT) == f"Is it <image> red? {REGION_PROMPT}"
    assert with_prompt(text, "") == text.rstrip()
