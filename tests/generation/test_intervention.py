"""What an intervention changes, it changes for its rows alone; what it leaves, stays."""

import pytest
import torch
from PIL import Image

from conftest import ALL, REGION_TURNS, action_turns, conversation, samples_of
from helpers.scripted_generator import Scripted
from vpt.generation.intervention import Intervention
from vpt.generation.row_state import GenerationLimits
from vpt.perception.regions import Region


def records():
    """A re-encoding, a region, and an answer at once."""
    region = conversation("1.png", REGION_TURNS)
    region["images"].append("1.png_12,12,72,42")
    acting = conversation("0.png", action_turns("detection"), answer="a red circle", detection_images=["0.png"])
    return [acting, region, conversation("3.png", answer="brown")]


def said(parts, folder, intervention):
    """Logits of every scripted token, [rows][tokens, vocabulary], and the answers."""
    samples = samples_of(parts, folder, records())
    generator = Scripted(parts, samples, GenerationLimits(200, 5), intervention)
    prompts = [parts.processor.encode_prompt(sample.record, folder) for sample in samples]
    answers = generator.generate(prompts, [folder] * len(prompts))
    return [torch.stack(generator.logits[sample.record.where]) for sample in samples], answers


class NoTokens(Intervention):
    def tokens(self, tokens, *, source, record):
        return torch.zeros_like(tokens)


class NoStates(Intervention):
    def states(self, states, *, kind, record):
        return torch.zeros_like(states)


class White(Intervention):
    def image(self, image, *, record):
        return Image.new("RGB", image.size, "white")


class Everything(Intervention):
    def region(self, region, size, *, bins, record):
        return Region(0, 0, bins - 1, bins - 1)


class Markers(Intervention):
    perceives = False


CHANGED = {NoTokens: [0, 1], NoStates: [0], White: [0, 1], Everything: [1], Markers: [0, 1]}


@pytest.mark.parametrize("kind", CHANGED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scale", [1, 2])
def test_it_acts_where_it_should_and_only_after_asking(make_parts, folder, kind, scale):
    parts = make_parts(*ALL, f"model.projector_scale={scale}")
    before, plain = said(parts, folder, Intervention())
    after, changed = said(parts, folder, kind())
    for row, (was, now) in enumerate(zip(before, after, strict=True)):
        asked = 3 if row == 0 else 7  # tokens that the script says before the perceived turn, controls left out
        torch.testing.assert_close(was[:1], now[:1], rtol=0, atol=2e-5)
        same = torch.allclose(was[asked:], now[asked:], rtol=0, atol=1e-3)
        assert same == (row not in CHANGED[kind])
    if kind is Markers:
        assert [step.visual_tokens for answer in changed for step in answer.trace] == [0, 0]
        assert [len(answer.trace) for answer in changed] == [len(answer.trace) for answer in plain]
    if kind is Everything:
        assert changed[1].trace[0].box == (0, 0, 96, 48)
    if kind is NoStates:
        assert changed[0].trace[0].state_norm == 0.0
