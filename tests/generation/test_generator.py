"""Answering equals reading: what is generated step by step is what one forward computes over the whole text."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import (
    ALL,
    FAMILIES,
    TOKENS,
    action_turns,
    conversation,
    mixed_records,
    samples_of,
)
from helpers.decode_from_scratch import FromScratch
from helpers.scripted_generator import REGION, Scripted, records, script_of
from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.errors import ConfigError
from vpt.generation.generator import Generator
from vpt.generation.row_state import GenerationLimits
from vpt.generation.sampling import Sampling
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region
from vpt.perception.requests import PerceptionParser
from vpt.perception.tokens import stop_ids

POSITIONS = ("reencoded_positions=sequential", "reencoded_positions=grid", "positions=sequential")


@pytest.mark.parametrize(
    ("family", "scale", "positions"),
    [*(("qwen2_vl", scale, positions) for scale in (1, 3) for positions in POSITIONS),
     ("qwen2_5_vl", 1, POSITIONS[0]), ("qwen2_5_vl", 3, POSITIONS[1]),
     ("qwen3_vl", 1, POSITIONS[0]), ("qwen3_vl", 3, POSITIONS[1])],
)  # fmt: skip
def test_generating_step_by_step_equals_one_forward(make_parts, folder, family, scale, positions):
    parts = make_parts(*ALL, *FAMILIES[family], f"model.projector_scale={scale}", f"model.{positions}")
    samples = samples_of(parts, folder, records())
    with torch.no_grad():
        want = parts.model(collate(samples), keep_logits=True)
    generator = Scripted(parts, samples, GenerationLimits(200, 5))
    prompts = [parts.processor.encode_prompt(sample.record, folder) for sample in samples]
    answers = generator.generate(prompts, [folder] * len(prompts))
    got = torch.cat([torch.stack(generator.logits[sample.record.where]) for sample in samples])
    torch.testing.assert_close(got, want.logits, rtol=1e-4, atol=2e-4)
    assert [len(answer.trace) for answer in answers] == [3, 1, 2, 0, 3]
    assert [step.kind for step in answers[0].trace] == ["dino", "clip", "dino"]
    assert answers[1].trace[0].box == REGION.to_box((96, 48), bins=8)
    assert [answer.text for answer in answers] == ["a red circle", "yes", "no", "brown", "teal"]
    assert all(answer.complete for answer in answers)


def test_nothing_is_looked_at_that_no_token_is_left_to_speak_of(all_parts, folder):
    """At the limit, an answer that ends with a request is cut off; one that ends without is complete."""
    samples = samples_of(all_parts, folder, records()[:4])
    for sample, asks in zip(samples, (True, True, True, False), strict=True):
        first = next(place for place, label in enumerate(sample.labels) if label != -100)
        last = sample.labels.tolist().index(all_parts.model.vocabulary.im_end)
        said = sample.ids[first : last + 1].tolist()
        generator = Scripted(all_parts, [sample], GenerationLimits(len(said), 5))
        [answer] = generator.generate([all_parts.processor.encode_prompt(sample.record, folder)], [folder])
        assert answer.ids == said and answer.complete != asks
        assert [step.status for step in answer.trace] == ["ignored"] * asks and all(
            step.visual_tokens == 0 for step in answer.trace
        )


class Opening(Generator):
    """Begins each row with a script, then answers freely."""

    def __init__(self, parts, scripts, limits, sampling=None):
        super().__init__(parts.model.eval(), parts.processor, parts.tokenizer.decode, limits, sampling)
        self.scripts = scripts

    def _sample(self, rows, logits):
        free = super()._sample(rows, logits)
        left = [self.scripts.get(row.sample.record.where, []) for row in rows]
        return [script.pop(0) if script else token for script, token in zip(left, free, strict=True)]


def prompts_of(parts, folder, raws):
    return [parts.processor.encode_prompt(sample.record, folder) for sample in samples_of(parts, folder, raws)]


def free(parts, limits, sampling=None):
    return Generator(parts.model.eval(), parts.processor, parts.tokenizer.decode, limits, sampling)


DRAWN = Sampling(1.5, top_k=40, top_p=0.9, seed=7)


@pytest.mark.parametrize(
    ("sampling", "from_scratch"),
    [(Sampling(), range(8)), (DRAWN, (0, 2)), pytest.param(DRAWN, range(8), marks=pytest.mark.slow)],
    ids=["greedy", "drawn", "drawn, every row"],
)
def test_alone_in_any_batch_and_from_scratch(all_parts, folder, sampling, from_scratch):
    """A row's ids depend neither on its neighbours nor on the cache; actions come first, then free text."""
    parts, limits, raws = all_parts, GenerationLimits(20, 5), [*records(), *mixed_records()[5:8]]
    samples = samples_of(parts, folder, raws)
    prompts = [parts.processor.encode_prompt(sample.record, folder) for sample in samples]

    def scripts():  # up to the end of the first turn, where something is asked for
        turns = [script_of(parts, sample) for sample in samples]
        ends = [turn.index(parts.model.vocabulary.im_end) + 1 for turn in turns]
        return {
            sample.record.where: turn[:end] if end < len(turn) else []
            for sample, turn, end in zip(samples, turns, ends, strict=True)
        }

    def ids(numbers):
        answers = Opening(parts, scripts(), limits, sampling).generate(
            [prompts[i] for i in numbers], [folder] * len(numbers), numbers=numbers
        )
        return {i: answer.ids for i, answer in zip(numbers, answers, strict=True)}

    together = ids(range(len(raws)))
    assert together == ids([4, 7, 1, 0]) | ids([6, 5, 3, 2]), "another batch, another order"
    assert together == {i: alone for number in range(len(raws)) for i, alone in ids([number]).items()}
    for number in from_scratch:
        sample = samples[number]
        if VISION_TOWER in sample.record.images:
            script = scripts()[sample.record.where]
            scratch = FromScratch(
                parts, sample.record, folder, limit=20, actions=5, script=script, sampling=sampling, number=number
            )
            assert together[number] == scratch.decode(), number


@pytest.mark.parametrize(
    ("kind", "scale", "limit"),
    [("dino", 1, 28), ("region + sam", 1, 28), ("clip", 2, 28), ("region + sam", 2, 28),
     *(pytest.param(kind, scale, 40, marks=pytest.mark.slow)
       for kind in ("region", "dino", "sam", "clip", "region + sam") for scale in (1, 2))],
)  # fmt: skip
def test_it_equals_prompting_again_with_the_perceived_turn(make_parts, folder, kind, scale, limit):
    """The two rounds of the authors' evaluation: prompt, then prompt again with what was perceived, from scratch."""
    parts = make_parts(*ALL, f"model.projector_scale={scale}")
    region, both = records()[1:3]
    if kind.startswith("region"):
        raw = both if "+" in kind else region
    else:
        raw = conversation("1.png", action_turns(TOKENS[kind]), **{f"{TOKENS[kind]}_images": ["1.png"]})
    turns = len(raw["messages"]) // 2
    sample = samples_of(parts, folder, [raw])[0]
    prompt = parts.processor.encode_prompt(sample.record, folder)
    again = parts.processor.encode_prompt(sample.record, folder, turns=turns)
    script = script_of(parts, sample)
    asking = script[: last_index(script[:-1], parts.model.vocabulary.im_end) + 1]

    once = Opening(parts, {sample.record.where: [*asking]}, GenerationLimits(limit, 3)).generate([prompt], [folder])[0]
    told = len(asking) + scale * sum(step.kind != "region" for step in once.trace[: turns - 1])
    twice = free(parts, GenerationLimits(limit - told, 3 - (turns - 1))).generate([again], [folder])[0]
    scratch = FromScratch(parts, sample.record, folder, limit=limit, actions=3, script=asking).decode()
    assert [step.kind for step in once.trace[: turns - 1]] == kind.split(" + ")
    assert once.ids[told:] == twice.ids and len(twice.ids) > 3
    assert once.ids == scratch


def test_a_wider_crop_equals_prompting_with_it(make_parts, folder):
    """`crop_margin`: the ids that follow are those of the wider crop, from scratch, and not those of the narrow one."""
    parts = make_parts(*ALL)
    [sample] = samples_of(parts, folder, records()[1:2])
    script = script_of(parts, sample)[:7]

    def scratch(margin):
        return FromScratch(parts, sample.record, folder, limit=24, script=script, margin=margin).decode()

    generator = Opening(parts, {sample.record.where: [*script]}, GenerationLimits(24, 3, crop_margin=1))
    answer = generator.generate([parts.processor.encode_prompt(sample.record, folder)], [folder])[0]
    assert answer.ids == scratch(1) != scratch(0)


@pytest.mark.parametrize("action", ["none", "region", "dino"])
def test_a_forced_action_is_the_same_alone_and_in_a_batch(all_parts, folder, action):
    prompts = prompts_of(all_parts, folder, [*records(), *mixed_records()[5:8]])
    generator = free(all_parts, GenerationLimits(16, 2, action=action))
    together = [answer.ids for answer in generator.generate(prompts, [folder] * len(prompts))]
    assert together == [generator.generate([prompt], [folder])[0].ids for prompt in prompts]
    assert len({*map(tuple, together)}) > 1


def last_index(values, value):
    return len(values) - 1 - values[::-1].index(value)


def test_control_states_steer_what_is_seen(make_parts, folder):
    """The comparisons above could not fail if states did nothing: without them other ids come out."""
    parts = make_parts("encoder=[dino]")
    raw = conversation("1.png", action_turns("detection"), detection_images=["1.png"])
    sample = samples_of(parts, folder, [raw])[0]
    script = script_of(parts, sample)[:3]
    logits = []
    for passes in (2, 1):
        parts.model.forward_config = replace(parts.model.forward_config, num_inner_forward_run=passes)
        reference = FromScratch(parts, sample.record, folder, limit=5, script=script)
        reference.decode()
        logits.append(reference.logits())
    assert (logits[0] - logits[1]).abs().max() > 1e-2


class Insistent(Generator):
    """Asks whenever it may, and ends its turn otherwise."""

    def _sample(self, rows, logits):
        self.constraints.mask_logits(logits, rows)
        start, end = self.vocabulary.actions["dino"].start, self.vocabulary.im_end
        return [start if row[start] > -torch.inf else end for row in logits]


@pytest.mark.parametrize("most", [0, 2])
def test_actions_are_bounded(make_parts, folder, most):
    """After `max_actions` the tokens that ask are forbidden, and so within a turn: no answer perceives for ever."""
    parts = make_parts("encoder=[dino]")
    generator = Insistent(parts.model.eval(), parts.processor, parts.tokenizer.decode, GenerationLimits(100, most))
    answer = generator.generate(prompts_of(parts, folder, [conversation("0.png")]), [folder])[0]
    assert [step.kind for step in answer.trace] == ["dino"] * most
    assert answer.complete


def test_a_loop_in_one_turn_ends(make_parts, folder):
    """Region tokens for ever end at `max_new_tokens`; the answer says that it was cut off, and what it asked for."""
    parts = make_parts("encoder=[]")

    class Looping(Generator):
        def _sample(self, rows, logits):
            self.constraints.mask_logits(logits, rows)
            start, x = self.vocabulary.region_start, self.vocabulary.x[0]
            return [start if row[start] > -torch.inf else x for row in logits]

    generator = Looping(parts.model.eval(), parts.processor, parts.tokenizer.decode, GenerationLimits(12, 2))
    answer = generator.generate(prompts_of(parts, folder, [conversation("0.png")]), [folder])[0]
    assert len(answer.ids) == 12 and not answer.complete
    assert [(step.kind, step.status) for step in answer.trace] == [("region", "ignored")] * 2


@pytest.mark.parametrize("action", ["none", "region", "dino", "clip"])
def test_actions_are_forced_and_forbidden(make_parts, folder, action):
    parts = make_parts("encoder=[dino,clip]", "model.projector_scale=2")
    vocabulary = parts.model.vocabulary
    raws = [conversation("0.png"), mixed_records()[5], conversation("3.png")]
    first, text, last = free(parts, GenerationLimits(30, 3, action=action)).generate(
        prompts_of(parts, folder, raws), [folder] * 3
    )
    assert not text.trace, "a question without an image has nothing to look at"
    allowed = {action} if action != "none" else set()
    for answer in (first, last):
        assert {step.kind for step in answer.trace if step.status != "ignored"} == allowed
    starts = {"region": [vocabulary.region_start]} | {
        name: [one.start, one.control, one.control, one.end, vocabulary.im_end]
        for name, one in vocabulary.actions.items()
    }
    if action in starts:
        assert first.ids[: len(starts[action])] == starts[action]
        assert first.trace[0].status in ("done", "repaired")
        assert (first.trace[0].box is None) == (action != "region")


def test_a_control_token_is_never_said(make_parts, folder):
    """Even where it is by far the likeliest."""
    parts = make_parts("encoder=[dino]")
    control = parts.model.vocabulary.actions["dino"].control

    class Longing(Generator):
        def _sample(self, rows, logits):
            logits[:, control] = 1e6
            return super()._sample(rows, logits)

    generator = Longing(parts.model.eval(), parts.processor, parts.tokenizer.decode, GenerationLimits(12, 0))
    assert control not in generator.generate(prompts_of(parts, folder, [conversation("0.png")]), [folder])[0].ids


@pytest.mark.parametrize("action", ["none", "region", "clip"])
def test_no_part_of_a_forbidden_action_is_said(make_parts, folder, action):
    """Even where all of it is by far the likeliest: an answer without perception holds no cells of a region."""
    parts = make_parts("encoder=[dino,clip]")
    v = parts.model.vocabulary
    own = {name: [one.start, one.end] for name, one in v.actions.items()}
    own["region"] = [v.region_start, *v.x, *v.y, v.region_end]
    foreign = [token for kind, tokens in own.items() if kind != action for token in tokens]

    class Longing(Generator):
        def _sample(self, rows, logits):
            logits[:, foreign] = 1e6
            return super()._sample(rows, logits)

    generator = Longing(
        parts.model.eval(), parts.processor, parts.tokenizer.decode, GenerationLimits(14, 1, action=action)
    )
    answer = generator.generate(prompts_of(parts, folder, [conversation("0.png")]), [folder])[0]
    assert len(answer.ids) > 6 and not {*answer.ids} & {*foreign}


def test_stop_tokens(make_parts, folder):
    parts = make_parts("encoder=[]")
    prompts = prompts_of(parts, folder, [conversation("0.png")])
    whole = free(parts, GenerationLimits(10, 0)).generate(prompts, [folder])[0]
    assert not whole.complete
    stop = whole.ids[4]
    short = free(parts, GenerationLimits(10, 0, stop=(stop,))).generate(prompts, [folder])[0]
    assert short.complete and short.ids == whole.ids[: whole.ids.index(stop) + 1]
    assert short.text == parts.tokenizer.decode(short.ids[:-1]).strip()
    with pytest.raises(ConfigError, match=r"'red circle' is 2 tokens|'red circle' is \d+ tokens"):
        stop_ids(parts.tokenizer, ["red circle"])
    assert stop_ids(parts.tokenizer, ["<|im_end|>"]) == (parts.model.vocabulary.im_end,)


@pytest.mark.parametrize(
    ("said", "region", "repaired"),
    [
        ("s x1 y2 x5 y6 e", Region(1, 2, 5, 6), False),
        ("s x5 y6 x1 y2 e", Region(1, 2, 5, 6), True),  # corners swapped
        ("s x5 y2 x1 y6 e", Region(1, 2, 5, 6), True),
        ("s x1 x5 y2 y6 e", Region(1, 2, 5, 6), True),  # another order
        ("s x1 y2 a x5 y6 e", Region(1, 2, 5, 6), True),  # a word in between
        ("s x1 y2 x5 y6", Region(1, 2, 5, 6), True),  # no end
        ("s x1 y2 x5 y6 x0 e x7", Region(1, 2, 5, 6), True),
        ("s x1 y2 x5 e", None, False),  # a corner is missing
        ("s x1 y2 x5 e y6", None, False),
        ("s e", None, False),
        ("s x3 y3 x3 y3 e", Region(3, 3, 3, 3), False),  # one cell
    ],
)
def test_malformed_regions(all_parts, said, region, repaired):
    v = all_parts.model.vocabulary
    ids = {"s": v.region_start, "e": v.region_end, "a": 70} | {f"x{i}": t for i, t in enumerate(v.x)}
    ids |= {f"y{i}": t for i, t in enumerate(v.y)}
    asking = PerceptionParser(v)
    request = asking.parse([70, *(ids[word] for word in said.split()), v.im_end])[0]
    assert (request.region, request.repaired) == (region, repaired)
    assert asking.parse([ids[word] for word in said.split()[1:]]) == [], "nothing is asked for without a start"
    twice = asking.parse([ids[word] for word in f"s x1 {said}".split()])
    assert [each.region for each in twice] == [None, region] and twice[1].readable == (region is not None)


def test_the_trace_tells_what_was_repaired_and_ignored(make_parts, folder):
    parts = make_parts("encoder=[dino]")
    v = parts.model.vocabulary
    scripts = {
        "record 0": [v.region_start, v.region_start, v.x[5], v.y[6], v.x[1], v.y[2], v.region_end, v.im_end],
        "record 1": [v.region_start, v.x[5], v.y[6], v.region_end, v.im_end],
        "record 2": [v.region_start, v.x[5], v.y[6], v.x[1], v.y[2], v.end_of_text],
        "record 3": [v.actions["dino"].start, v.actions["dino"].end, v.im_end],
    }
    raws = [conversation("3.png")] * 4
    answers = Opening(parts, {key: [*value] for key, value in scripts.items()}, GenerationLimits(12, 4)).generate(
        prompts_of(parts, folder, raws), [folder] * 4
    )
    steps = [[(step.kind, step.status) for step in answer.trace] for answer in answers]
    assert steps[0][:2] == [("region", "ignored"), ("region", "repaired")]
    assert steps[1] == steps[2] == [("region", "ignored")] and answers[1].complete and answers[2].complete
    assert steps[3][0] == ("dino", "done")
    repaired, seen = answers[0].trace[1], answers[3].trace[0]
    assert repaired.box == Region(1, 2, 5, 6).to_box((200, 150), bins=8) and repaired.visual_tokens > 0
    assert repaired.requested == "<|region_token_start|><|x_5|><|y_6|><|x_1|><|y_2|><|region_token_end|>"
    assert repaired.seconds > 0 and repaired.state_norm is None
    assert seen.state_norm == pytest.approx(answers[3].states[0].norm(dim=-1).mean().item()) and seen.seconds > 0


def test_crops_come_from_the_original_at_full_resolution(make_parts, tmp_path):
    """A fine pattern in the corner of a large image survives in the crop though the first look was limited."""
    parts = make_parts("encoder=[]", "data.image.max_side=64")
    pixels = np.zeros((256, 512, 3), dtype=np.uint8)
    pixels[:64, :128] = np.random.default_rng(0).integers(0, 255, (64, 128, 3))
    Image.fromarray(pixels).save(tmp_path / "large.png")
    folder = MediaStore(tmp_path, max_side=64)
    v = parts.model.vocabulary
    seen = []

    class Watching(Opening):
        def advance(self, rows, outputs):
            seen.extend(visual.image for row in rows for visual in row.next_input.visuals)
            return super().advance(rows, outputs)

    for margin, box in ((0, (0, 0, 128, 64)), (1, (0, 0, 192, 96))):
        script = [v.region_start, v.x[0], v.y[0], v.x[1], v.y[1], v.region_end, v.im_end]
        generator = Watching(parts, {"record 0": script}, GenerationLimits(9, 1, crop_margin=margin))
        answer = generator.generate(prompts_of(parts, folder, [conversation("large.png")]), [folder])[0]
        assert answer.trace[0].box == box
        crop = folder.resize(Image.fromarray(pixels).crop(box))
        assert torch.equal(seen[-1].pixels, parts.processor.apply_transform(VISION_TOWER, crop).pixels)


def test_training_goes_on_after_answering(make_parts, folder):
    """Nothing that answering leaves behind keeps gradients from flowing; its trained tower sees through windows."""
    parts = make_parts("encoder=[dino]", *FAMILIES["qwen2_5_vl"])
    record = conversation("1.png", action_turns("detection"), detection_images=["1.png"])
    [sample] = samples_of(parts, folder, [record])
    Generator(parts.model.eval(), parts.processor, parts.tokenizer.decode, GenerationLimits(4)).generate(
        [sample], [folder]
    )
    assert not torch.is_inference_mode_enabled()
    parts.model.train()
    parts.model(collate([sample])).loss_sum.backward()
    assert all(p.grad is not None for p in parts.model.qwen.model.visual.blocks.parameters())
