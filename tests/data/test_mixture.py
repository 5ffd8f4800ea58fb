"""Which process sees which record when: all of them once an epoch, whatever the number of processes, and nothing more."""

import json
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt.data.balance import SampleCost
from vpt.data.chat_template import ChatTemplate
from vpt.data.images import MediaStore
from vpt.data.loader import StepDataset
from vpt.data.mixture import build_mixture
from vpt.data.processor import Processor
from vpt.data.sources.base import Source, SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.errors import DataError
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.perception.masking import Masking
from vpt.perception.tokens import PerceptionVocabulary


@pytest.fixture(scope="module")
def encoder() -> Processor:
    """For text alone."""
    tokenizer = tiny_tokenizer()
    vocabulary = PerceptionVocabulary.from_tokenizer(tokenizer, {}, region_bins=0)
    return Processor(ChatTemplate(tokenizer, vocabulary, {}, projector_scale=1), {})


def written(folder, name: str, count: int) -> RecordFile:
    """A file of records of very different lengths."""
    lines = [
        {"messages": [{"role": "user", "content": "why? " * (1 + number * 7 % 23)}, {"role": "assistant", "content": "so"}]}
        for number in range(count)
    ]  # fmt: skip
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RecordFile(SourceContext(folder, {}, {}, True, True, 0, 0), path=name)


class Part(Source):
    """The first records of a source, of which some are broken."""

    def __init__(self, whole: Source, count: int, broken: frozenset[int]) -> None:
        self.whole, self.count, self.broken = whole, count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index in self.broken:
            raise DataError(f"{self.whole[index].where}: broken")
        return self.whole[index]


@pytest.fixture(scope="module")
def files(tmp_path_factory, monkeypatch_module) -> list[RecordFile]:
    folder = tmp_path_factory.mktemp("records")
    monkeypatch_module.setenv("VPT_CACHE", str(folder))
    return [written(folder, f"{name}.jsonl", 30) for name in "abc"]


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), broken=st.frozensets(st.integers(0, 29), max_size=4),
    seed=st.integers(0, 99), batch=st.integers(1, 12), micro=st.integers(1, 5),
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)), data=st.data(),
)  # fmt: skip
def test_every_record_once_an_epoch_by_one_rank(encoder, files, lengths, broken, seed, batch, micro, ranks, data):
    """Also where another number of processes takes over in between, and where some records are left out."""
    sources = [Part(file, length, broken) for file, length in zip(files, lengths)]
    epochs, total = 2, sum(lengths)
    steps = -(-epochs * total // batch)
    change = data.draw(st.integers(0, steps))
    seen: list[str] = []
    for step in range(steps):
        size = ranks[step >= change]
        for rank in range(size):
            mine = StepDataset(
                build_mixture(sources, [1] * len(sources), seed, "exhaust"), [MediaStore(f.root) for f in files], encoder,
                Masking(), batch_size=batch, micro_batch_size=micro, steps=steps, rank=rank, ranks=size,
                cost=SampleCost(0.3, {}), on_error="skip",
            )[step]  # fmt: skip
            assert all(len(packed.rows) <= micro for packed in mine)
            seen += [
                name for packed in mine for name in (*packed.ids, *(s.removesuffix(": broken") for s in packed.skipped))
            ]
    whole = [source.whole[index].where for source in sources for index in range(len(source))]
    times = Counter(seen)
    assert set(times) == set(whole) and len(seen) == steps * batch
    assert all(
        epochs <= times[name] <= epochs + -(-batch // total) for name in whole
    )  # the last step begins a third epoch


def test_step_one_million_reads_its_records_alone(encoder, files, monkeypatch):
    """And nothing else of the file: one read for each row."""
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments[1]) or pread(*arguments))
    for by in ("weights", "exhaust"):
        mixture = build_mixture(files, [1] * len(files), 0, by)
        batches = StepDataset(mixture, [MediaStore(f.root) for f in files], encoder, Masking(), batch_size=64,
                              micro_batch_size=16, steps=2_000_000)  # fmt: skip
        reads.clear()
        packed = batches[1_000_000]
        assert len(reads) == 64 == sum(len(batch.rows) for batch in packed)
