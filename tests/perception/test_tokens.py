"""The perception vocabulary, and growing Qwen's tokenizer and table."""

import pytest
import torch

from conftest import ALL
from vpt.checkpoint.pretrained import _extend_vocab
from vpt.models.qwen import resize_token_embeddings
from vpt.perception.tokens import action_tokens, add_perception_tokens, pad_token, region_tokens


def test_growing_twice_changes_nothing(make_parts):
    parts = make_parts(*ALL)
    before = parts.tokenizer.get_vocab()
    assert add_perception_tokens(parts.tokenizer, ["detection", "seg", "clip"], region_bins=8) == 0
    assert parts.tokenizer.get_vocab() == before


def test_one_encoder_adds_the_22_published_tokens(make_parts):
    from vpt.models.tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    assert add_perception_tokens(tokenizer, ["detection"], region_bins=8) == 22
    order = [pad_token("detection"), *region_tokens(8), *action_tokens("detection")]
    assert tokenizer.convert_tokens_to_ids(order) == list(range(size, size + 22))


def test_new_ids_go_into_spare_rows(make_parts):
    """Qwen's table has spare rows; nothing is resized while they last."""
    parts = make_parts(*ALL)
    rows = parts.model.language.embed_tokens.weight.shape[0]
    assert rows == 576 > len(parts.tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_short_table_grows_and_never_shrinks(make_parts, tied):
    parts = make_parts("encoder=[]", f"model.config.tie_word_embeddings={str(tied).lower()}")
    qwen = parts.model.qwen
    before = qwen.get_input_embeddings().weight.detach().clone()
    resize_token_embeddings(qwen, 600)
    table = qwen.get_input_embeddings().weight
    assert table.shape[0] == 640 and qwen.get_output_embeddings().weight.shape[0] == 640
    assert torch.equal(table[:576], before)
    torch.testing.assert_close(_extend_vocab(before, 640)[600], before.mean(dim=0))  # what loading a base puts there
    assert (qwen.get_output_embeddings().weight is table) == tied
    resize_token_embeddings(qwen, 10)
    assert qwen.get_input_embeddings().weight.shape[0] == 640
    assert qwen.config.text_config.vocab_size == 640
