"""The cache of processed images: what it drops, and that threads and copies do it no harm."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import torch

from vpt.data.image_cache import ImageCache
from vpt.data.transforms import ProcessedImage


def image(kilobytes):
    return ProcessedImage(torch.zeros(kilobytes << 10, dtype=torch.uint8), 1)


def bytes_in(cache):
    return sum(one.nbytes for one in cache._entries.values())


def test_the_least_recently_used_goes():
    cache = ImageCache(1)
    for name in "ab":
        cache.put("tower", ("", name), image(400))
    assert cache.get("tower", ("", "a"))
    cache.put("tower", ("", "c"), image(400))
    assert [name for name in "abc" if cache.get("tower", ("", name))] == ["a", "c"]
    assert cache.held == bytes_in(cache) == 800 << 10
    cache.put("tower", ("", "d"), image(2000))
    assert cache.get("tower", ("", "d")) is None and cache.held == 800 << 10


def test_threads_may_share_it():
    """Whatever they do at once, what it counts is what it holds."""
    cache = ImageCache(1)

    def use(thread):
        for turn in range(3000):
            key = ("", str((turn * 7 + thread) % 5))
            if cache.get("tower", key) is None or turn % 2:
                cache.put("tower", key, image(200 + turn % 3 * 100))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert cache.held == bytes_in(cache) <= cache.limit


def test_copies_of_it_begin_empty():
    """A data worker or a copied processor takes its size alone."""
    cache = ImageCache(3)
    cache.put("tower", ("", "a"), image(1))
    for copy in (pickle.loads(pickle.dumps(cache)), deepcopy(cache)):
        assert (copy.limit, copy.held, copy.get("tower", ("", "a"))) == (3 << 20, 0, None)
        copy.put("tower", ("", "a"), image(1))
        assert copy.held == 1024
