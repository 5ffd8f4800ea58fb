"""What Qwen3-VL adds: DeepStack in every stage, timestamps, no system prompt, thinking, and its answers."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from conftest import (
    ALL,
    compose_config,
    compose_eval,
    conversation,
    logged,
    losses,
    mixed_records,
    qwen_inputs,
    samples_of,
    video,
    video_conversation,
)
from helpers.gradients import MODEST, assert_same, losses_and_gradients
from helpers.multiprocess import on_ranks
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.config.schema import GenerationConfig
from vpt.data.chat_template import THINK
from vpt.data.collate import collate
from vpt.data.records import Message
from vpt.distributed.process_group import World
from vpt.errors import ConfigError
from vpt.evaluation.predictions import read_predictions
from vpt.generation.decode_step import RowInput
from vpt.generation.generator import Generator
from vpt.generation.kv_cache import KVCache
from vpt.generation.row_state import GenerationLimits, RowState
from vpt.generation.running_batch import RunningBatch
from vpt.models.inner_forward import StagedKVCache
from vpt.perception.batch import RowBuilder
from vpt.perception.masking import Masking
from vpt.serving.rows import Prompt
from vpt.training.trainer import Trainer

TINY = ("model=tiny_3", *MODEST)
UNCHANGED = (*ALL, *TINY, "+encoder.clip.options.deep=unchanged")


@pytest.fixture(scope="module")
def parts(make_parts):
    return make_parts(*ALL, *TINY)


@pytest.fixture(scope="module")
def samples(parts, folder):
    """The tower again, a region, a region before an action, two actions after a video."""
    records = mixed_records()
    return samples_of(parts, folder, [*records[1:4], records[8]])


def masked(samples):
    return collate(samples, masked=[Masking(1, 1.0).spans(s.row) if i % 2 else () for i, s in enumerate(samples)])


@pytest.mark.parametrize("deep", ["unchanged", "conditioned"])
def test_shared_equals_full_with_deep_features_of_the_tower_encoded_again(make_parts, parts, samples, deep):
    other = make_parts(*ALL, *TINY, f"+encoder.clip.options.deep={deep}")
    batch = masked(samples)
    shared = losses_and_gradients(other, batch, "shared")
    assert_same(shared, losses_and_gradients(other, batch, "full"))
    without, _ = losses_and_gradients(parts, batch, "shared")  # the same weights
    assert (shared[0].nll - without.nll).abs().max() > 1e-3


def test_a_choice_for_deep_features_that_does_not_exist(make_parts):
    with pytest.raises((ConfigError, ValueError), match="all is not one of none, unchanged, conditioned"):
        make_parts(*ALL, *TINY, "+encoder.clip.options.deep=all")


@torch.no_grad()
def test_deep_features_left_out_of_a_stage_are_missed(make_parts, samples, monkeypatch):
    """They count far beyond rounding wherever a stage shows an image, a crop, or the tower's features again."""
    model, batch, made = make_parts(*UNCHANGED).model, collate(samples), []
    whole, fill = model(batch).nll, model.embed_inputs
    for stage in range(3):
        made.clear()

        def left_out(*given, stage=stage):
            made.append(fill(*given))
            return (made[-1][0], None) if len(made) == stage + 1 else made[-1]

        monkeypatch.setattr(model, "embed_inputs", left_out)
        assert (model(batch).nll - whole).abs().max() > 1e-3
        assert [deep is not None for _, deep in made] == [True, True, True]


@torch.no_grad()
def test_masked_positions_get_no_deep_features(parts, samples):
    batch, model = masked(samples), parts.model
    tokens, plan = model.project_features(model.encode_images(batch.images), batch), model.plan_forward(batch)
    states = torch.ones(100, model.language.config.hidden_size)
    found = [(stage, model.embed_inputs(batch.input_ids[stage.tokens], stage, tokens, states)) for stage in plan.stages]
    zeroed = [
        deep.features[:, [position in stage.zeroed.tolist() for position in deep.positions.tolist()]]
        for stage, (_, deep) in found
        if deep is not None
    ]
    assert sum(part.shape[1] for part in zeroed) > 0
    assert all(not part.any() for part in zeroed)
    assert sum(deep.features.abs().sum() for _, (_, deep) in found if deep is not None) > 0


def text_of(parts, sample) -> str:
    pads = {parts.model.vocabulary.image_pad, parts.model.vocabulary.video_pad}
    return parts.tokenizer.decode([i for i in sample.ids.tolist() if i not in pads])


@pytest.mark.parametrize(("frames", "fps"), [(7, 2.0), (5, 0.5), (1, 25.0)])
def test_a_video_is_written_as_transformers_writes_it(folder, parts, frames, fps):
    """The time of each step in front of it, and positions as of separate images."""
    [sample] = samples_of(parts, folder, [video_conversation(video(frames, fps))])
    clip = folder.video(sample.record.images["image"][0], where="")
    numbers = [round(time * fps) for time in clip.times]
    times = Qwen3VLProcessor._calculate_timestamps(None, numbers, fps, 2)
    steps = "".join(f"<{time:.1f} seconds><|vision_start|><|vision_end|>" for time in times)
    assert f"<|im_start|>user\n{steps}\nwhat is" in text_of(parts, sample)
    want, _ = parts.model.qwen.model.get_rope_index(**qwen_inputs(parts, sample))
    assert torch.equal(sample.positions, want[:, 0])


def test_there_is_no_system_prompt_but_ones_own(folder, parts):
    [plain] = samples_of(parts, folder, [conversation("0.png")])
    assert text_of(parts, plain).startswith("<|im_start|>user\n")
    assert plain.row.paragraphs[0] == (0, 0)  # masking counts paragraphs as it does for models that have one
    own = conversation("0.png")
    own["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert text_of(parts, samples_of(parts, folder, [own])[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_a_model_that_thinks_opens_its_turns_with_a_thought(make_parts, folder):
    parts = make_parts("encoder=[dino]", *TINY, "model.thinking=true")
    template = parts.processor.chat_template
    [plain] = samples_of(parts, folder, [conversation("0.png", answer="yes")])
    assert text_of(parts, plain).endswith("assistant\n<think>\n\n</think>\n\nyes<|im_end|>")
    labels = parts.tokenizer.decode(plain.labels[plain.labels >= 0].tolist())
    assert labels == "\n</think>\n\nyes<|im_end|>"
    thought = RowBuilder()
    template.encode(thought, (Message("assistant", "<think>\nred, so\n</think>\n\nyes"),), {})
    assert parts.tokenizer.decode(thought.ids) == "<|im_start|>assistant\n<think>\nred, so\n</think>\n\nyes<|im_end|>"
    generator = Generator.from_config(
        parts.model, parts.processor, parts.tokenizer, GenerationConfig(action="dino", max_new_tokens=40)
    )
    prompt = parts.processor.encode_prompt(plain.record, folder)
    assert parts.tokenizer.decode(prompt.ids.tolist()).endswith(f"assistant\n{THINK[0]}\n")
    [answer] = generator.generate([prompt], [folder])
    assert answer.trace[0].kind == "dino"
    assert answer.ids[: len(template.no_thought())] == template.no_thought()
    assert generator.decode(parts.tokenizer.encode("so\n</think>\n\nno")).strip() == "no"


@torch.no_grad()
def test_answers_equal_those_of_transformers(make_parts, folder):
    parts = make_parts("encoder=[]", *TINY)
    model = parts.model.eval()
    plain = type(model.qwen)(deepcopy(model.qwen.config)).eval()
    plain.load_state_dict(model.qwen.state_dict())
    plain.set_attn_implementation("eager")
    records = [conversation("1.png"), conversation("3.png"), video_conversation(video())]
    prompts = [parts.processor.encode_prompt(sample.record, folder) for sample in samples_of(parts, folder, records)]
    generator = Generator(model, parts.processor, parts.tokenizer.decode, GenerationLimits(12))
    for prompt, answer in zip(prompts, generator.generate(prompts, [folder] * len(prompts)), strict=True):
        images = [image.pixels for _, image in prompt.images["image"]]
        inputs = qwen_inputs(parts, prompt)
        name = "pixel_values_videos" if "video_grid_thw" in inputs else "pixel_values"
        ids = plain.generate(
            **inputs, **{name: torch.cat(images)}, max_new_tokens=12, do_sample=False, pad_token_id=0,
            eos_token_id=[model.vocabulary.im_end, model.vocabulary.end_of_text],
        )  # fmt: skip
        assert answer.ids == ids[0, len(prompt.ids) :].tolist()


def test_a_model_needs_more_layers_than_deep_features(make_parts):
    with pytest.raises(ConfigError, match="as many entries as the model has layers"):
        make_parts(*TINY, "model.config.text_config.num_hidden_layers=2")


@torch.no_grad()
def test_a_prompt_read_in_parts_keeps_its_deep_features(folder, parts):
    """Parts end in the midst of images, beside a row that decodes without any."""
    watched = video_conversation(video(5))
    watched["messages"][0]["content"] = "<video><image>\nis it there?"
    [sample] = samples_of(parts, folder, [{**watched, "images": ["2.png"]}])
    model, processor = parts.model.eval(), parts.processor
    prompt = processor.encode_prompt(sample.record, folder)
    batch = collate([prompt])
    features = model.encode_images(batch.images)["image"]
    want = model.run_stages(batch, model.plan_forward(batch), model.project_features({"image": features}, batch),
                            StagedKVCache())[0][-1]  # fmt: skip
    language = model.language.config
    cache = KVCache.empty(language.num_hidden_layers, language.num_key_value_heads, language.head_dim, like=want)
    running = RunningBatch(model, processor.position_scheme, [], cache)
    running.join([RowState(prompt, folder, np.random.default_rng(0), 0) for _ in range(2)])
    read = Prompt(prompt, [*features.split([image.tokens for _, image in prompt.images["image"]])])
    for part in read.inputs(model, 7):
        running.rows[0].next_input, running.rows[1].next_input = part, RowInput([7])
        state = running.step()[0][-1]
    torch.testing.assert_close(state, want, rtol=1e-4, atol=1e-5)


def trained_losses(world, folder, *overrides):
    """Losses and gradient norms of two steps with every kind of perception."""
    config = compose_config("+experiment=all", "+debug=two_steps", *TINY, "tracking=none", *overrides)
    Trainer(config, folder, world).fit()
    return [[line["train/loss"], line["train/grad_norm"]] for line in logged(folder, "train/loss")]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("trained", [(), ("model.lora.rank=4",)], ids=["full", "lora"])
def test_two_processes_train_as_one(tmp_path, strategy, trained):
    alone = trained_losses(World(), tmp_path / "alone", *trained)
    shared = on_ranks(2, trained_losses, tmp_path / strategy, f"strategy={strategy}", *trained, folder=tmp_path)
    for found, want in zip(shared[0], alone, strict=True):
        assert found == pytest.approx(want, rel=1e-3)


@pytest.mark.slow
def test_every_encoder_of_today_in_one_model_trains_goes_on_and_answers(tmp_path):
    names = ["dino3", "dino_registers", "sam2", "siglip2", "clip"]
    kinds = ",".join(f"{name}:1" for name in ("none", "region", *names))
    overrides = (*TINY, "+debug=two_steps", "tracking=none", "training.steps=4", "training.batch_size=16",
                 f"encoder=[{','.join(names)}]", f"data.actions={{{kinds}}}")  # fmt: skip
    whole = Trainer(compose_config(*overrides), tmp_path / "whole")
    whole.fit()
    dropped = Trainer(compose_config(*overrides), tmp_path / "dropped")
    step = dropped.train_step
    dropped.train_step = lambda batches, number: step(batches, number) if number < 2 else {}["dropped"]
    with pytest.raises(KeyError, match="dropped"):
        dropped.fit()
    again = Trainer(compose_config(*overrides), tmp_path / "dropped")
    again.fit()
    assert losses(whole.folder) == losses(again.folder) and len(losses(whole.folder)) == 4
    for name in names:
        evaluate_checkpoint(compose_eval(
            f"checkpoint={whole.folder}", f"name={name}", f"generation.action={name}", "data.limit=2", "pictures=false"
        ))  # fmt: skip
        items = read_predictions(whole.folder / "eval" / name / "predictions.jsonl")
        assert [item.actions[0] for item in items] == [name] * 2
