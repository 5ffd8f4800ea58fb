"""Ask a trained model one question about one image, and see how it perceives.

    vpt ask IMAGE QUESTION checkpoint=RUN [out=PNG] [KEY=VALUE ...]

    vpt ask cat.png "What colour is the cat?" checkpoint=outputs/dino out=answer.png
    vpt ask cat.png "What colour is the cat?" checkpoint=outputs/all action=region generation.crop_margin=1

Prints what the model says while it says it, what each request for perception showed it, and the answer; `out` is a
picture of the image, the region and its crop, and what the control state looked for.

    checkpoint               a run (outputs/dino: its last checkpoint), one of its checkpoints, an exported folder, or
                             a checkpoint that the authors published
    out                      the picture to write; none by default
    action                   free; none; region or a re-encoder's name: what the answer begins with
    device                   auto, cpu or cuda
    data.max_length          tokens that image and question may have
    data.action_prompt       whether the sentence that asked for perception in training follows the question
    generation.              max_new_tokens, max_actions, crop_margin, temperature (0: greedy), top_k, top_p, seed,
                             stop (a list of tokens)
    model.path               where the base model is now, if the checkpoint names it and it was moved since
    encoder.NAME.path        where a re-encoder's weights are now, likewise

What is not given is as the model was trained.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

from vpt.checkpoint.load import load_any_config, load_pretrained
from vpt.config.ask import AskConfig
from vpt.config.overrides import check_overrides
from vpt.config.resolve import resolve_config
from vpt.config.validate import generation_settings
from vpt.config.weight_folder import moved_paths
from vpt.data.references import check_no_address
from vpt.errors import ConfigError
from vpt.generation.pipeline import action_prompt_text, build_question, check_output_path, reply
from vpt.generation.streaming import AnswerStreamer
from vpt.utils.threads import set_threads

Schema = TypeVar("Schema")
SETTING = re.compile(r"^[\w.]+=")


def main(arguments: Sequence[str]) -> None:
    """`vpt ask`."""
    image, question, config = read_arguments(arguments)
    paths = moved_paths(config.model, config.encoder)
    trained = load_any_config(config.checkpoint, paths)
    generation = generation_settings(trained, config.generation)
    check_no_address(image, "IMAGE")
    sentence = action_prompt_text(trained, generation, action_prompt=config.data.action_prompt)
    asked = build_question(trained, Path(image), question, sentence)  # all that can be wrong comes before the weights
    if config.out:
        check_output_path(Path(config.out))
    set_threads(None)
    bundle = load_pretrained(config.checkpoint, device=config.device, paths=paths)
    bundle.processor.max_length = config.data.max_length or bundle.processor.max_length
    streamer = AnswerStreamer(bundle.tokenizer)
    answered = reply(bundle, asked, generation, on_step=streamer)
    streamer.end(answered.answer)
    if config.out:
        print(f"wrote {answered.draw(config.out)}")


def read_arguments(arguments: Sequence[str]) -> tuple[str, str, AskConfig]:
    """Parse image, question (the two arguments that are no KEY=VALUE) and settings.

    Raises ConfigError for a key that does not exist, with the nearest one; for too few arguments, or too many.
    """
    config, texts = compose_settings(arguments, AskConfig)
    if len(texts) != 2:
        raise ConfigError(
            f"{len(texts)} of IMAGE and QUESTION given ({', '.join(map(repr, texts))}); type: vpt ask "
            'IMAGE "QUESTION" checkpoint=RUN, the question in quotes'
        )
    if config.action is not None:
        other = config.generation.get("action")
        if other not in (None, config.action):
            raise ConfigError(f"action={config.action} but generation.action={other}; give one")
        config = replace(config, generation=config.generation | {"action": config.action})
    return texts[0], texts[1], config


def compose_settings(arguments: Sequence[str], schema: type[Schema]) -> tuple[Schema, list[str]]:
    """Settings of a program without a file of defaults, and the arguments that are no KEY=VALUE.

    Raises ConfigError for a key that does not exist, with the nearest one, and for values out of range.
    """
    settings = [argument for argument in arguments if SETTING.match(argument)]
    check_overrides(settings, schema)
    composed = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(schema)))
    composed.merge_with(OmegaConf.from_dotlist(settings))
    assert isinstance(composed, DictConfig)
    return resolve_config(composed, schema), [argument for argument in arguments if argument not in settings]
