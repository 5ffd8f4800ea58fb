"""Pages of the site that are made from the code, so that they cannot go stale.

    reference/configuration.md   every key of vpt/config/schema.py with its type, default, range and comment
    reference/vpt.PACKAGE.md     the docstrings of a package
    paper.md                     conf/experiment/paper/README.md

Pages in docs/ link to the files that these are made from, which works on GitHub; here the links are led to the pages.
"""

import ast
import re
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
ASK, SERVE, RL, EVAL = "vpt/config/ask.py", "vpt/serving/settings.py", "vpt/config/rl.py", "vpt/config/evaluation.py"
SCHEMA, ESTIMATE, PAPER = "vpt/config/schema.py", "vpt/estimate/settings.py", "conf/experiment/paper/README.md"
KEYS = (SCHEMA, RL, EVAL, ASK, ESTIMATE, SERVE)
PAGES = {SCHEMA: "reference/configuration.md", PAPER: "paper.md"}


def on_config(config: Any) -> Any:
    """Add a navigation entry for each package of vpt."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference.append({"Packages": [{name: f"reference/{name}.md"} for name in packages()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the code."""
    from mkdocs.structure.files import File

    pages = {PAGES[SCHEMA]: configuration_page(), PAGES[PAPER]: (ROOT / PAPER).read_text(encoding="utf-8")}
    pages |= {f"reference/{name}.md": f"# {name}\n\n::: {name}\n" for name in packages()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to the sources of generated pages to these pages; GitHub wants pipes in tables escaped, mkdocs not."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({page})")
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), markdown)


def packages() -> list[str]:
    """The packages and single modules of vpt that have a page."""
    found = [path.stem for path in (ROOT / "vpt").iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"]
    return [f"vpt.{name}" for name in sorted(found) if not name.startswith("__")]


def configuration_page() -> str:
    """Every key of the schema, a table for each group."""
    sys.path.insert(0, str(ROOT))
    from vpt.config.ask import AskConfig
    from vpt.config.evaluation import EvalConfig
    from vpt.config.schema import TrainConfig
    from vpt.estimate.settings import AssumedConfig
    from vpt.serving.settings import ServeConfig

    comments = {key: text for path in KEYS for key, text in field_comments(ROOT / path).items()}
    lines = [
        "# Configuration keys",
        "",
        f"Made from `{SCHEMA}`. `NAME` stands for a name that you choose. Files in `conf/` set many of these: what "
        "a run really uses is in its `config.yaml`, and `python train.py --cfg job` prints it. For `eval.py` and "
        "`vpt ask`, `null` means as the model was trained.",
    ]
    for program, kind in (("train.py", TrainConfig), ("eval.py", EvalConfig), ("vpt ask", AskConfig)):
        lines += ["", f"## {program}"]
        for prefix, table in tables(kind, comments):
            lines += ["", f"### {program}: `{prefix}`" if prefix else f"### {program}: top level", "", *table]
    lines += ["", "## vpt serve", *(line for _, table in tables(ServeConfig, comments) for line in ("", *table))]
    [(_, table)] = tables(AssumedConfig, comments, "assume.")
    lines += ["", "## vpt estimate", "", "The keys of `train.py`, `gpus`, and what is assumed:", "", *table]
    return "\n".join(lines) + "\n"


def tables(schema: type, comments: dict[tuple[str, str], str], prefix: str = "") -> list[tuple[str, list[str]]]:
    """(prefix, Markdown table) of a dataclass and of all those below it, in order."""
    hints, rows, below = get_type_hints(schema), [], []
    trained = re.sub("^(?:Eval|Ask)", "", schema.__name__)  # what `null` stands for
    for item in fields(schema):
        kind, inner = hints[item.name], nested(hints[item.name])
        if inner is None:
            comment = comments.get((schema.__name__, item.name)) or comments.get((trained, item.name), "")
            cells = (f"`{prefix}{item.name}`", f"`{type_name(kind)}`", default_of(item), allowed(item), comment)
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        else:
            below += tables(inner, comments, f"{prefix}{item.name}." + "NAME." * (get_origin(kind) is dict))
    head = ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    return [*([(prefix.rstrip("."), head + rows)] if rows else []), *below]


def nested(kind: Any) -> type | None:
    """The dataclass that a field holds, or holds by names."""
    inner = get_args(kind)[1] if get_origin(kind) is dict else kind
    return inner if isinstance(inner, type) and is_dataclass(inner) else None


def type_name(kind: Any) -> str:
    """`int | None`, `list[str]`, `dict[str, float]`, as the schema writes it."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def default_of(item: Field) -> str:
    """The default as YAML would write it."""
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    if value == "???":
        return "must be given"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def allowed(item: Field) -> str:
    """Choices, or the range."""
    if choices := item.metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if limits := item.metadata.get("range"):
        low, high = limits
        return f"{low} or more" if high == float("inf") else f"{low} to {high}"
    return ""


def field_comments(path: Path) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment at the end of the field, for every class of a file."""
    source = path.read_text(encoding="utf-8")
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.end_lineno:
                text = "\n".join(lines[item.lineno - 1 : item.end_lineno])
                found[node.name, item.target.id] = " ".join(re.findall(r"\s# (.*)", text))
    return found
