"""Regions that a model writes as text, and perception without a control state, while answering."""

import pytest
import torch

from conftest import ALL, compose_config, conversation, samples_of
from helpers.scripted_generator import Scripted, records
from vpt.data.collate import collate
from vpt.errors import ConfigError
from vpt.generation.row_state import GenerationLimits
from vpt.perception.regions import Region

TEXT = ("encoder=[dino]", "model.region_bins=1000", "model.region_format=text")
REGION = Region(125, 250, 749, 874)
CROP = REGION.to_box((96, 48), bins=1000)


def looking(*answers: str):
    """A row that writes each of `answers` in a turn of its own; all but the last are shown the crop."""
    turns = []
    for text in answers[:-1]:
        turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "<image>"}]
    raw = conversation("1.png", turns, answer=answers[-1])
    raw["images"] += ["1.png_%d,%d,%d,%d" % CROP] * (len(answers) - 1)
    return raw


def answer(parts, folder, raw, limits):
    sample = samples_of(parts, folder, [raw])[0]
    generator = Scripted(parts, [sample], limits)
    found = generator.generate([parts.processor.encode_prompt(sample.record, folder)], [folder])[0]
    return sample, generator, found


@pytest.mark.parametrize("spelling", [REGION.to_text(), REGION.to_numbers()])
def test_a_box_in_text_leads_to_the_crop(make_parts, folder, spelling):
    """As with region tokens: what is generated is what one forward computes over the whole text."""
    parts = make_parts(*TEXT)
    sample, generator, found = answer(parts, folder, looking(spelling, "yes"), GenerationLimits(60, 3))
    assert (found.text, found.complete) == ("yes", True)
    assert [(step.kind, step.status, step.box) for step in found.trace] == [("region", "done", CROP)]
    assert found.trace[0].requested == "[125, 250, 749, 874]"
    with torch.no_grad():
        want = parts.model(collate([sample]), keep_logits=True).logits
    torch.testing.assert_close(torch.stack(generator.logits[sample.record.where]), want, rtol=1e-4, atol=2e-4)


def test_swapped_corners_are_repaired_and_other_text_is_an_answer(make_parts, folder):
    parts = make_parts(*TEXT)
    found = answer(parts, folder, looking("[749, 874, 125, 250]", "yes"), GenerationLimits(60, 3))[2]
    assert [(step.status, step.box) for step in found.trace] == [("repaired", CROP)]
    for text in ("[125, 250, 749]", "[125, 250, 749, 1000]"):
        found = answer(parts, folder, looking(text), GenerationLimits(60, 3))[2]
        assert (found.text, found.trace, found.complete) == (text, [], True)


def test_a_box_that_is_one_too_many_or_forbidden_is_the_answer(make_parts, folder):
    parts, numbers = make_parts(*TEXT), REGION.to_numbers()
    found = answer(parts, folder, looking(numbers, numbers, "yes"), GenerationLimits(60, 1))[2]
    assert [step.status for step in found.trace] == ["done", "ignored"] and found.text == numbers
    for action in ("none", "dino"):
        limits = GenerationLimits(60, 3, action=action)
        found = answer(parts, folder, looking(numbers, "yes"), limits)[2]
        assert [step.status for step in found.trace] == ["ignored"] and found.text == numbers
    with pytest.raises(ConfigError, match="for models with region tokens"):
        compose_config(*TEXT, "generation.action=region")


@pytest.mark.parametrize("scale", [1, 2])
def test_without_control_states_generating_equals_one_forward(make_parts, folder, scale):
    """`num_inner_forward_run=1`: control tokens keep their own embedding, and nothing is conditioned."""
    parts = make_parts(*ALL, "model.num_inner_forward_run=1", f"model.projector_scale={scale}")
    samples = samples_of(parts, folder, records())
    with torch.no_grad():
        want = parts.model(collate(samples), keep_logits=True).logits
    generator = Scripted(parts, samples, GenerationLimits(200, 5))
    generator.generate(
        [parts.processor.encode_prompt(sample.record, folder) for sample in samples], [folder] * len(samples)
    )
    got = torch.cat([torch.stack(generator.logits[sample.record.where]) for sample in samples])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
