"""What processes agree on before a step, so that everything collective in it matches.

Under sharding a layer's weights are gathered whenever it is called, by all processes at once. But how often a layer is
called depends on the rows: a batch with three actions has four stages, one without any has one; an encoder runs where
there is an image for it. So before a step every process says what its micro-batches ask of the model (one small
collective), and a process that asks for less than the others takes in a *stand-in*: a row without labels that looks at
blank images and perceives as often as need be. Its gradients are zero, and the calls match.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from vpt.batch import IGNORE, Action, Batch, Block, Row
from vpt.data.packing import stack
from vpt.encoders.base import View
from vpt.model import VPTModel
from vpt.world import World

_BLANK = 64  # pixels along a side of the image that a stand-in looks at


@dataclass(frozen=True)
class Totals:
    """Sums over all processes for one step, and the exit code that one of them has been asked for (0: none)."""

    labels: int = 0
    rows: int = 0
    masked: int = 0
    tokens: int = 0
    skipped: int = 0
    stopping: int = 0

    @classmethod
    def of(cls, batches: Sequence[Batch], *, stopping: int) -> "Totals":
        """Those of one process."""
        return cls(
            labels=sum(batch.label_count for batch in batches),
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
class Needs:
    """What a micro-batch asks of a model.

    Attributes:
        stages: how often the decoder runs.
        projected, steered: sources whose tokens are made, and made under control states.
        looked: views whose encoders have to run: some of their images are not known yet.
    """

    stages: int
    projected: frozenset[str]
    steered: frozenset[str]
    looked: frozenset[str]

    @classmethod
    def of(cls, batch: Batch, model: VPTModel) -> "Needs":
        """Those of one process's micro-batch."""
        actions = [(row, action) for row in batch.rows for action in row.actions if action.block is not None]
        conditioned = model.passes.num_inner_forward_run == 2
        return cls(
            stages=max(map(len, model.cut(batch.rows)), default=0),
            projected=frozenset(block.source for row in batch.rows for block in row.blocks),
            steered=frozenset(row.blocks[action.block].source for row, action in actions if conditioned),  # type: ignore[index]
            looked=frozenset(view for view, looks in batch.looks.items() if looks.fresh),
        )

    def numbers(self, words: Sequence[str]) -> list[int]:
        """Itself as integers; `words` are all sources and views that there can be."""
        return [self.stages, *(word in asked for asked in self._sets for word in words)]

    @property
    def _sets(self) -> tuple[frozenset[str], ...]:
        return self.projected, self.steered, self.looked

    @classmethod
    def read(cls, numbers: Sequence[int], words: Sequence[str]) -> "Needs":
        """The inverse of `numbers`."""
        stages, *flags = numbers
        parts = [flags[start : start + len(words)] for start in range(0, len(flags), len(words))]
        return cls(stages, *(frozenset(word for word, flag in zip(words, part) if flag) for part in parts))


class Accord:
    """Makes the micro-batches of all processes ask the same of the model."""

    def __init__(self, world: World, model: VPTModel, views: Mapping[str, View]) -> None:
        """`views`: source -> the view it looks through (`SampleEncoder.views`)."""
        self.world, self.model, self.views = world, model, views
        self._words = sorted({*views, *(view.name for view in views.values())})
        self._stand_ins: dict[Needs, Batch] = {}

    def meet(self, batches: Sequence[Batch], *, stopping: int = 0) -> tuple[list[Batch], Totals]:
        """Complete this process's micro-batches, of which all processes have equally many; and the sums over all.

        One collective, on the CPU.
        """
        mine = Totals.of(batches, stopping=stopping)
        if self.world.size == 1:
            return [batch for batch in batches if batch.rows], mine
        needs = [Needs.of(batch, self.model) for batch in batches]
        sums = mine.sums()
        everyone = self.world.gather([*sums, stopping, *(n for need in needs for n in need.numbers(self._words))])
        labels, rows, masked, tokens, skipped = everyone[:, : len(sums)].sum(dim=0).tolist()
        asked = everyone[:, len(sums) + 1 :].view(self.world.size, len(batches), -1)  # [processes, batches, needs]
        most, least = asked.amax(dim=0), asked.amin(dim=0)
        completed = [
            batch if bool((most[number] == least[number]).all()) else self._complete(batch, need, most[number].tolist())
            for number, (batch, need) in enumerate(zip(batches, needs, strict=True))
            if bool(most[number].any())  # not so where all records of all processes have been skipped
        ]
        return completed, Totals(labels, rows, masked, tokens, skipped, int(everyone[:, len(sums)].max()))

    def _complete(self, batch: Batch, own: Needs, most: list[int]) -> Batch:
        """The batch, with a stand-in unless it asks for all that a stand-in asks for."""
        agreed = Needs.read(most, self._words)
        if agreed not in self._stand_ins:
            self._stand_ins[agreed] = self._stand_in(agreed)
        stand_in = self._stand_ins[agreed]
        return batch if own == Needs.of(stand_in, self.model) else self._joined(batch, stand_in)

    def _joined(self, batch: Batch, stand_in: Batch) -> Batch:
        """The batch with the stand-in's row at its end, and its images after the batch's own."""
        looks = dict(batch.looks)
        for view, look in stand_in.looks.items():
            looks[view] = looks[view].joined(look) if view in looks else look
        [row] = stand_in.rows
        blocks = tuple(replace(b, look=len(looks[self.views[b.source].name].tokens) - 1) for b in row.blocks)
        return replace(
            batch,
            input_ids=torch.cat([batch.input_ids, stand_in.input_ids]),
            labels=torch.cat([batch.labels, stand_in.labels]),
            positions=torch.cat([batch.positions, stand_in.positions], dim=1),
            rows=[*batch.rows, replace(row, start=len(batch.input_ids), blocks=blocks)],
            looks=looks,
        )

    def _stand_in(self, needs: Needs) -> Batch:
        """One row that asks for all of `needs`: blocks without a control state first, then action after action."""
        looks = {source: self.views[source].prepare(Image.new("RGB", (_BLANK, _BLANK))) for source in needs.projected}
        blocks: list[Block] = []
        actions: list[Action] = []
        length = 1

        def see(source: str) -> None:
            nonlocal length
            blocks.append(Block(length, looks[source].tokens, source, 0))
            length += looks[source].tokens

        def act(source: str | None) -> None:
            nonlocal length
            scale = self.model.passes.projector_scale
            actions.append(Action(length, scale, source or "", len(blocks) if source else None))
            length += scale
            if source:
                see(source)

        for source in sorted(needs.projected - needs.steered):
            see(source)
        for source in sorted(needs.steered):
            act(source)
        while len(self.model.cut([Row(length, tuple(blocks), tuple(actions))])[0]) < needs.stages:
            act(None)
        views = {self.views[source].name: looks[source] for source in sorted(needs.projected)}
        return Batch(
            input_ids=torch.zeros(length, dtype=torch.int64),
            labels=torch.full((length,), IGNORE),
            positions=torch.arange(length).expand(3, -1),
            rows=[Row(length, tuple(blocks), tuple(actions))],
            looks={name: stack(name, [look]) for name, look in views.items()},
        ).to(self.model.device)
