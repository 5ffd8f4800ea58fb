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


def imports_of(path: Path) -> list[tuple[int, bool, list[str]]]:
    """(line, whether it stands at the top of the module, modules) of every import of vpt."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vpt":
            found.append((node.lineno, node in tree.body, [f"{node.module}.{alias.name}" for alias in node.names]))
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vpt" for alias in node.names):
            found.append((node.lineno, node in tree.body, [alias.name for alias in node.names]))
    return found


def test_imports_point_one_way():
    wrong = []
    for path in sorted((ROOT / "vpt").rglob("*.py")):
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
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "vpt").rglob("*.py")
    }
    edges = {}
    for name, path in files.items():
        found = {module for _, _, modules in imports_of(path) for module in modules}
        edges[name] = {m if m in files else m.rpartition(".")[0] for m in found} & files.keys() - {name, "vpt"}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"circles among {sorted(edges)}"
