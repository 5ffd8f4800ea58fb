"""Attention of segments: the variable-length kernel's plan and the padded one say the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import ALL, samples_of
from helpers.gradients import MODEST, assert_same, losses_and_gradients
from vpt.data.collate import collate
from vpt.models import varlen_attention
from vpt.models.attention import AttentionLayout, bucket_by_size, segment_attention
from vpt.perception.masking import Masking


def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch documents of its kernel, run by run, in plain sums; heads are repeated where `enable_gqa`."""
    assert window_size in ((-1, 0), (-1, -1))
    outs = []
    for number in range(len(cu_q) - 1):
        q, k, v = query[cu_q[number] : cu_q[number + 1]], key[cu_k[number] : cu_k[number + 1]], value[cu_k[number] :]
        v = v[: len(k)]
        assert len(q) <= max_q and len(k) <= max_k
        assert enable_gqa or q.shape[1] == k.shape[1]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if window_size == (-1, 0):  # bottom right: the last query sees the last key
            ahead = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
            scores = scores.masked_fill(ahead, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outs)


@pytest.fixture
def kernel(monkeypatch):
    """The variable-length path, on a CPU."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen_attention, "is_supported", lambda values: True)
    monkeypatch.setattr(varlen_attention, "_OPTIONS", {"window_size", "enable_gqa"})


@pytest.mark.parametrize("mask", ["off", "zero", "bottleneck"])
def test_the_kernel_is_told_what_the_mask_says(make_parts, folder, monkeypatch, mask, request):
    """Loss and gradients of a batch that mixes everything, through either plan."""
    parts = make_parts(*ALL, "model.projector_scale=2", *MODEST)
    samples = samples_of(parts, folder)
    masked = [Masking(1, 1.0).spans(s.row) if mask != "off" and i % 2 == 0 else () for i, s in enumerate(samples)]
    batch, mode = collate(samples, masked=masked), "bottleneck" if mask == "bottleneck" else "zero"
    padded = losses_and_gradients(parts, batch, "shared", mask_mode=mode)
    request.getfixturevalue("kernel")
    packed = losses_and_gradients(parts, batch, "shared", mask_mode=mode)
    assert_same(packed, padded)


@pytest.mark.parametrize("options", [{"window_size"}, {"window_size", "enable_gqa"}])
def test_heads_that_share_keys(kernel, monkeypatch, options):
    """A kernel that does not know of shared key heads gets them repeated."""
    monkeypatch.setattr(varlen_attention, "_OPTIONS", options)
    if "enable_gqa" not in options:
        monkeypatch.setattr(
            varlen_attention, "varlen_attn", lambda *given, **named: varlen_attn(*given, **named, enable_gqa=False)
        )
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    layout = AttentionLayout([2, 3], [np.array([0, 1, 5, 6]), np.array([2, 3, 4, 7, 8])], device="cpu")
    got, _ = segment_attention(None, query, key, value, None, layout=layout, scaling=0.3)
    monkeypatch.setattr(varlen_attention, "is_supported", lambda values: False)
    want, _ = segment_attention(None, query, key, value, None, layout=layout, scaling=0.3)
    torch.testing.assert_close(got, want)


def test_no_kernel_on_a_cpu():
    assert not varlen_attention.is_supported(torch.zeros(1, dtype=torch.bfloat16))


def test_what_later_queries_do_not_see_is_padded(kernel):
    """The reference for masking has a mask that the kernel cannot say."""
    layout = AttentionLayout([3], [np.arange(3)], device="cpu", hidden=[(1, 0, 1)])
    assert layout.varlen_index is None
    assert layout.groups[0].mask.tolist() == [[[[True, False, False], [False, True, False], [False, True, True]]]]


@pytest.mark.parametrize("seed", range(5))
def test_segments_of_a_size_share_a_call(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 900, 40).tolist()
    counts = [length + past for length, past in zip(lengths, generator.integers(0, 500, 40).tolist())]
    groups = bucket_by_size(lengths, counts)
    assert sorted(number for group in groups for number in group) == list(range(40))
    exact = sum(length * count for length, count in zip(lengths, counts))
    padded = sum(len(g) * max(lengths[i] for i in g) * max(counts[i] for i in g) for g in groups)
    assert padded <= 1.2 * exact + len(groups) * 2**14
    assert bucket_by_size([7] * 64, [7] * 64) == [list(range(64))]


def test_one_query_for_each_row(monkeypatch):
    """Decoding: query heads of a key head go in as queries, and no key is copied."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 4, 8), torch.randn(4, 2, 9, 8), torch.randn(4, 2, 9, 8)
    counts = [9, 4, 1, 6]
    layout = AttentionLayout([1] * 4, counts, device="cpu")
    got, _ = segment_attention(None, query, key, value, None, layout=layout, scaling=0.3)
    for row, count in enumerate(counts):
        k, v = (x[row, :, :count].repeat_interleave(3, dim=0) for x in (key, value))
        want = F.scaled_dot_product_attention(query[0, :, row : row + 1], k, v, scale=0.3)
        torch.testing.assert_close(got[0, row], want[:, 0])


def test_a_row_that_perceives_beside_rows_that_speak():
    """By row, with queries of very different lengths: groups take their own rows of the cache."""
    torch.manual_seed(0)
    lengths, counts = [1, 300, 1], [400, 390, 350]
    query, key, value = torch.randn(1, 4, 302, 8), torch.randn(3, 2, 400, 8), torch.randn(3, 2, 400, 8)
    layout = AttentionLayout(lengths, counts, device="cpu")
    assert [group.shape for group in layout.groups] == [(2, 1, 400), (1, 300, 390)]
    got, _ = segment_attention(None, query, key, value, None, layout=layout, scaling=0.3)
    start = 0
    for row, (length, count) in enumerate(zip(lengths, counts)):
        k, v = (x[row, :, :count].repeat_interleave(2, dim=0) for x in (key, value))
        mask = torch.arange(count) <= torch.arange(length)[:, None] + count - length
        want = F.scaled_dot_product_attention(query[0, :, start : start + length], k, v, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(got[0, start : start + length], want.transpose(0, 1))
        start += length


def test_a_bottleneck_takes_two_stages(make_parts, folder):
    """The control token, the last to see what is hidden, runs beside what follows it."""
    parts = make_parts(*ALL)
    samples = samples_of(parts, folder)[6:8]  # one action each
    model = parts.model
    for mode, tokens in (("bottleneck", 1), ("zero", 2)):
        model.forward_config = replace(model.forward_config, mask_mode=mode, inner_forward="shared")
        batch = collate(samples, masked=[Masking(1, 1.0).spans(sample.row) for sample in samples])
        stages = model.plan_forward(batch).stages
        assert len(stages) == 2
        assert (sum(len(stage.tokens) for stage in stages) == len(batch.input_ids)) == (tokens == 1)
