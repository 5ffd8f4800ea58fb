"""What README.md and docs/ say is so: commands, keys, links, paths, and names of metrics exist."""

import ast
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conftest import ROOT, compose_eval, compose_typed
from vpt.__main__ import COMMANDS
from vpt.__main__ import main as vpt_main
from vpt.bench import hf_trainer
from vpt.bench.__main__ import GROUPS
from vpt.cli.ask import read_arguments
from vpt.cli.benchmarks import read_arguments as read_benchmarks_arguments
from vpt.cli.estimate import compose_description
from vpt.cli.export import parse as parse_export
from vpt.cli.pretrain import parse as parse_pretrain
from vpt.cli.serve import read_arguments as read_serve_arguments
from vpt.config.evaluation import EvalConfig
from vpt.config.overrides import check_overrides
from vpt.config.schema import TrainConfig
from vpt.errors import UserError
from vpt.estimate.settings import EstimateConfig
from vpt.evaluation.metrics import METRICS
from vpt.evaluation.metrics.perception import PERCEPTION
from vpt.reporting.panels import SECTIONS

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md")), ROOT / "conf/experiment/paper/README.md"]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"\b(?:FOLDER|OTHER_RUN)\b")
OUTSIDE = {"pip", "lmms-eval", "wandb", "."}  # programs that are not ours, and the shell's own
GROUPS_OF_KEYS = "model|masking|data|optim|training|strategy|generation|tracking|judge|assume"
KEY = re.compile(rf"^(?:{GROUPS_OF_KEYS})(?:\.\w+)+$")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Every line of every `sh` block as words; of lines that are indented instead of fenced, those of vpt and python."""
    for page in PAGES:
        for _, language, block in FENCE.findall(text_of(page)):
            if language == "sh":
                for line in block.replace("\\\n", " ").splitlines():
                    if words := shlex.split(line, comments=True):
                        yield page, words
        for line in re.findall(r"^ {4,}((?:vpt|python) .*)$", FENCE.sub("", text_of(page)), re.MULTILINE):
            yield page, shlex.split(line, comments=True)


def commands_of(program: str) -> list:
    """The arguments of every command of a program, each once."""
    found = {tuple(words): page for page, words in commands() if " ".join(words).startswith(program)}
    skipped = len(program.split())
    return [pytest.param([*words[skipped:]], id=f"{page.stem}: {' '.join(words)}") for words, page in found.items()]


def overrides_in(words: list[str]) -> list[str]:
    """What is left without the flags of Hydra."""
    left = iter(words)
    return [word for word in left if not (word.startswith("-") and (word != "--cfg" or next(left)))]


def members(overrides: list[str]) -> list[list[str]]:
    """Runs of a sweep in which every value occurs; one run where nothing is swept over."""
    choices = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        swept = override.sweep_string_iterator() if override.is_sweep_override() else ()
        choices.append([f"{override.get_key_element()}={value}" for value in swept] or [text])
    return [[values[number % len(values)] for values in choices] for number in range(max(map(len, choices), default=1))]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Fill placeholders with a folder that says it holds a Qwen2-VL, and stand in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    return lambda words: [PLACEHOLDER.sub(str(tmp_path), word) for word in words]


def test_examples_parse():
    parsers = {"python": ast.parse, "json": json.loads, "yaml": OmegaConf.create}
    for page in PAGES:
        for _, language, block in FENCE.findall(text_of(page)):
            assert language in {*parsers, "sh", "text", "bibtex"}, f"{page.name}: ```{language}"
            parsers.get(language, str)(block)


def test_programs_are_known():
    """No command is passed over because it is spelt otherwise."""
    for page, words in commands():
        known = words[0] in {"python", "vpt", "make", "sbatch", *OUTSIDE}
        assert known, f"{page.name}: {' '.join(words)}"
        if words[0] == "python":
            target = words[1:3] if words[1] == "-m" else words[1:2]
            found = (ROOT / target[-1]).is_file() if len(target) == 1 else find_spec(target[-1])
            assert found, f"{page.name}: {' '.join(words)}"
    assert len(list(commands())) > 60


@pytest.mark.parametrize("words", commands_of("python train.py"))
def test_train(words, in_folder):
    overrides = overrides_in(in_folder(words))
    check_overrides(overrides, TrainConfig)
    for member in members(overrides):
        compose_typed(*member)


@pytest.mark.parametrize("words", commands_of("python eval.py"))
def test_eval(words, in_folder):
    overrides = overrides_in(in_folder(words))
    check_overrides(overrides, EvalConfig)
    compose_eval(*overrides)


@pytest.mark.parametrize("words", commands_of("sbatch"))
def test_sbatch(words, in_folder):
    script, *overrides = [word for word in in_folder(words) if not word.startswith("--")]
    assert (ROOT / script).is_file()
    compose_typed(*overrides)


@pytest.mark.parametrize("words", commands_of("python -m vpt.bench "))
def test_bench(words):
    assert set(words) <= {*GROUPS}


@pytest.mark.parametrize("words", commands_of("python -m vpt.bench.hf_trainer"))
def test_beside_another_trainer(words):
    assert hf_trainer.parse_arguments(words).rounds > 0


@pytest.fixture(scope="module")
def help_of():
    """What `vpt COMMAND --help` prints; each command is asked once."""
    said: dict[str, str] = {}

    def ask(command: str, capsys: pytest.CaptureFixture) -> str:
        if command not in said:
            with suppress(SystemExit):
                vpt_main([command, "--help"])
            said[command] = capsys.readouterr().out
        return said[command]

    return ask


@pytest.mark.parametrize("words", commands_of("vpt "))
def test_vpt(words, in_folder, help_of, capsys):
    command, *arguments = in_folder(words)
    assert command in COMMANDS
    if command == "ask":
        read_arguments(arguments)
    elif command == "export":
        parse_export(arguments)
    elif command == "estimate":
        compose_description(arguments)
    elif command == "pretrain":
        parse_pretrain(arguments)
    elif command == "benchmarks":
        read_benchmarks_arguments(arguments)
    elif command == "serve":
        read_serve_arguments(arguments)
    elif command == "launch":
        script = arguments.index("train.py")
        compose_typed(*arguments[script + 1 :])
        arguments = arguments[:script]
    for option in [word for word in arguments if word.startswith("--")]:
        assert re.search(rf"{option}\b", help_of(command, capsys)), f"vpt {command} has no {option}"


@pytest.mark.parametrize("words", commands_of("make"))
def test_make(words):
    makefile = text_of(ROOT / "Makefile")
    target, *variables = words
    assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE)
    assert all(f"{variable.partition('=')[0]} ?=" in makefile for variable in variables)


def spans() -> Iterator[tuple[Path, str]]:
    """Every piece of code within text."""
    for page in PAGES:
        for span in INLINE.findall(FENCE.sub("", text_of(page))):
            yield page, span


def test_commands_within_text_exist():
    targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    for page, span in spans():
        program, _, rest = span.partition(" ")
        if program == "vpt" and rest:
            assert rest.split()[0] in {*COMMANDS, "COMMAND", "--help"}, f"{page.name}: {span}"
        if program == "make" and rest:
            assert rest.split()[0] in targets, f"{page.name}: {span}"


def test_extras_exist():
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"(?:vpt|\.)\[([a-z,]+)\]'", text_of(page)):
            assert {*names.split(",")} <= {*extras}, f"{page.name}: {names}"
    table = text_of(DOCS / "getting_started.md").partition("## Extras")[2]
    assert {*re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)))} == {*extras}


def test_keys_exist():
    """A dotted name that begins like a key is one, of `train.py`, `eval.py` or `vpt estimate`."""
    for page, span in spans():
        for word in span.split():
            key = word.lstrip("+'").partition("=")[0]
            if not KEY.match(key) or key.endswith(".py"):
                continue
            for schema in (TrainConfig, EvalConfig, EstimateConfig):
                try:
                    check_overrides([f"{key}=0"], schema)
                    break
                except UserError as error:
                    wrong = error
            else:
                raise AssertionError(f"{page.name}: {wrong}")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in LINK.findall(FENCE.sub("", text_of(page))):
            if not target.startswith(("http", "#")):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_paths_exist():
    for page, span in spans():
        if re.match(r"^(?:vpt|conf|tests|docs|examples)/[\w./-]*$", span) and not re.search("[A-Z]{4}", span):
            assert (ROOT / span).exists(), f"{page.name}: {span}"
        if match := re.match(r"^(vpt(?:\.\w+)+)$", span):
            assert is_defined(match[1]), f"{page.name}: {span}"
    for span in re.findall(r"^\| `(?:[^|]*)\|", README.read_text(encoding="utf-8"), re.MULTILINE):
        for name in re.findall(r"`(\w+/|\w+\.py)`", span):
            assert (ROOT / "vpt" / name).exists() or (ROOT / name).exists(), name


def is_defined(dotted: str) -> bool:
    """Whether a dotted name is a module, or stands at the top of one."""
    path = ROOT.joinpath(*dotted.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    if not module.is_file():
        module = path.parent / "__init__.py"
    if not module.is_file():
        return False
    return re.search(rf"^(?:class |def |){path.name}\b|\"{path.name}\"", text_of(module), re.MULTILINE) is not None


def test_names_of_the_code_exist():
    """Classes, methods and functions that the pages about the code name."""
    words = {word for path in (ROOT / "vpt").rglob("*.py") for word in re.findall(r"\w+", text_of(path))}
    for page, span in spans():
        name = re.fullmatch(r"([\w.]*(?:[a-z]_|[a-z][A-Z])[\w.]*)(?:\(\w*\))?", span)
        if page.stem in {"architecture", "generation"} and name:
            assert {*re.findall(r"[A-Za-z_]\w+", name[1])} <= words, f"{page.name}: {span}"


def test_docstrings_name_attributes_that_exist():
    wrong = []
    for path in (ROOT / "vpt").rglob("*.py"):
        for node in (n for n in ast.walk(ast.parse(text_of(path))) if isinstance(n, ast.ClassDef)):
            _, _, section = (ast.get_docstring(node) or "").partition("Attributes:\n")
            listed = re.findall(
                r"^    ([a-z_]\w*(?:, \w+)*): ", re.split(r"^\S", section, flags=re.MULTILINE)[0], re.MULTILINE
            )
            there = re.findall(r"(?:^    |self\.)(\w+)", ast.unparse(node), re.MULTILINE)
            wrong += [f"{path.name}: {node.name}.{n}" for names in listed for n in names.split(", ") if n not in there]
    assert not wrong


def test_private_names_are_still_used():
    """Those in the table are, and files that use others are in it."""
    table = text_of(DOCS / "contributing.md").partition("## Private names")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\S+)` \| (.*) \|", table, re.MULTILINE))
    for file, uses in listed.items():
        for name in re.findall(r"`(\w+)`", uses):
            assert re.search(rf"\b{name}\b", text_of(ROOT / file)), f"{file}: {name}"
    private = re.compile(r"(?:\b(?!self\b|cls\b)\w+|\))\._[a-z]")
    sources = {path: text_of(path).replace("os._exit", "") for path in (ROOT / "vpt").rglob("*.py")}  # a public name
    using = {path.relative_to(ROOT) for path, text in sources.items() if private.search(text)}
    assert using <= {*map(Path, listed)}


def test_configurations_are_named_as_they_are():
    """`+experiment=NAME` and the like, wherever they stand in a text."""
    for page in PAGES:
        for group, name in re.findall(r"\+(experiment|ablations|sweep|debug|launcher)=([\w/]+)", text_of(page)):
            path = ROOT / "conf" / group / f"{name}.yaml"
            assert path.is_file() or name in {"NAME", "paper/", "scenes/"} or name.endswith("/"), f"{page.name}: {name}"


def test_readme_is_short():
    lines = text_of(README).splitlines()
    assert len(lines) <= 160 and sum(map(len, lines)) < 10_000


def test_readme_names_every_package():
    table = text_of(README).partition("## Layout")[2].partition("## ")[0]
    for path in (ROOT / "vpt").iterdir():
        if (path / "__init__.py").exists():
            assert f"`{path.name}/`" in table, path.name


def test_every_page_is_in_the_indices():
    for index, prefix in ((README, "docs/"), (DOCS / "index.md", "")):
        linked = set(LINK.findall(text_of(index)))
        missing = [page.name for page in DOCS.glob("*.md") if page.stem != "index" and prefix + page.name not in linked]
        assert not missing, f"{index.name} links no {missing}"
    listed = re.findall(r": (\w+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert {*listed} == {*(page.name for page in DOCS.glob("*.md")), "paper.md"}


def test_the_glossary_has_every_metric():
    glossary = text_of(DOCS / "training.md").partition("## Metrics glossary")[2]
    told = re.findall(r"`([a-z]+/[\w/*.]+)`", glossary)
    for section in SECTIONS.values():
        for pattern in (pattern for panel in section for pattern in panel.metrics):
            assert any(pattern == name or fnmatchcase(name, pattern) for name in told), pattern
    for path in (ROOT / "vpt/training").glob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Constant) and re.fullmatch(r"(?:train|perf|data|masking)/\w+", str(node.value)):
                assert node.value in told, f"{path.name}: {node.value}"


def test_evaluation_has_every_metric_and_ablation():
    page = text_of(DOCS / "evaluation.md")
    ablations = "".join(text_of(path) for path in (ROOT / "conf/ablations").glob("*.yaml"))
    perceived = [name for metric in PERCEPTION for name in metric.measure([])]
    for name in (*METRICS, *perceived, *re.findall(r"^(\w+): \{target", ablations, re.MULTILINE)):
        assert f"`{name}`" in page, name


def test_every_key_is_in_the_reference(monkeypatch):
    """docs/hooks.py makes the reference; a new key has a row, and its comment."""
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "hooks", raising=False)
    import hooks

    page = hooks.configuration_page()
    for key in ("optim.max_grad_norm", "data.train.NAME.weight", "encoder.NAME.sizes.NAME.weights", "judge.url"):
        assert f"| `{key}` |" in page, key
    comments = hooks.field_comments(ROOT / "vpt/config/schema.py")
    assert comments["OptimConfig", "warmup_ratio"] == "share of the steps"
    assert comments["StrategyConfig", "reshard_after_forward"].startswith("fsdp, hybrid")
    assert "| `assume.gpu` |" in page and "<class" not in page
    assert not re.findall(r"^\| (\S+) \|.*\|  \|$", page, re.MULTILINE), "these have no comment"
