"""Files of records of any size."""

import json
import pickle
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from vpt.data import record_store
from vpt.data.record_store import RecordStore
from vpt.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))


RECORDS = st.lists(
    st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.lists(st.text()), st.none())),
    min_size=1,
    max_size=8,
)


@given(records=RECORDS, chunk=st.integers(1, 40), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_record_comes_back(tmp_path, records, chunk, ascii_only, indent, monkeypatch):
    """Whatever the records hold and wherever a chunk ends, from a list or from lines."""
    monkeypatch.setattr(record_store, "CHUNK", chunk)
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / str(abs(hash((json.dumps(records), chunk, ascii_only, indent))))))
    listed, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    listed.write_text(
        json.dumps(records, ensure_ascii=ascii_only, indent=indent), encoding="utf-8", errors="surrogatepass"
    )
    lines.write_text("\n\n".join(json.dumps(record) for record in records))
    assert [record for _, record in RecordStore(listed)] == records
    read = RecordStore(lines)
    assert [record for _, record in read] == records
    assert [where for where, _ in read] == [f"{lines}:{2 * i + 1}" for i in range(len(records))]


def test_the_second_start_reads_the_index_alone(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"n": i} for i in range(50)]))
    RecordStore(file)
    monkeypatch.setattr(record_store, "_spans_of_list", lambda path: pytest.fail("indexed again"))
    again = RecordStore(file)
    assert again[49] == (f"{file}: record 49", {"n": 49})
    assert pickle.loads(pickle.dumps(again))[7][1] == {"n": 7}  # as a spawned worker gets it


def test_a_changed_file_is_indexed_anew(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n')
    assert len(RecordStore(file)) == 1
    file.write_text('{"n": 1}\n{"n": 2}\n')
    assert [record["n"] for _, record in RecordStore(file)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b"\n \n", "holds no records"),
        ("a.json", b"[]", "holds no records"),
        ("a.json", b'{"a": 1}', "must hold a list of records"),
        ("a.json", b'[{"a": 1}, {"a": ', r"not valid JSON near byte 1[01]"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "expected ',' or ']'"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.json", b'[{"a": 1},', "not valid JSON near byte"),
        ("a.json", b"", "must hold a list"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}, {"a": 3}]', r"after the list of records comes '\[\{\"a\": 2"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}\n', r"comes '\{\"a\": 2.*into a file named \.jsonl"),
        ("a.json", b'[{"a": 1}] or so', "comes 'or so'"),
        ("a.json", '[{"a": 1}] größer'.encode(), "comes 'größer'"),
        ("a.json", b'[{"a": 1}]' + b"x" * 10_000, r"comes 'x{150,200}…x+'"),
        ("a.json", b"[" + b'{"a": 1}]' * 2, "comes"),
        ("a.jsonl", b'{"a": 1} {"a": 2}\n', r"a\.jsonl:1: not valid JSON: Extra data"),
    ],
)
def test_broken_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        RecordStore(tmp_path / name)
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 1 << 24])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_passed_over(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(record_store, "CHUNK", chunk)
    text = '[{"a": "é"}]\n' if name == "a.json" else '{"a": "é"}\n'
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert [record for _, record in RecordStore(tmp_path / name)] == [{"a": "é"}]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("when", datetime(2020, 1, 1), "`when` holds datetime.*write it as text, or drop the column"),
        ("day", date(2020, 1, 1), "`day` holds date"),
        ("price", Decimal("1.5"), "`price` holds Decimal"),
    ],
)
def test_parquet_that_is_no_json(tmp_path, column, value, message):
    rows = [{"messages": [], column: None}, {"messages": [], column: value}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: record 1: column {message}"):
        RecordStore(tmp_path / "a.parquet")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        RecordStore(tmp_path / "a.parquet")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_parquet(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"é {i}"}], "images": [f"{i}.png"]} for i in range(30)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    read = RecordStore(tmp_path / "a.parquet")
    assert [record for _, record in read] == records
    assert read[29][0].endswith("a.parquet: record 29")


def test_missing(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        RecordStore(Path(tmp_path / "no.json"))
