"""Broken and hostile inputs, for the fuzzers of tests/data/test_fuzzing.py: whatever they are changed into, errors must be ours."""

import copy
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vpt.errors import UserError

RANDOM = st.integers(0, 2**64 - 1).map(Random)  # st.randoms() prefers 0 to chances


def fuzz(examples: int, check: Callable[..., None], **strategies: st.SearchStrategy) -> None:
    """Call `check` with so many examples."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    settings(max_examples=examples, deadline=None, suppress_health_check=quiet)(given(**strategies)(check))()


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """A quick run of a fuzzer, and one that is marked slow."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@contextmanager
def refusing(kind: type[UserError], pattern: str) -> Iterator[None]:
    """What happens here may be refused, with a message that begins with `pattern`."""
    try:
        yield
    except kind as error:
        message = str(error)
        if not re.match(pattern, message, re.DOTALL):
            raise AssertionError(f"{message!r} does not say {pattern!r}") from error


def seed_images() -> dict[str, bytes]:
    """A small valid file of each format and mode."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 4)).astype(np.uint8)
    colour = Image.fromarray(pixels, "RGBA")
    modes = {
        "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"], "JPEG": ["RGB", "L", "CMYK"], "GIF": ["P"],
        "TIFF": ["RGB", "CMYK", "F", "I;16", "1"], "WEBP": ["RGBA"], "BMP": ["RGB", "1"], "AVIF": ["RGB"], "PPM": ["RGB"],
        "JPEG2000": ["RGB"], "EPS": ["RGB"], "DDS": ["RGBA"], "ICO": ["RGBA"], "TGA": ["RGB"], "MPO": ["RGB"],
    }  # fmt: skip
    made = {}
    for kind, wanted in modes.items():
        for mode in wanted:
            buffer = io.BytesIO()
            base = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256) if mode == "I;16" else colour
            base = (
                base
                if mode in ("I;16", "RGBA")
                else colour.convert("RGB").convert(mode)
                if mode != "LA"
                else colour.convert("LA")
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                base.save(buffer, kind)
            made[f"{kind} {mode}"] = buffer.getvalue()
    return made


def lying_png(path: Path, width: int, height: int) -> None:
    """A valid header and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def damaged(data: bytes, random: Random) -> bytes:
    """Cut off, overwritten (headers above all), or with something in between."""
    broken = bytearray(data)
    way = random.choice(["cut", "overwrite", "overwrite", "insert"])
    if way == "cut":
        return bytes(broken[: random.randrange(len(broken))])
    if way == "insert":
        at = random.randrange(len(broken) + 1)
        broken[at:at] = random.randbytes(random.randrange(1, 50))
        return bytes(broken)
    for _ in range(random.randrange(1, 8)):
        within = min(len(broken), random.choice([64, len(broken)]))
        broken[random.randrange(within)] = random.choice([0, 255, random.randrange(256)])
    return bytes(broken)


# What a user may type, and what a model may say
PIECES = [
    "<|detection_action_start|>", "<|detection_action|>", "<|detection_action_end|>", "<|seg_action|>",
    "<|clip_action_start|>", "<|clip_action|>", "<|region_token_start|>", "<|x_1|>", "<|y_7|>", "<|x_99|>",
    "<|region_token_end|>", "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|detection_image_pad|>", "<|vision_start|>",
    "<|endoftext|>", "\u0301", "\x00", "\n", " ", "é", "日", "a" * 100, "[1, 2, 3, 4]", "[999999999999999,1,2,3]",
    "<|x_" + "1" * 5000 + "|>", "<|im_start|>user\n",
]  # fmt: skip
SHOWN = ["<image>", "<video>", "<detection_image>", "<clip_image>", "<foo_image>", "\ud800"]

VALUES: list[Any] = [
    None, True, 0, -1, 1e400, float("nan"), 10**400, "", [], {}, "a", ["a"], [[]], [None], "../x.png", "/etc/passwd",
    "0.png", "0.png_0,0,5,5", "0.png_" + "9" * 5000 + ",0,1,1", "\x00.png", "\ud800.png", "x" * 5000, "0.png/..", ".",
    "0.png_1,1,1,1", "1.png_0,0,1,48", {"frames": ["0.png"], "fps": 2}, {"frames": ["0.png"], "fps": 1e-300},
    {"frames": ["0.png"] * 3, "fps": 10**400}, {"frames": ["0.png"]},
]  # fmt: skip
KEYS = ["images", "videos", "box", "answers", "region_bins", "dataset", "clip_images", "foo_images", "messages"]


def mutated(node: Any, random: Random) -> Any:
    """Some decoded JSON with a few things in it changed, added, or left out."""
    if random.random() < 0.012:
        return copy.deepcopy(random.choice(VALUES))
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if random.random() > 0.004}
        changed = {key: value if key == "role" else mutated(value, random) for key, value in kept.items()}
        if random.random() < 0.02:
            changed[random.choice(KEYS)] = copy.deepcopy(random.choice(VALUES))
        return changed
    if isinstance(node, list):
        changed_list = [mutated(value, random) for value in node if random.random() > 0.004]
        if changed_list and random.random() < 0.02:
            changed_list.insert(random.randrange(len(changed_list)), random.choice(changed_list))
        return changed_list
    if isinstance(node, str) and random.random() < 0.1:
        at = random.randrange(len(node) + 1)
        typed = "".join(random.choice(PIECES + SHOWN) for _ in range(random.randrange(6)))
        return node[:at] + typed + node[at:]
    return node


SETTINGS: list[Any] = [
    None, True, 0, -1, 1, 2, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../..", "/nonexistent", "\ud800",
    "\x00", [], ["x"], [1], [None], {}, {"x": 1}, {"target": "os.system"}, "vpt.encoders.dino", "os.system", "torch",
    {"target": "vpt.data.images.MediaStore", "options": {}}, "vpt.data.sources.base.Source", "${nope}", "???", "1e400", "dino",
    0.5, "a" * 10000,
]  # fmt: skip


def scramble(tree: dict[str, Any], random: Random) -> dict[str, Any]:
    """A plain configuration in which one to three keys have strange values, strange names, or are gone."""
    tree = copy.deepcopy(tree)
    for _ in range(random.randrange(1, 4)):
        node, key = random.choice(list(_places(tree)))
        way = random.random()
        if way < 0.8 or isinstance(node, list):
            node[key] = copy.deepcopy(random.choice(SETTINGS))
        elif way < 0.9:
            node[random.choice(["lr", "target", "stpes", "\u0301"])] = copy.deepcopy(random.choice(SETTINGS))
        else:
            del node[key]
    return tree


def _places(node: Any) -> Any:
    """Every (container, key) of a tree."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)
