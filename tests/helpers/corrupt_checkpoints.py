"""Checkpoints that somebody has damaged, or made to do harm, for the fuzzer of tests/checkpoint/test_corrupt_checkpoints.py."""

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from helpers.fuzzing import damaged, scramble

ABSURD: list[Any] = [
    None, True, 0, -1, 1, 2, 3, 7, 0.5, 10**6, 2**31, 2**63, 10**30, -(10**9), float("nan"), float("inf"), "", "x", "\x00",
    "\ud800", "os.system", "../../outside", [], [[]], {}, {"x": 1}, [1] * 1000, ["full_attention"] * 9, "Qwen2Tokenizer",
    "someone/kernels", "a" * 10_000,
]  # fmt: skip
KEYS = ["auto_map", "attn_implementation", "_target_", "step", "depth", "dtype", "tokenizer_file", "vocab_file", "added_tokens",
        "num_hidden_layers", "model_type", "quantization_config", "tokenizer_class", "extra_special_tokens"]  # fmt: skip
BAD_JSON = [b"", b"[]", b"null", b"7", b'"a"', b"{}", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\x00", b"1" * 5000,
            b'{"a": NaN}', b"\xef\xbb\xbf{}", b"\x00" * 64, b'{"step": 2, "step": []}']  # fmt: skip
BOMB = (
    "a0: &a0 [" + "1, " * 9 + "1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}*a{i - 1}]\n" for i in range(1, 12))
)
BAD_YAML = [BOMB, "[" * 5000, "!!python/object/apply:os.system ['true']", "- 1", "a: &a [*a]", "7", "", "\x00", "? {}\n: 1",
            "run_name: ${oc.env:VPT_SECRET}", "_target_: os.system", "a: {b: {c: ${nope}}}"]  # fmt: skip


class Gift:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, at: Path) -> None:
        self.at = str(at)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.at,)


def copied(folder: Path, to: Path) -> Path:
    """A checkpoint whose files can be replaced but not written into: they are the same as the first one's."""
    shutil.rmtree(to.parents[1], ignore_errors=True)
    shutil.copytree(folder, to, copy_function=os.link)
    return to


def replace(path: Path, data: bytes) -> None:
    """Another file in the place of one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def corrupt(folder: Path, random: Random, outside: Path) -> tuple[str, str]:
    """Damage one file of a checkpoint; which one, and how."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    name = random.choice([name for name in names if not name.startswith("SHA")])
    ways = [_bytes, _bytes, _as_folder, _gone, _link, _pipe]
    kind = {".json": [_json, _json, _entry, _entry, _entry], ".yaml": [_yaml, _yaml, _scramble, _scramble]}
    ways += kind.get(Path(name).suffix, [_pickle, _header, _header, _header, _index, _bin])
    way = random.choice(ways)
    if name == "complete":
        way, name = _whole_folder, random.choice(["sizes", "tokenizer"])
    way(folder / name, random, outside)
    return name, way.__name__


def _bytes(path: Path, random: Random, _: Path) -> None:
    data = path.read_bytes()
    replace(path, damaged(data, random))


def _gone(path: Path, *_: object) -> None:
    path.unlink()


def _as_folder(path: Path, *_: object) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, *_: object) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path, random: Random, outside: Path) -> None:
    """To itself, to nothing, to a good file elsewhere, or to a device without end."""
    data = path.read_bytes()
    path.unlink()
    (outside / path.name).write_bytes(data)
    path.symlink_to(random.choice([path, path.parent / "nothing", outside / path.name, Path("/dev/zero")]))


def _whole_folder(path: Path, random: Random, outside: Path) -> None:
    """A folder that is empty, missing, a file, or a link out or back."""
    shutil.copytree(path, outside / path.name, dirs_exist_ok=True)
    shutil.rmtree(path)
    way = random.choice(["empty", "missing", "file", "out", "back"])
    if way == "empty":
        path.mkdir()
    elif way == "file":
        path.write_text("{}")
    elif way != "missing":
        path.symlink_to(outside / path.name if way == "out" else path.parent)


def _json(path: Path, random: Random, _: Path) -> None:
    replace(path, random.choice(BAD_JSON))


def _entry(path: Path, random: Random, _: Path) -> None:
    """Some keys have other values, or are new."""
    tree = json.loads(path.read_text())
    nodes = list(_nodes(tree))
    for _ in range(random.randrange(1, 4)):
        node = random.choice(nodes)
        key = random.choice(list(node) if isinstance(node, dict) else range(len(node))) if node else KEYS[0]
        if isinstance(node, dict) and random.random() < 0.3:
            key = random.choice(KEYS)
        if isinstance(node, dict) or node:
            node[key] = copy.deepcopy(random.choice(ABSURD))
    replace(path, json.dumps(tree).encode())


def _nodes(tree: Any, depth: int = 4) -> Any:
    if isinstance(tree, dict | list):
        yield tree
        for value in (tree.values() if isinstance(tree, dict) else tree) if depth else ():
            yield from _nodes(value, depth - 1)


def _yaml(path: Path, random: Random, _: Path) -> None:
    replace(path, random.choice(BAD_YAML).encode())


def _scramble(path: Path, random: Random, _: Path) -> None:
    tree = scramble(yaml.safe_load(path.read_text()), random)
    if random.random() < 0.5:
        node = random.choice([node for node in _nodes(tree) if isinstance(node, dict)])
        node[random.choice([*node, "_target_"])] = random.choice(["${oc.env:VPT_SECRET}", "os.system", 10**9, "*x"])
    replace(path, yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))


def _header(path: Path, random: Random, _: Path) -> None:
    """A safetensors header that lies about lengths, shapes, types, places, names, or slices."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    way = random.choice(["length", "shape", "dtype", "offsets", "name", "slices", "more slices", "metadata", "twice"])
    if way == "shape":
        entry["shape"] = random.choice([[2**62, 4], [10**30], [-1], [], [0], list(reversed(entry["shape"])), "x", None])
    elif way == "dtype":
        entry["dtype"] = random.choice(["F64", "F16", "BF16", "I8", "U8", "BOOL", "F4", "X", 7, None])
    elif way == "offsets":
        entry["data_offsets"] = random.choice([[0, 4], [0, 2**62], [2**62, 2**63], [-4, 0], [8, 0], [], None, "x"])
    elif way == "name":
        header[random.choice(["x", "../x", "a/b", "\x00", "lm_head.weight"])] = header.pop(name)
    elif way == "twice":
        header["copy"] = entry
    elif way == "metadata":
        header["__metadata__"] = random.choice(
            [{}, [], 7, {"DCP_SHARDING_INFO": "["}, {"DCP_SHARDING_INFO": "7"}, {"a": 7}]
        )
    elif way != "length":
        _lie_about_slices(header, name, way, random)
    text = json.dumps(header).encode()
    length = random.choice([2**63, 2**40, 0, size + 1, size - 1]) if way == "length" else len(text)
    replace(path, length.to_bytes(8, "little") + text + data[8 + size :])


def _lie_about_slices(header: dict[str, Any], name: str, way: str, random: Random) -> None:
    known = json.loads(header.get("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
    at = [[0], [2**40] * 2, [1], [-1, 0], [], "x", None, [0.5], [0, 0, 0], [64, 0]]
    for key in [name] if way == "slices" else [key for key in header if key != "__metadata__"]:
        known[key] = {"saved_offsets": random.choice(at)} if random.random() < 0.9 else random.choice(ABSURD)
    header["__metadata__"] = {"DCP_SHARDING_INFO": json.dumps(known)}


def _pickle(path: Path, random: Random, outside: Path) -> None:
    replace(path, pickle.dumps({"weight": Gift(outside / "ran")}))


def _bin(path: Path, random: Random, outside: Path) -> None:
    """Weights as a pickle, under the name that transformers has for them."""
    replace(path.parent / "pytorch_model.bin", pickle.dumps({"weight": Gift(outside / "ran")}))
    if random.random() < 0.7:
        path.unlink()


def _index(path: Path, random: Random, outside: Path) -> None:
    """An index that names files elsewhere, or none."""
    (outside / "model-1.safetensors").write_bytes(path.read_bytes())
    path.rename(path.with_name("model-00001-of-00002.safetensors"))
    shown = random.choice(
        [str(outside / "model-1.safetensors"), "../../../outside/model-1.safetensors", "..", "", 7, None, []]
    )
    index: Any = {"weight_map": random.choice([{"a": shown}, [shown], shown])}
    replace(path.with_name("model.safetensors.index.json"), json.dumps(random.choice([index, [index], {}])).encode())
