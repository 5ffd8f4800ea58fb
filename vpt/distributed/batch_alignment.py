"""What processes agree on before a step, so that everything collective in it matches.

Under sharding a layer's weights are gathered whenever it is called, by all processes at once. But how often a layer is
called depends on the rows: a batch with three actions has four stages, one without any has one; an encoder runs where
there is an image for it. So before a step every process says what its micro-batches ask of the model (one small
collective), and a process that asks for less than the others takes in a *dummy row*: one without labels that looks at
blank images and perceives as often as need be. Its gradients are zero, and the calls match.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from vpt.data.collate import stack_images
from vpt.data.transforms import ImageTransform
from vpt.distributed.process_group import World
from vpt.models.vpt import VPTModel
from vpt.perception.batch import Batch, RowBuilder

_BLANK = 64  # pixels along a side of the image that a stand-in looks at


@dataclass(frozen=True)
class GlobalCounts:
    """Sums over all processes for one step, and the exit code that one of them has been asked for (0: none)."""

    labels: int = 0
    rows: int = 0
    masked: int = 0
    tokens: int = 0
    skipped: int = 0
    stopping: int = 0

    @classmethod
    def of(cls, batches: Sequence[Batch], *, stopping: int) -> "GlobalCounts":
        """Those of one process."""
        return cls(
            labels=sum(batch.num_labels for batch in batches),
            rows=sum(len(batch.rows) for batch in batches),
            masked=sum(bool(row.masked) for batch in batches for row in batch.rows),
            tokens=sum(len(batch.input_ids) for batch in batches),
            skipped=sum(len(batch.skipped) for batch in batches),
            stopping=stopping,
        )

    def sums(self) -> list[int]:
        """What is added up."""
        return [self.labels, self.rows, self.masked, self.tokens, self.skipped]


@dataclass(frozen=True)
class ModuleCalls:
    """What a micro-batch asks of a model.

    Attributes:
        stages: how often the decoder runs.
        projected, steered: sources whose tokens are made, and made under control states.
        looked: views whose encoders have to run: some of their images are not known yet.
    """

    stages: int
    projected: frozenset[str]
    conditioned: frozenset[str]
    encoded: frozenset[str]

    @classmethod
    def of(cls, batch: Batch, model: VPTModel) -> "ModuleCalls":
        """Those of one process's micro-batch."""
        actions = [(row, action) for row in batch.rows for action in row.actions if action.block is not None]
        conditioned = model.forward_config.num_inner_forward_run == 2
        return cls(
            stages=max(map(len, model.split_segments(batch.rows)), default=0),
            projected=frozenset(block.source for row in batch.rows for block in row.blocks),
            conditioned=frozenset(row.blocks[action.block].source for row, action in actions if conditioned),  # type: ignore[index]
            encoded=frozenset(view for view, looks in batch.images.items() if looks.uncached),
        )

    def to_ints(self, names: Sequence[str]) -> list[int]:
        """Itself as integers; `words` are all sources and views that there can be."""
        return [self.stages, *(word in asked for asked in self._sets for word in names)]

    @property
    def _sets(self) -> tuple[frozenset[str], ...]:
        return self.projected, self.conditioned, self.encoded

    @classmethod
    def from_ints(cls, ints: Sequence[int], names: Sequence[str]) -> "ModuleCalls":
        """The inverse of `numbers`."""
        stages, *flags = ints
        parts = [flags[start : start + len(names)] for start in range(0, len(flags), len(names))]
        return cls(stages, *(frozenset(word for word, flag in zip(names, part) if flag) for part in parts))


class BatchAligner:
    """Makes the micro-batches of all processes ask the same of the model."""

    def __init__(self, world: World, model: VPTModel, views: Mapping[str, ImageTransform]) -> None:
        """`views`: source -> the view it looks through (`Processor.views`)."""
        self.world, self.model, self.transforms = world, model, views
        self._names = sorted({*views, *(view.name for view in views.values())})
        self._dummies: dict[ModuleCalls, Batch] = {}

    def align(self, batches: Sequence[Batch], *, stopping: int = 0) -> tuple[list[Batch], GlobalCounts]:
        """Complete this process's micro-batches, of which all processes have equally many; and the sums over all.

        One collective, on the CPU.
        """
        mine = GlobalCounts.of(batches, stopping=stopping)
        if self.world.size == 1:
            return [batch for batch in batches if batch.rows], mine
        needs = [ModuleCalls.of(batch, self.model) for batch in batches]
        sums = mine.sums()
        everyone = self.world.all_gather([*sums, stopping, *(n for need in needs for n in need.to_ints(self._names))])
        labels, rows, masked, tokens, skipped = everyone[:, : len(sums)].sum(dim=0).tolist()
        asked = everyone[:, len(sums) + 1 :].view(self.world.size, len(batches), -1)  # [processes, batches, needs]
        most, least = asked.amax(dim=0), asked.amin(dim=0)
        completed = [
            batch if bool((most[number] == least[number]).all()) else self._complete(batch, need, most[number].tolist())
            for number, (batch, need) in enumerate(zip(batches, needs, strict=True))
            if bool(most[number].any())  # not so where all records of all processes have been skipped
        ]
        return completed, GlobalCounts(labels, rows, masked, tokens, skipped, int(everyone[:, len(sums)].max()))

    def _complete(self, batch: Batch, own: ModuleCalls, most: list[int]) -> Batch:
        """The batch, with a dummy row unless it asks for all that a dummy row asks for."""
        agreed = ModuleCalls.from_ints(most, self._names)
        if agreed not in self._dummies:
            self._dummies[agreed] = self._dummy_batch(agreed)
        dummy = self._dummies[agreed]
        return batch if own == ModuleCalls.of(dummy, self.model) else self._append(batch, dummy)

    def _append(self, batch: Batch, dummy: Batch) -> Batch:
        """The batch with the dummy row at its end, and its images after the batch's own."""
        looks = dict(batch.images)
        for view, look in dummy.images.items():
            looks[view] = looks[view].concat(look) if view in looks else look
        [row] = dummy.rows
        blocks = tuple(replace(b, image=len(looks[self.transforms[b.source].name].tokens) - 1) for b in row.blocks)
        return replace(
            batch,
            input_ids=torch.cat([batch.input_ids, dummy.input_ids]),
            labels=torch.cat([batch.labels, dummy.labels]),
            positions=torch.cat([batch.positions, dummy.positions], dim=1),
            rows=[*batch.rows, replace(row, start=len(batch.input_ids), blocks=blocks)],
            images=looks,
        )

    def _dummy_batch(self, needs: ModuleCalls) -> Batch:
        """One row that asks for all of `needs`: blocks without a control state first, then action after action."""
        looks = {source: self.transforms[source](Image.new("RGB", (_BLANK, _BLANK))) for source in needs.projected}
        row, scale = RowBuilder(), self.model.forward_config.projector_scale
        row.text(1)
        for source in sorted(needs.projected - needs.conditioned):
            row.image(source, looks[source].tokens)
        for source in sorted(needs.conditioned):
            row.action(source, scale)
            row.image(source, looks[source].tokens)
        while len(self.model.split_segments([row.build()])[0]) < needs.stages:
            row.action("", scale)
        views = {self.transforms[source].name: looks[source] for source in sorted(needs.projected)}
        return Batch(
            input_ids=torch.tensor(row.ids),
            labels=torch.tensor(row.labels),
            positions=torch.arange(len(row.ids)).expand(3, -1),
            rows=[row.build(dummy=True)],
            images={name: stack_images(name, [look]) for name, look in views.items()},
        ).to(self.model.device)
