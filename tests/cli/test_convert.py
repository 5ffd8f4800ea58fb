"""Visual-CoT files to records: reading, writing, skipping, the command line, and the real files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.programs import run_program
from helpers.visual_cot_records import METADATA, VISCOT, benchmark, metadata, real
from vpt.__main__ import main
from vpt.data.records import parse_record
from vpt.data.visual_cot.records import BOX_PROMPT, convert_record


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def run(*arguments: object) -> None:
    main(["convert", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.fullmatch(r"error: .+\n", error), error
    return error


def test_lines_and_list_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told apart by content: a list under the name .jsonl, lines under .json."""
    raws = [metadata(), benchmark((1, 2, 30, 40), (64, 48)), metadata(answer="Größe")]
    lines, listed = write_lines(tmp_path / "lines.json", *raws), tmp_path / "list.jsonl"
    listed.write_text("\ufeff" + json.dumps(raws, indent=2), encoding="utf-8")  # some editors put a mark first
    for source in (lines, listed):
        run(source, tmp_path / "out.jsonl")
        run(source, tmp_path / "out.json")
        records = json.loads((tmp_path / "out.json").read_text())
        assert records == [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert records == [convert_record(raw) for raw in raws]
    assert "wrote 3 records to" in capsys.readouterr().out
    run(lines, tmp_path / "out.json", "--limit", 1, "--kind", "seg", "--no-prompt", "--prefix", "cot")
    expected = convert_record(metadata(), kind="seg", action_prompt=False, prefix="cot")
    assert json.loads((tmp_path / "out.json").read_text()) == [expected]


def test_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = write_lines(tmp_path / "good.jsonl", metadata()), tmp_path / "out.jsonl"
    broken = write_lines(tmp_path / "broken.jsonl", metadata(), "", '{"question": ')
    listed = write_lines(tmp_path / "list.json", "[", json.dumps(metadata()), "{}]")
    ragged = write_lines(tmp_path / "ragged.json", "[", json.dumps(metadata()) + ",", "", '{"answer": "b"}]')
    tall = tmp_path / "tall.json"
    tall.write_text(json.dumps([metadata(), {}], indent=1))
    last = 1 + tall.read_text()[: tall.read_text().index("{}")].count("\n")
    empty, binary = write_lines(tmp_path / "empty.jsonl"), tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    before = set(tmp_path.iterdir())
    assert "is not a file" in refused(capsys, tmp_path / "absent.jsonl", out)
    assert f"mkdir -p {tmp_path}/no" in refused(capsys, good, tmp_path / "no" / "out.jsonl")
    assert "must end in .jsonl" in refused(capsys, good, tmp_path / "out.csv")
    assert "same file" in refused(capsys, good, good)
    assert f"{broken}:3: not valid JSON" in refused(capsys, broken, out)
    assert f"{listed}:3: not valid JSON" in refused(capsys, listed, out)
    assert f"{ragged}:4: key `question` is missing" in refused(capsys, ragged, out)
    assert f"{tall}:{last}: key `question` is missing; there is none" in refused(capsys, tall, out)
    assert "holds no record" in refused(capsys, empty, out)
    assert "cannot be read" in refused(capsys, binary, out)
    assert "below data.root" in refused(capsys, good, out, "--prefix", "/data")
    assert set(tmp_path.iterdir()) == before


def test_skip_counts_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [metadata(bboxs=[[-1, 5, 9, 9], [5, 5, 5, 9]])] * 6  # clipped before it is refused
    source = write_lines(tmp_path / "in.jsonl", metadata(bboxs=[[-1, 5, 9, 9]]), "{", *bad, metadata())
    run(source, tmp_path / "out.jsonl", "--on-error", "skip")
    shown = capsys.readouterr()
    assert re.match("wrote 2 records .*, skipped 7, clipped 1 boxes", shown.out)
    kinds = shown.err.splitlines()
    assert kinds[0].startswith("skipped 6: box [N, N, N, N] in an image of NxN pixels has no area")
    assert kinds[1].startswith("skipped 1: not valid JSON") and kinds[2].endswith(f"in {tmp_path / 'out.skipped.txt'}")
    reasons = (tmp_path / "out.skipped.txt").read_text().splitlines()
    assert [reason.split(": ")[0] for reason in reasons] == [f"{source}:{line}" for line in range(2, 9)]
    assert "box [5, 5, 5, 9] in an image of 80x160 pixels has no area" in reasons[-1]
    run(write_lines(tmp_path / "good.jsonl", metadata()), tmp_path / "out.jsonl", "--on-error", "skip")
    assert not (tmp_path / "out.skipped.txt").exists()
    (tmp_path / "kept.jsonl").write_text("before")
    source = write_lines(tmp_path / "in.jsonl", *bad)
    assert "the first: " in refused(capsys, source, tmp_path / "kept.jsonl", "--on-error", "skip")
    assert (tmp_path / "kept.jsonl").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "good.jsonl", "out.jsonl", "kept.jsonl"}


@pytest.mark.parametrize("option", [("--bins", "0"), ("--kind", "De tection"), ("--limit", "-1"), ("--on-error", "x")])
def test_wrong_options(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("in.jsonl", "out.jsonl", *option)
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typo", "meant"), [("regoin", "region"), ("regions", "region"), ("nnone", "none"), ("non", "none")]
)
def test_misspelt_kind(typo: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("in.jsonl", "out.jsonl", "--kind", typo)
    assert stop.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_command_has_help() -> None:
    shown = run_program("-m", "vpt", "convert", "--help")
    assert shown.returncode == 0
    assert re.search("their union is the region.*example:", shown.stdout, re.DOTALL)


@real
@pytest.mark.parametrize("name", [*METADATA, "vsr_benchmark.json"])
@pytest.mark.parametrize("kind", ["region", "none", "detection"])
def test_every_real_record_converts(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(VISCOT / name, tmp_path / "out.jsonl", "--kind", kind)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert re.match(f"wrote {len(records)} records .*, skipped 0, clipped 0 boxes", capsys.readouterr().out)
    assert len(records) == {"sroie_cot_train.jsonl": 2486, "vsr_cot_train.jsonl": 3376}.get(name, 404)
    for number, record in enumerate(records):
        assert parse_record(record, where=str(number), encoder_tokens={"dino": "detection"}).answer
        assert BOX_PROMPT not in record["messages"][0]["content"]
