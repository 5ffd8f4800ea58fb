"""The perception vocabulary: which tokens ask for perception, and how a tokenizer learns them.

Table of tokens for a model with the re-encoder called `P` and a region grid of k x k cells:

    <|P_image_pad|>                                           placeholder of one re-encoded token
    <|region_token_start|> <|region_token_end|> <|x_0|>..<|x_{k-1}|> <|y_0|>..<|y_{k-1}|>
    <|P_action_start|> <|P_action|> <|P_action_end|>          the middle one is the control token

They are added in this order, as in upstream's models (whose alignment stage knows the placeholder alone), so that
ids agree with theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import AddedToken, PreTrainedTokenizerBase

from vpt.errors import ConfigError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
CHAT_TOKENS = ("<|endoftext|>", IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
REGION_START, REGION_END = "<|region_token_start|>", "<|region_token_end|>"


@dataclass(frozen=True)
class ActionIds:
    """Ids of one re-encoding action: `start` asks for it, `control` carries its state, `pad` holds what is seen."""

    start: int
    control: int
    end: int
    pad: int


@dataclass(frozen=True)
class PerceptionVocabulary:
    """Every token that matters to perception, by name and by id.

    `actions` is keyed by the re-encoder's name in the configuration (`dino`), its tokens are spelt with the
    re-encoder's `token` (`detection`). `text_bins` is the grid of a model that names regions as text, without tokens
    of their own.
    """

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    end_of_text: int
    region_start: int | None = None
    region_end: int | None = None
    x: tuple[int, ...] = ()
    y: tuple[int, ...] = ()
    actions: dict[str, ActionIds] = field(default_factory=dict)
    text_bins: int = 0

    @property
    def bins(self) -> int:
        """Cells along a side of the grid that regions are named in; 0 for a model without regions."""
        return self.text_bins or len(self.x)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, encoder_tokens: dict[str, str], *, region_bins: int, text_bins: int = 0
    ) -> "PerceptionVocabulary":
        """Read the ids of a tokenizer that `grow_tokenizer` has seen. Raises ValueError for a token it lacks."""
        known = tokenizer.get_vocab()

        def find(token: str) -> int:
            if token not in known:
                raise ValueError(
                    f"the tokenizer has no token {token!r}: was it grown by vpt.perception.tokens.grow_tokenizer?"
                )
            return known[token]

        return cls(
            im_start=find(IM_START),
            im_end=find(IM_END),
            vision_start=find(VISION_START),
            vision_end=find(VISION_END),
            image_pad=find(IMAGE_PAD),
            video_pad=find(VIDEO_PAD),
            end_of_text=find("<|endoftext|>"),
            region_start=find(REGION_START) if region_bins else None,
            region_end=find(REGION_END) if region_bins else None,
            x=tuple(find(f"<|x_{i}|>") for i in range(region_bins)),
            y=tuple(find(f"<|y_{i}|>") for i in range(region_bins)),
            actions={
                name: ActionIds(*(find(text) for text in (*action_tokens(token), pad_token(token))))
                for name, token in encoder_tokens.items()
            },
            text_bins=text_bins,
        )

    def upstream_ids(self, encoder_tokens: Mapping[str, str]) -> dict[str, int]:
        """The `*_image_token_id`, `*_action_id` and `*_action_start_id` of upstream's configurations."""
        return {
            f"{token}_{key}": value
            for name, token in encoder_tokens.items()
            for key, value in (
                ("image_token_id", self.actions[name].pad),
                ("action_id", self.actions[name].control),
                ("action_start_id", self.actions[name].start),
            )
        }

    def perception_ids(self) -> dict[int, str]:
        """Id -> readable name of every token that a model says to perceive; control tokens are forced, not said."""
        names: dict[int, str] = {}
        if self.region_start is not None and self.region_end is not None:
            names |= {self.region_start: "region_start", self.region_end: "region_end"}
        names |= {token: f"x_{i}" for i, token in enumerate(self.x)} | {
            token: f"y_{i}" for i, token in enumerate(self.y)
        }
        for name, action in self.actions.items():
            names |= {action.start: f"{name}_start", action.end: f"{name}_end"}
        return names


def action_tokens(token: str) -> tuple[str, str, str]:
    """The three tokens of the re-encoding action spelt with `token`: start, control, end."""
    return f"<|{token}_action_start|>", f"<|{token}_action|>", f"<|{token}_action_end|>"


def pad_token(token: str) -> str:
    """The placeholder of one re-encoded token."""
    return f"<|{token}_image_pad|>"


def region_tokens(region_bins: int) -> list[str]:
    """The region vocabulary for a grid of `region_bins` x `region_bins` cells, in upstream's order."""
    if not region_bins:
        return []
    axes = [f"<|{axis}_{i}|>" for axis in "xy" for i in range(region_bins)]
    return [REGION_START, REGION_END, *axes]


def add_perception_tokens(tokenizer: PreTrainedTokenizerBase, encoder_tokens: list[str], *, region_bins: int) -> int:
    """Teach `tokenizer` the perception vocabulary in place; return how many tokens were new (0 the second time)."""
    acting = region_tokens(region_bins) + [text for token in encoder_tokens for text in action_tokens(token)]
    added = tokenizer.add_tokens([pad_token(token) for token in encoder_tokens], special_tokens=True)
    # Found before Qwen's NFC normalisation, which would merge their last character with an accent that follows.
    return added + tokenizer.add_tokens([AddedToken(text, normalized=False) for text in acting])


def stop_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """The token of each of `generation.stop`. Raises ConfigError where a text is not one token."""
    ids = []
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            parts = ", ".join(repr(tokenizer.decode([token])) for token in tokens)
            raise ConfigError(f"generation.stop: {text!r} is {len(tokens)} tokens ({parts}), a stop is one token")
        ids.append(tokens[0])
    return tuple(ids)
