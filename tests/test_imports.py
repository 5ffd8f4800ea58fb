"""Imports point one way, in the order of docs/architecture.md: no package imports one that is built on it."""

import ast
from pathlib import Path

from conftest import ROOT

ORDER = [
    ["errors", "utils"], ["config", "perception", "tracking"], ["data"], ["encoders"], ["models"],
    ["distributed", "flops"], ["checkpoint"], ["generation"], ["evaluation"], ["rl"], ["training", "reporting"],
    ["pretraining", "estimate", "integrations"], ["serving"], ["bench"], ["cli", "__main__"],
]  # fmt: skip
RANK = {name: number for number, names in enumerate(ORDER) for name in names}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "vpt").rglob("*.py"))
}


def imports_of(path: Path, *packages: str) -> list[tuple[int, bool, list[str]]]:
    """(line, whether it stands at the top of the module, modules) of every import of these packages, of vpt by default."""
    tree, found, packages = ast.parse(path.read_text(encoding="utf-8")), [], packages or ("vpt",)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in packages:
            found.append((node.lineno, node in tree.body, [f"{node.module}.{alias.name}" for alias in node.names]))
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] in packages for alias in node.names):
            found.append((node.lineno, node in tree.body, [alias.name for alias in node.names]))
    return found


def files_imported(name: str, *, lazily: bool = True) -> set[str]:
    """The modules of vpt that one of them imports; without `lazily`, at once."""
    imported = {m for _, top, modules in imports_of(FILES[name]) if top or lazily for m in modules}
    return {m if m in FILES else m.rpartition(".")[0] for m in imported} & FILES.keys() - {name, "vpt"}


def test_imports_point_one_way():
    wrong = []
    for path in FILES.values():
        own = path.relative_to(ROOT / "vpt").with_suffix("").parts[0]
        if own == "__init__":  # the face of the package: `vpt.load` is imported when it is asked for
            continue
        for line, at_the_top, modules in imports_of(path):
            for module in modules:
                package = module.split(".")[1]
                upward = RANK[package] > RANK[own]
                lazy = package != own and not at_the_top
                if upward or lazy:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {module}" + " lazily" * lazy)
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    edges = {name: files_imported(name) for name in FILES}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"circles among {sorted(edges)}"


# What runs where only torch and transformers are: the bench of GPUs and these groups of figures.
BARE = ["gpu.__main__", "__main__", "generation", "inner_passes", "packing", "mfu", "memory"]


def test_the_bench_needs_torch_and_transformers_alone():
    waiting, seen = [f"vpt.bench.{name}" for name in BARE], set()
    while waiting:
        seen.add(name := waiting.pop())
        at_once = [modules for _, top, modules in imports_of(FILES[name], "hydra", "omegaconf", "wandb") if top]
        assert not at_once, f"{name} imports {at_once}"
        waiting += (files_imported(name, lazily=False) | {name.rpartition(".")[0]}) & FILES.keys() - seen
    assert "vpt.models.vpt" in seen
