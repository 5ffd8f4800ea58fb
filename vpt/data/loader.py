"""From sample numbers to the batches of a step, in worker processes."""

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from vpt.data.balance import SampleCost, balance
from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.data.mixture import Mixture, SampleRef
from vpt.data.processor import OnError, Processor, Sample, encode_samples
from vpt.data.sources.base import Source
from vpt.errors import DataError, UserError
from vpt.perception.batch import Batch, Span
from vpt.perception.masking import Masking


@dataclass
class StepDataset(Dataset[list[Batch]]):
    """Item number k is training step k: what this process has of its global batch, as a list of micro-batches.

    A step is a function of its number alone, so resuming at step k reads nothing before it. One process takes rows in
    order; several take shares of equal cost, each of as many micro-batches, some of which may be empty.

    Attributes:
        mixture: which record comes when.
        media: where the images of each source lie.
        processor: makes samples of records.
        masking: which rows are masked, drawn per sample.
        batch_size: rows of a step, over all processes.
        micro_batch_size: rows that go through the model at once; never changes a result.
        rank, ranks: which process this is, of how many.
        cost: what a row weighs; needed where there are several processes.
        on_error: what becomes of a record that cannot be used: `raise` its DataError, or `skip` it, so that the batch
            is a row shorter and says why.
    """

    mixture: Mixture
    media: Sequence[MediaStore]
    processor: Processor
    masking: Masking
    batch_size: int
    micro_batch_size: int
    steps: int
    rank: int = 0
    ranks: int = 1
    cost: SampleCost | None = None
    on_error: OnError = "raise"

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch]:
        first = step * self.batch_size
        places = [self.mixture.sample_at(number) for number in range(first, first + self.batch_size)]
        return [self._micro_batch(share) for share in self._rank_share(places)]

    def _rank_share(self, places: list[SampleRef]) -> list[list[SampleRef]]:
        """The places of each of this process's micro-batches."""
        size = self.micro_batch_size
        if self.ranks == 1 or self.cost is None:
            return [places[start : start + size] for start in range(0, len(places), size)]
        costs = [self._cost(self.cost, place) for place in places]
        rounds = math.ceil(len(places) / (size * self.ranks))
        shares = balance(costs, bins=rounds * self.ranks, capacity=size)
        return [[places[index] for index in share] for share in shares[self.rank :: self.ranks]]

    def _cost(self, cost: SampleCost, place: SampleRef) -> float:
        try:
            record = self.mixture.sources[place.source].draft(place.index)
        except DataError:
            return 0.0  # the process that gets it says so
        return cost(record, masked=self.masking.mode == "zero" and self._masked(place))

    def _micro_batch(self, places: Sequence[SampleRef]) -> Batch:
        rows = [(self.mixture.sources[place.source], place.index, self.media[place.source]) for place in places]
        samples, errors = encode_samples(rows, self.processor, self.on_error)
        masked = [self._spans(place, sample) for place, sample in zip(places, samples, strict=True) if sample]
        return _packed(samples, masked, errors)

    def _spans(self, place: SampleRef, sample: Sample) -> tuple[Span, ...]:
        return self.masking.spans(sample.row) if self._masked(place) else ()

    def _masked(self, place: SampleRef) -> bool:
        key: tuple[int, ...] = (3, place.source, place.index, place.epoch)
        if self.masking.draw == "batch":
            key = (4, place.number // self.batch_size)
        return self.masking.selects(seed=self.mixture.seed, key=key, training=True)


def _packed(samples: Sequence[Sample | None], masked: Sequence[tuple[Span, ...]], errors: list[str]) -> Batch:
    used = [sample for sample in samples if sample]
    return replace(collate(used, masked=masked) if used else Batch.empty(), skipped=errors)


class _ErrorsAsItems(Dataset[list[Batch] | UserError]):
    """Hands a UserError over as an item: raised in a worker, its message would arrive inside a traceback."""

    def __init__(self, batches: StepDataset) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> list[Batch] | UserError:
        try:
            return self.batches[step]
        except UserError as error:
            return error


def build_dataloader(batches: StepDataset, *, start: int, workers: int, pin: bool) -> Iterator[list[Batch]]:
    """Steps `start`, `start + 1`, ... prepared ahead by worker processes."""
    loader = DataLoader(
        _ErrorsAsItems(batches),
        batch_size=None,
        sampler=range(start, batches.steps),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin,
        worker_init_fn=_worker_init,
        generator=torch.Generator(),  # its own, so that opening the loader moves no dropout
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _worker_init(_: int) -> None:
    """Leave signals to the run, which decides when to stop: Ctrl-C, `timeout` and systemd reach the whole group."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_told, args=(os.getppid(),), daemon=True).start()


def _exit_when_told(parent: int) -> None:
    """End a worker on its parent's SIGTERM, as torch ends workers, and on nobody else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def eval_batches(
    source: Source, media: MediaStore, processor: Processor, masking: Masking, *, rows: int, batch_size: int, seed: int,
    on_error: OnError = "raise", rank: int = 0, ranks: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """The first `rows` records of a source, teacher-forced; nothing is masked unless `draw: batch` asks for it.

    Of several processes each takes every so-many-th batch; all take equally many, so the last may be empty.
    """
    count = min(rows, len(source))
    for first in range(0, count, batch_size * ranks):
        start = first + rank * batch_size
        if start >= count:
            yield Batch.empty()
            continue
        records = [(source, index, media) for index in range(start, min(start + batch_size, count))]
        samples, errors = encode_samples(records, processor, on_error)
        drawn = masking.selects(seed=seed, key=(5, start), training=False)
        yield _packed(samples, [masking.spans(sample.row) if drawn else () for sample in samples if sample], errors)
