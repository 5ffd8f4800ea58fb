"""Several requests in one turn, with words around: each is shown in order, and answering equals one forward."""

import pytest
import torch

from conftest import ALL, action_turns, conversation, samples_of
from helpers.decode_from_scratch import FromScratch
from helpers.scripted_generator import Scripted, script_of
from vpt.data.collate import collate
from vpt.generation.row_state import GenerationLimits
from vpt.perception.regions import Region
from vpt.perception.tokens import action_tokens

SIZE = (96, 48)  # of 1.png
DINO, SAM, CLIP = ("".join(action_tokens(token)) for token in ("detection", "seg", "clip"))


def row(regions: list[Region], said: str, shown: str, *, bins: int = 8, answer: str = "a cup", **images: list[str]):
    """A turn that says `said`, with `regions` for its `{}`, and is shown `shown`; all about 1.png."""
    turns = [{"role": "assistant", "content": said.format(*(region.to_text() for region in regions))},
             {"role": "user", "content": shown}]  # fmt: skip
    record = conversation("1.png", turns, answer=answer, **images)
    record["images"] += ["1.png_%d,%d,%d,%d" % region.to_box(SIZE, bins=bins) for region in regions]
    return record


def rows(first: Region, second: Region, *, bins: int = 8) -> list[dict]:
    """Two regions; a region and a re-encoding; two encoders between words; one encoder twice; a turn after that."""
    two = row([first, second], "Here: {} and {}, I think.", "<image><image>", bins=bins)
    mixed = row([first], "{}" + DINO, "<image><detection_image>", bins=bins, detection_images=["1.png"])
    encoders = row([second], SAM + " so " + DINO + "{}.", "<seg_image><detection_image><image>", bins=bins,
                   detection_images=["1.png"], seg_images=["1.png"])  # fmt: skip
    twice = row([], f"{CLIP}{CLIP}", "<clip_image><clip_image>", clip_images=["1.png"] * 2, detection_images=["1.png"])
    twice["messages"][3:3] = action_turns("detection")
    return [two, mixed, encoders, twice]


KINDS = [["region"] * 2, ["region", "dino"], ["sam", "dino", "region"], ["clip", "clip", "dino"]]
CASES = {
    "tokens": (("model.projector_scale=1",), 8),
    "two control tokens, grid positions": (("model.projector_scale=2", "model.reencoded_positions=grid"), 8),
    "regions in text": (("model.region_format=text", "model.region_bins=100"), 100),
}


@pytest.mark.parametrize("case", CASES)
def test_answering_equals_one_forward(make_parts, folder, case):
    overrides, bins = CASES[case]
    parts = make_parts(*ALL, *overrides, "data.max_length=1024")
    first, second = Region(1, 2, bins // 2, bins - 2), Region(0, 0, bins - 1, bins // 3)
    samples = samples_of(parts, folder, rows(first, second, bins=bins))
    with torch.no_grad():
        want = parts.model(collate(samples), keep_logits=True).logits
    generator = Scripted(parts, samples, GenerationLimits(300, 5))
    prompts = [parts.processor.encode_prompt(sample.record, folder) for sample in samples]
    answers = generator.generate(prompts, [folder] * len(prompts))
    got = torch.cat([torch.stack(generator.logits[sample.record.where]) for sample in samples])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert [[step.kind for step in answer.trace] for answer in answers] == KINDS
    assert {step.status for answer in answers for step in answer.trace} == {"done"}
    assert [step.box for step in answers[0].trace] == [region.to_box(SIZE, bins=bins) for region in (first, second)]
    assert all(step.seconds > 0 and step.visual_tokens > 0 for answer in answers for step in answer.trace)
    assert [(answer.text, answer.complete) for answer in answers] == [("a cup", True)] * 4
    assert [len(answer.states) for answer in answers] == [0, 1, 2, 3]
    asked = [step.requested for step in answers[0].trace]
    assert asked == [region.to_numbers() if "text" in case else region.to_text() for region in (first, second)]


def test_as_from_scratch_and_independent_of_the_batch(all_parts, folder):
    """Ids after turns with several requests: without a cache, alone, and beside rows that ask otherwise."""
    samples = samples_of(all_parts, folder, rows(Region(1, 2, 4, 6), Region(0, 0, 7, 2)))[1:3]
    end = all_parts.model.vocabulary.im_end
    scripts = {s.record.where: script_of(all_parts, s)[: script_of(all_parts, s).index(end) + 1] for s in samples}

    class Opening(Scripted):
        def _sample(self, rows, logits):
            free = super(Scripted, self)._sample(rows, logits)
            left = [self.scripts[row.sample.record.where] for row in rows]
            return [script.pop(0) if script else token for script, token in zip(left, free, strict=True)]

    def ids(chosen):
        generator = Opening(all_parts, chosen, GenerationLimits(26, 4))
        generator.scripts = {where: [*script] for where, script in scripts.items()}
        prompts = [all_parts.processor.encode_prompt(sample.record, folder) for sample in chosen]
        return [answer.ids for answer in generator.generate(prompts, [folder] * len(prompts))]

    together = ids(samples)
    assert together == [ids([sample])[0] for sample in samples]
    for sample, said in zip(samples, together, strict=True):
        script = scripts[sample.record.where]
        assert said == FromScratch(all_parts, sample.record, folder, limit=26, actions=4, script=script).decode()
        assert len(said) > len(script)


def test_requests_beyond_the_limit_cannot_be_made(all_parts, folder):
    """`max_actions` counts requests, not turns; what can be read is shown beside what cannot."""
    v = all_parts.model.vocabulary
    [sample] = samples_of(all_parts, folder, [conversation("1.png")])
    start, end = v.region_start, v.region_end
    proper = [start, v.x[1], v.y[2], v.x[5], v.y[6], end]

    class Asking(Scripted):
        def _sample(self, rows, logits):
            self.constraints.mask_logits(logits, rows)
            wanted = [self.scripts["record 0"].pop(0) if self.scripts["record 0"] else v.im_end for _ in rows]
            return [token if row[token] > -torch.inf else v.im_end for token, row in zip(wanted, logits, strict=True)]

    generator = Asking(all_parts, [sample], GenerationLimits(60, 3))
    generator.scripts["record 0"] = [*proper, start, v.x[1], end, *proper, *proper]
    [answer] = generator.generate([all_parts.processor.encode_prompt(sample.record, folder)], [folder])
    assert [step.status for step in answer.trace] == ["done", "ignored", "done"]
    assert [step.visual_tokens > 0 for step in answer.trace] == [True, False, True]


@pytest.mark.parametrize(("limit", "statuses"), [(1, ["done", "ignored"]), (2, ["done", "done"])])
def test_regions_in_text_beyond_the_limit_are_ignored(make_parts, folder, limit, statuses):
    parts = make_parts("encoder=[]", "model.region_bins=100", "model.region_format=text")
    regions = [Region(10, 20, 49, 99), Region(0, 0, 99, 40)]
    said = "left {} or {}; not [1, 2, 3] nor [1, 2, 3, 100]"
    [sample] = samples_of(parts, folder, [row(regions, said, "<image><image>", bins=100)])
    generator = Scripted(parts, [sample], GenerationLimits(90, limit))
    [answer] = generator.generate([parts.processor.encode_prompt(sample.record, folder)], [folder])
    assert [step.status for step in answer.trace] == statuses and answer.text == "a cup"
