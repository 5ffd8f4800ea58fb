"""The key/value cache of rows of different lengths."""

import torch

from vpt.generation.kv_cache import KVCache


def test_values_that_autocast_made_are_kept_as_the_cache_is():
    """bfloat16 beside float32 keys, as matrices that are stored in bfloat16 make them; rows of one length and others."""
    torch.manual_seed(0)
    for counts in ([2, 2], [1, 3]):
        cache = KVCache.empty(1, 2, 4, like=torch.zeros(1))
        cache.add_rows(2)
        cache.reserve(counts)
        key, value = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4).bfloat16()
        keys, values = cache.update(key, value, 0)
        assert keys.dtype == values.dtype == torch.float32
        for row, (own_key, own_value) in enumerate(
            zip(key[0].split(counts, 1), value[0].split(counts, 1), strict=True)
        ):
            assert torch.equal(keys[row, :, : counts[row]], own_key)
            assert torch.equal(values[row, :, : counts[row]], own_value.float())
