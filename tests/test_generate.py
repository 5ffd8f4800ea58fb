"""Answering equals reading: what is generated step by step is what one forward computes over the whole text."""

import pytest
import torch

from conftest import ALL, FAMILIES, REGION_TURNS, action_turns, conversation, samples_of
from vpt.data.packing import pack
from vpt.generate import Generator
from vpt.regions import Region
from vpt.speaker import Limits

REGION = Region(1, 2, 5, 6)


class Scripted(Generator):
    """Says what its records say, and keeps the logits it would have chosen from."""

    def __init__(self, parts, samples, limits):
        super().__init__(parts.model.eval(), parts.encoder, parts.tokenizer.decode, limits)
        self.limits = limits
        self.logits = {}
        controls = set(self._controls)
        self.scripts = {
            sample.record.where: [t for t in sample.labels.tolist() if t != -100 and t not in controls]
            for sample in samples
        }

    def _choose(self, speakers, logits):
        chosen = []
        for speaker, row in zip(speakers, logits, strict=True):
            where = speaker.sample.record.where
            said = self.logits.setdefault(where, [])
            chosen.append(self.scripts[where][len(said)])
            said.append(row)
        return chosen


def records():
    """Conversations whose actions all look at the first image, as a generating model does."""
    region = conversation("1.png", REGION_TURNS)
    region["images"].append("1.png_%d,%d,%d,%d" % REGION.to_box((96, 48), bins=8))
    both = conversation("2.png", REGION_TURNS, action_turns("seg"), answer="no", seg_images=["2.png"])
    both["images"].append("2.png_%d,%d,%d,%d" % REGION.to_box((80, 112), bins=8))
    many = conversation(
        "0.png", action_turns("detection"), action_turns("clip"), action_turns("detection"), answer="a red circle",
        detection_images=["0.png", "0.png"], clip_images=["0.png"],
    )  # fmt: skip
    return [many, region, both, conversation("3.png", answer="brown")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("positions", ["sequential", "grid"])
def test_generating_step_by_step_equals_one_forward(make_parts, folder, family, scale, positions):
    parts = make_parts(
        *ALL, *FAMILIES[family], f"model.projector_scale={scale}", f"model.perceived_positions={positions}"
    )
    samples = samples_of(parts, folder, records())
    with torch.no_grad():
        want = parts.model(pack(samples), keep_logits=True)
    generator = Scripted(parts, samples, Limits(200, 5))
    prompts = [parts.encoder.prompt(sample.record, folder) for sample in samples]
    answers = generator.answer(prompts, [folder] * len(prompts))
    got = torch.cat([torch.stack(generator.logits[sample.record.where]) for sample in samples])
    torch.testing.assert_close(got, want.logits, rtol=1e-4, atol=2e-4)
    assert [len(answer.trace) for answer in answers] == [3, 1, 2, 0]
    assert [step.kind for step in answers[0].trace] == ["dino", "clip", "dino"]
    assert answers[1].trace[0].box == REGION.to_box((96, 48), bins=8)
    assert [answer.text for answer in answers] == ["a red circle", "yes", "no", "brown"]
    assert all(answer.complete for answer in answers)


def test_alone_and_in_a_batch(make_parts, folder):
    """A row's ids do not depend on its neighbours."""
    parts = make_parts(*ALL)
    generator = Generator(parts.model.eval(), parts.encoder, parts.tokenizer.decode, Limits(24, 2))
    prompts = [parts.encoder.prompt(sample.record, folder) for sample in samples_of(parts, folder)]
    together = [answer.ids for answer in generator.answer(prompts, [folder] * len(prompts))]
    alone = [generator.answer([prompt], [folder])[0].ids for prompt in prompts]
    assert together == alone


def test_it_equals_prompting_again_with_the_perceived_turn(make_parts, folder):
    """The two rounds of the released evaluation: prompt, then prompt again with what was perceived."""
    parts = make_parts(*ALL)
    raw = records()[0]
    sample = samples_of(parts, folder, [raw])[0]
    record = sample.record

    class Opening(Scripted):
        """Says the first turn's script, then answers freely."""

        def _choose(self, speakers, logits):
            script = self.scripts[speakers[0].sample.record.where][:3]
            said = self.logits.setdefault("n", [])
            said.append(0)
            free = Generator._choose(self, speakers, logits)
            return script[len(said) - 1 : len(said)] if len(said) <= len(script) else free

    opening = Opening(parts, [sample], Limits(20, 5))
    first = opening.answer([parts.encoder.prompt(record, folder)], [folder])[0].ids
    generator = Generator(parts.model, parts.encoder, parts.tokenizer.decode, Limits(20 - 4, 4))
    second = generator.answer([parts.encoder.prompt(record, folder, turns=2)], [folder])[0].ids
    assert first[4:] == second


def test_actions_are_bounded(make_parts, folder):
    """After `max_actions` the tokens that ask are forbidden, so no answer perceives for ever."""
    parts = make_parts("encoder=[dino]")
    vocabulary = parts.model.vocabulary
    start, end = vocabulary.actions["dino"].start, vocabulary.im_end

    class Insistent(Generator):
        def _choose(self, speakers, logits):
            return [start if row[start] > -torch.inf and (not s.said) else end for s, row in zip(speakers, logits)]

    generator = Insistent(parts.model.eval(), parts.encoder, parts.tokenizer.decode, Limits(100, 2))
    prompt = parts.encoder.prompt(samples_of(parts, folder, [conversation("0.png")])[0].record, folder)
    answer = generator.answer([prompt], [folder])[0]
    assert len(answer.trace) == 2 and answer.complete


@pytest.mark.parametrize(
    ("said", "region"),
    [
        ("s x1 y2 x5 y6 e", Region(1, 2, 5, 6)),
        ("s x5 y6 x1 y2 e", Region(1, 2, 5, 6)),
        ("s x1 y2 x5 e", None),
        ("s x1 x2 y5 y6 e", None),
        ("x1 y2 x5 y6 e", None),
        ("s s x0 y0 x0 y0 e", Region(0, 0, 0, 0)),
    ],
)
def test_malformed_regions(make_parts, said, region):
    """Corners are put in order; anything but start, x, y, x, y, end is no region."""
    parts = make_parts("encoder=[]")
    v = parts.model.vocabulary
    ids = {"s": v.region_start, "e": v.region_end} | {f"x{i}": t for i, t in enumerate(v.x)}
    ids |= {f"y{i}": t for i, t in enumerate(v.y)}
    generator = Generator(parts.model, parts.encoder, parts.tokenizer.decode, Limits())
    assert generator._region([ids[word] for word in said.split()]) == region
