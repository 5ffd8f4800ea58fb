"""Micro-batches that ask the same of the model on every process, so that everything collective in a step matches.

Under sharding a layer's weights are gathered whenever it is called, by all processes at once. But how often a layer is
called depends on the rows: a batch with three actions has four stages, one without any has one; an encoder runs where
there is an image for it. So before a step every process tells the others which modules its micro-batches call (one
small collective), and a process that calls fewer of them gets a *dummy row*: it has no labels, blank images, and
as many actions as need be. Its gradients are zero, and the calls match.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import compress

import torch
from PIL import Image
from torch import Tensor

from vpt.data.collate import stack_images
from vpt.data.transforms import ImageTransform
from vpt.distributed.process_group import World
from vpt.models.vpt import VPTModel
from vpt.perception.batch import Batch, RowBuilder
from vpt.perception.segments import by_stage

KINDS = ("project", "condition", "encode")
_BLANK = 64  # pixels along a side of the image of a dummy row


@dataclass(frozen=True)
class GlobalCounts:
    """Sums over all processes for one step; the exit code is the largest that one has been asked for, 0 for none."""

    labels: int = 0
    rows: int = 0
    masked: int = 0
    tokens: int = 0
    skipped: int = 0
    rollouts: int = 0
    exit_code: int = 0

    @classmethod
    def of(cls, batches: Sequence[Batch], *, exit_code: int) -> "GlobalCounts":
        """Counts of this process's micro-batches."""
        return cls(
            labels=sum(batch.num_labels for batch in batches),
            rows=sum(len(batch.rows) for batch in batches),
            masked=sum(bool(row.masked) for batch in batches for row in batch.rows),
            tokens=sum(len(batch.input_ids) for batch in batches),
            skipped=sum(len(batch.skipped) for batch in batches),
            rollouts=sum(len(batch.rollouts.advantages) for batch in batches if batch.rollouts),
            exit_code=exit_code,
        )

    @classmethod
    def reduce(cls, counts: Tensor) -> "GlobalCounts":
        """The counts of all processes together, from [processes, fields]."""
        return replace(cls(*counts.sum(dim=0).tolist()), exit_code=int(counts[:, -1].max()))


@dataclass(frozen=True)
class ModuleCalls:
    """Modules of a model that a micro-batch calls.

    Attributes:
        stages: how often the decoder runs.
        modules: (kind, name) of all others, by `KINDS`: sources whose tokens are projected, and projected under
            control states; transforms whose encoders run, as some of their images are not in the feature cache.
    """

    stages: int
    modules: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, batch: Batch, model: VPTModel) -> "ModuleCalls":
        """Module calls that this process's micro-batch makes."""
        called = {("project", block.source) for row in batch.rows for block in row.blocks}
        called |= {("encode", name) for name, images in batch.images.items() if images.uncached}
        if model.forward_config.num_inner_forward_run == 2:
            actions = [(row, a.block) for row in batch.rows for a in row.actions if a.block is not None]
            called |= {("condition", row.blocks[block].source) for row, block in actions}
        stages = map(by_stage, batch.rows, model.split_segments(batch.rows))
        return cls(max(map(len, stages), default=0), frozenset(called))

    def names(self, kind: str) -> list[str]:
        """The sources or transforms of one kind of call."""
        return sorted(name for called, name in self.modules if called == kind)


class BatchAligner:
    """Gives the micro-batches of all processes the same module calls, by dummy rows."""

    def __init__(self, world: World, model: VPTModel, transforms: Mapping[str, ImageTransform]) -> None:
        """`transforms` are those of the processor, by source."""
        self.world, self.model, self.transforms = world, model, transforms
        names = sorted({*transforms, *(transform.name for transform in transforms.values())})
        self._modules = [(kind, name) for kind in KINDS for name in names]  # all that a batch may call
        self._dummies: dict[ModuleCalls, Batch] = {}

    def align(self, batches: Sequence[Batch], *, exit_code: int = 0) -> tuple[list[Batch], GlobalCounts]:
        """This process's micro-batches, with dummy rows where others call more of the model, and counts over all.

        All processes have equally many micro-batches. One collective, on the CPU.
        """
        own_counts = GlobalCounts.of(batches, exit_code=exit_code)
        if self.world.size == 1:
            return [batch for batch in batches if batch.rows], own_counts
        own_calls = [ModuleCalls.of(batch, self.model) for batch in batches]
        flags = [n for calls in own_calls for n in (calls.stages, *(key in calls.modules for key in self._modules))]
        sent = [*astuple(own_counts), *flags]
        counts, calls = self.world.all_gather(sent).split([len(sent) - len(flags), len(flags)], dim=1)
        calls = calls.view(self.world.size, len(batches), -1)  # [processes, batches, stages and a flag for each module]
        most, least = calls.amax(dim=0), calls.amin(dim=0)
        completed = [
            batch if bool((most[number] == least[number]).all()) else self._complete(batch, own, most[number].tolist())
            for number, (batch, own) in enumerate(zip(batches, own_calls, strict=True))
            if bool(most[number].any())  # not so where all records of all processes have been skipped
        ]
        return completed, GlobalCounts.reduce(counts)

    def _complete(self, batch: Batch, own: ModuleCalls, most: list[int]) -> Batch:
        """The batch, with a dummy row unless it makes all the calls of one."""
        needed = ModuleCalls(most[0], frozenset(compress(self._modules, most[1:])))
        if needed not in self._dummies:
            self._dummies[needed] = self._dummy_batch(needed)
        dummy = self._dummies[needed]
        return batch if own == ModuleCalls.of(dummy, self.model) else self._append(batch, dummy)

    def _append(self, batch: Batch, dummy: Batch) -> Batch:
        """The batch with the dummy row at its end, and its images after the batch's own."""
        images = dict(batch.images)
        for transform, added in dummy.images.items():
            images[transform] = images[transform].concat(added) if transform in images else added
        [row] = dummy.rows
        blocks = tuple(replace(b, image=len(images[self.transforms[b.source].name].tokens) - 1) for b in row.blocks)
        return replace(
            batch,
            input_ids=torch.cat([batch.input_ids, dummy.input_ids]),
            labels=torch.cat([batch.labels, dummy.labels]),
            positions=torch.cat([batch.positions, dummy.positions], dim=1),
            rows=[*batch.rows, replace(row, start=len(batch.input_ids), blocks=blocks)],
            images=images,
        )

    def _dummy_batch(self, needs: ModuleCalls) -> Batch:
        """One row that asks for all of `needs`: blocks without a control state first, then action after action."""
        projected, conditioned = needs.names("project"), needs.names("condition")
        shown = {source: self.transforms[source](Image.new("RGB", (_BLANK, _BLANK))) for source in projected}
        row, scale = RowBuilder(), self.model.forward_config.projector_scale
        row.add([0])
        for source in sorted(projected, key=lambda source: (source in conditioned, source)):
            if source in conditioned:
                row.action(source, scale)
            row.image(source, shown[source].tokens)
        while len(self.model.split_segments([row.build()])[0]) < needs.stages:
            row.action("", scale)
        images = {self.transforms[source].name: image for source, image in shown.items()}
        return Batch(
            torch.tensor(row.ids), torch.tensor(row.labels), torch.arange(len(row.ids)).expand(3, -1),
            [row.build(dummy=True)], {name: stack_images(name, [image]) for name, image in images.items()},
        ).to(self.model.device)  # fmt: skip
