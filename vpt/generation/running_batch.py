"""Rows that decode together, one input of each a step; rows may join and leave between two steps."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vpt.data.positions import PositionScheme
from vpt.generation.decode_step import RowInput, VisualInput, pack_inputs
from vpt.generation.kv_cache import KVCache
from vpt.generation.row_state import RowState
from vpt.models.image_tokens import image_tokens
from vpt.models.inner_forward import extend
from vpt.models.vpt import VPTModel
from vpt.perception.mrope import row_positions


class RunningBatch:
    """Rows and what is cached of each, in the same order. It knows no settings: rows may differ in them."""

    def __init__(self, model: VPTModel, scheme: PositionScheme, rows: Sequence[RowState], cache: KVCache) -> None:
        self.model, self.scheme, self.rows, self.cache = model, scheme, list(rows), cache

    def select(self, kept: Iterable[bool]) -> bool:
        """Go on with some of the rows only; returns whether there are any."""
        numbers = [number for number, keep in enumerate(kept) if keep]
        if len(numbers) < len(self.rows):
            self.cache.select_rows(numbers)
            self.rows = [self.rows[number] for number in numbers]
        return bool(numbers)

    def join(self, rows: Sequence[RowState]) -> None:
        """Add rows of which nothing is cached: their next inputs are their prompts, or parts of them."""
        self.cache.add_rows(len(rows))
        self.rows.extend(rows)

    def step(self) -> list[Tensor]:
        """Run the next input of every row, and return the hidden states of each that are wanted, [n, D]."""
        inputs = [row.next_input for row in self.rows if row.next_input is not None]
        counts = [len(row_input.ids) for row_input in inputs]
        norm = self.model.language.norm.weight
        packed = pack_inputs(inputs, self.cache.lengths, device=self.model.device, like=norm)
        visual_tokens = self._encode_visual_inputs(packed.visuals)
        embeddings, deep = self.model.embed_inputs(packed.ids, packed.stage, visual_tokens, packed.states)
        positions = torch.cat([self._positions(*pair) for pair in zip(self.rows, inputs, strict=True)], dim=1)
        self.cache.reserve(counts)
        hidden = extend(
            self.model.language, self.cache, embeddings, positions.to(norm.device), packed.stage.layout, deep=deep,
            logits_to_keep=packed.stage.logits_to_keep,
        )  # fmt: skip
        self.cache.commit([count if row_input.keep else 0 for count, row_input in zip(counts, inputs, strict=True)])
        return list(hidden.split([row_input.num_outputs for row_input in inputs]))

    def _encode_visual_inputs(self, visuals: dict[str, list[VisualInput]]) -> dict[str, Tensor]:
        """Projected tokens of the images that rows see in this step: source -> [tokens, D]."""
        tokens = {}
        for source, inputs in visuals.items():
            images = [visual.image for visual in inputs]
            parts = image_tokens(self.model, source, images).split([image.tokens for image in images])
            tokens[source] = torch.cat([visual.alter(part) for part, visual in zip(parts, inputs, strict=True)])
        return tokens

    def _positions(self, row: RowState, row_input: RowInput) -> Tensor:
        """M-RoPE positions of a row's next input, [3, n], continuing those before."""
        if row_input.positions is not None:
            return row_input.positions
        grids = [self.scheme.grid_span(visual.span, visual.image) for visual in row_input.visuals]
        positions = row_positions(len(row_input.ids), [grid for grid in grids if grid], origin=row.position)
        if row_input.keep:
            row.position = int(positions[0, -1]) + 1
            row.add_input(row_input)
        return positions
