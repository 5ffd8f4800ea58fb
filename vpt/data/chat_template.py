"""Qwen's chat format with perception: from a record to token ids, labels and structure.

Which tokens carry loss follows from the template, not from scanning ids: an assistant's content and its `<|im_end|>`,
control tokens excepted. Text is encoded by a tokenizer that knows no special token, so whatever a user types (even
`<|detection_action|>`) stays text and cannot act.
"""

import json
import re
from collections.abc import Mapping
from typing import Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vpt.data.records import PLACEHOLDER, SYSTEM_PROMPT, VIDEO, Message
from vpt.data.transforms import TokenRun
from vpt.errors import DataError
from vpt.perception.batch import IGNORE_INDEX, VISION_TOWER, Action, RowBuilder
from vpt.perception.regions import in_numbers
from vpt.perception.tokens import REGION_END, REGION_START, PerceptionVocabulary, action_tokens

# What asks for perception in any model; a vocabulary that lacks one would learn its letters
_PERCEPTION_TOKEN = re.compile(r"<\|(?:[xy]_\d+|region_token_(?:start|end)|[a-z0-9]+_action(?:_start|_end)?)\|>")
THINK = ("<think>", "</think>")
# What to do with a row that is longer than the limit
Overflow = Literal["raise", "truncate"]


class NoSpecialTokens:
    """The tokenizer's byte-pair encoding without any of its added tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description["added_tokens"] = []
        self._tokenizer = Tokenizer.from_str(json.dumps(description))
        self._recent: dict[str, list[int]] = {}  # templates and questions repeat themselves

    def __call__(self, text: str) -> list[int]:
        if len(text) > 1000:
            return self._encode(text)
        ids = self._recent.get(text)  # another thread may clear it at any time
        if ids is None:
            if len(self._recent) > 10_000:
                self._recent.clear()
            ids = self._recent[text] = self._encode(text)
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class ChatTemplate:
    """Writes conversations as token ids. `control_kinds`: control token -> the re-encoder that it asks for."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: PerceptionVocabulary, encoder_tokens: Mapping[str, str],
        *, projector_scale: int, system_prompt: str | None = SYSTEM_PROMPT, thinking: bool = False,
    ) -> None:  # fmt: skip
        """Args:
        tokenizer, vocabulary, encoder_tokens: of the model.
        projector_scale: control tokens of an action.
        system_prompt: of conversations without one of their own; None: they begin with the user.
        thinking: an assistant's turns open with `<think>`, what comes before `</think>` is no answer.
        """
        self.vocabulary, self.scale = vocabulary, projector_scale
        self.system_prompt, self.thinking = system_prompt, thinking
        self._marks = {text: tokenizer.get_vocab().get(text) for text in THINK} if thinking else {}
        self.plain = NoSpecialTokens(tokenizer)
        self.encoder_tokens = dict(encoder_tokens)
        self._source = {token: name for name, token in encoder_tokens.items()} | {"": VISION_TOWER}
        self._pads = {name: action.pad for name, action in vocabulary.actions.items()} | {
            VISION_TOWER: vocabulary.image_pad
        }
        self.control_kinds = {action.control: name for name, action in vocabulary.actions.items()}
        self._acting = self._action_tokens(tokenizer)
        self._action_pattern = re.compile("|".join(re.escape(token) for token in self._acting) or r"(?!)")

    def _action_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """Token text -> id of everything by which an assistant may request perception."""
        texts = [text for token in self.encoder_tokens.values() for text in action_tokens(token)]
        if self.vocabulary.region_start is not None:
            texts += [REGION_START, REGION_END]
            texts += [f"<|{axis}_{i}|>" for axis in "xy" for i in range(len(self.vocabulary.x))]
        ids: list[int] = tokenizer.convert_tokens_to_ids(texts)
        return dict(zip(texts, ids, strict=True))

    def encode(
        self, conversation: RowBuilder, messages: tuple[Message, ...], runs: Mapping[str, list[list[TokenRun]]]
    ) -> None:
        """Append whole turns to `conversation`.

        Args:
            messages: the turns.
            runs: source -> how each of its images is written (`ProcessedImage.runs`), in order of the conversation.
        """
        for message in messages:
            if message.role == "system" and not message.content:
                if self.system_prompt is None:
                    conversation.begin_paragraph()  # an empty one: 0 is the system prompt, which this model lacks
                    continue
                message = Message("system", self.system_prompt)
            if conversation.ids:
                conversation.add(self.plain("\n"))
            self.begin_turn(conversation, message.role)
            if message.role == "assistant":
                self._assistant(conversation, message.content)
            else:
                self._user(conversation, message, runs)
            self.end_turn(conversation, loss=message.role == "assistant")

    def begin_turn(self, conversation: RowBuilder, role: str) -> None:
        """`<|im_start|>`, and for an assistant the role; a user's role is encoded with what follows it."""
        conversation.add([self.vocabulary.im_start])
        conversation.begin_paragraph()
        if role == "assistant":
            conversation.add(self.plain("assistant\n"))
            if self.thinking:
                conversation.add([*self._mark(THINK[0]), *self.plain("\n")])

    def end_turn(self, conversation: RowBuilder, *, loss: bool) -> None:
        """`<|im_end|>`."""
        conversation.end_paragraph()
        conversation.add([self.vocabulary.im_end], loss=loss)

    def add_generation_prompt(self, conversation: RowBuilder) -> None:
        """Everything up to where the assistant answers."""
        conversation.add(self.plain("\n"))
        self.begin_turn(conversation, "assistant")

    def no_thought(self) -> list[int]:
        """What an assistant says who does not think before it acts; nothing where it never does."""
        return [*self.plain("\n"), *self._mark(THINK[1]), *self.plain("\n\n")] if self.thinking else []

    def _mark(self, text: str) -> list[int]:
        """A mark around thoughts, a token of its own in the vocabulary of models that think."""
        token = self._marks[text]
        return self.plain(text) if token is None else [token]

    def _user(self, conversation: RowBuilder, message: Message, runs: Mapping[str, list[list[TokenRun]]]) -> None:
        """A system or user turn: text, images and videos."""
        text, cursor = f"{message.role}\n", 0
        for match in PLACEHOLDER.finditer(message.content) if message.role == "user" else ():
            source = self._source.get(match[1] or "")
            if source is None:
                continue  # not a placeholder of this model: text, checked by the record's parser
            text, cursor = text + message.content[cursor : match.start()], match.end()
            pad = self.vocabulary.video_pad if match[0] == VIDEO else self._pads[source]
            offset = 0
            for caption, tokens in runs[source][conversation.images_of(source)]:
                conversation.add(self.plain(text + caption))
                conversation.add([self.vocabulary.vision_start])
                conversation.image(source, tokens, pad=pad, offset=offset)
                conversation.add([self.vocabulary.vision_end])
                text, offset = "", offset + tokens
        conversation.add(self.plain(text + message.content[cursor:]))

    def placeholder(self, source: str) -> str:
        """How a message spells an image of `source`."""
        return "<image>" if source == VISION_TOWER else f"<{self.encoder_tokens[source]}_image>"

    def unknown_tokens(self, content: str) -> list[str]:
        """Perception tokens in an assistant's message that this model's vocabulary lacks."""
        content = in_numbers(content) if self.vocabulary.text_bins else content
        return [token for token in _PERCEPTION_TOKEN.findall(content) if token not in self._acting]

    def _assistant(self, conversation: RowBuilder, content: str) -> None:
        """An assistant turn: text and perception tokens."""
        cursor = 0
        if self.vocabulary.text_bins:
            content = in_numbers(content)
        if self.thinking:
            thought, _, content = content.rpartition(THINK[1])
            thought = thought.rpartition(THINK[0])[2].strip("\n")
            conversation.add([*self.plain(f"{thought}\n"), *self._mark(THINK[1])], loss=True)
            content = "\n\n" + content.lstrip("\n")
        for match in self._action_pattern.finditer(content):
            conversation.add(self.plain(content[cursor : match.start()]), loss=True)
            cursor = match.end()
            token = self._acting[match[0]]
            if token in self.control_kinds:
                conversation.action(self.control_kinds[token], self.scale, token=token)
            else:
                conversation.add([token], loss=True)
        conversation.add(self.plain(content[cursor:]), loss=True)


def truncate(conversation: RowBuilder, limit: int, *, where: str, overflow: Overflow) -> None:
    """Keep a row within `limit` tokens: refuse it, or cut its end off, never inside a run of image tokens."""
    if len(conversation.ids) <= limit:
        return
    advice = f"{where}: the row has {len(conversation.ids)} tokens, data.max_length is {limit}"
    if overflow == "raise":
        raise DataError(f"{advice}; raise data.max_length, lower data.image.max_side, or set data.overflow=truncate")
    for block in conversation.blocks:  # the marker before the run goes with it
        if block.start - 1 < limit < block.start + block.length + 1:
            limit = block.start - 1
    for action in conversation.actions:
        if action.start <= limit < action.start + action.count + 1:
            limit = action.start
    del conversation.ids[limit:], conversation.labels[limit:]
    conversation.blocks = [block for block in conversation.blocks if block.start < limit]
    conversation.actions = [
        Action(
            a.start, a.count, a.encoder, a.block if a.block is not None and a.block < len(conversation.blocks) else None
        )
        for a in conversation.actions
        if a.start < limit
    ]
    conversation.paragraphs = [(start, min(stop, limit)) for start, stop in conversation.paragraphs if start < limit]
    if not any(label != IGNORE_INDEX for label in conversation.labels[1:]):
        raise DataError(f"{advice}, and nothing with a label is left after the cut; raise data.max_length")
