"""The model of the paper's figure 2: look, walk with perception, predict."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vpt.batch import TOWER, Batch, Looks, Row
from vpt.encoders.base import ReEncoder
from vpt.inner_forward import StageCache, answer_where_asked, extend
from vpt.segments import InnerForward, MaskMode, Segment, cut
from vpt.stages import Perceived, Planner, Stage, Walk
from vpt.tokens import PerceptionVocabulary
from vpt.vision import Grid, see

if TYPE_CHECKING:
    from vpt.features import FeatureStore

LOGIT_CHUNK = 1024  # labelled positions whose logits exist at a time


@dataclass(frozen=True)
class InnerPasses:
    """How a conversation is walked.

    Attributes:
        inner_forward: `shared` runs every segment once; `full` runs whole passes, the reference.
        num_inner_forward_run: 2, or 1 for the alignment stage: no control states, nothing conditioned.
        projector_scale: control tokens of an action.
        mask_mode: what masking does to a masked row (`vpt.masking`).
        checkpointing: recompute decoder layers in the backward pass.
    """

    inner_forward: InnerForward = "shared"
    num_inner_forward_run: int = 2
    projector_scale: int = 1
    mask_mode: MaskMode = "zero"
    checkpointing: bool = False


@dataclass
class Output:
    """Predictions at labelled positions, in the order of the batch.

    Attributes:
        nll: [M] negative log-likelihood of each labelled token.
        hits: [M] whether the likeliest token is the label.
        targets: [M] the labels.
        at: [M] the position in the batch that each label is predicted from.
        states: [r, D] the control states, in the order in which they were read.
        logits: [M, vocabulary], if asked for.
        anchor: zero, but the gradient of every stage leads through it, where several processes train (`linked`).
    """

    nll: Tensor
    hits: Tensor
    targets: Tensor
    at: Tensor
    states: Tensor
    logits: Tensor | None = None
    anchor: Tensor | None = None

    @property
    def loss_sum(self) -> Tensor:
        """Sum over labelled tokens; divide by the count over the *global* batch, never take a mean of means."""
        return self.nll.sum() if self.anchor is None else self.nll.sum() + self.anchor


class VPTModel(nn.Module):
    """Qwen2-VL or Qwen2.5-VL with re-encoders.

    Given its parts; `vpt.build` makes them from a configuration.

    Attributes:
        store: keeps what frozen encoders see, if set.
        linked: set where processes reduce gradients layer by layer. Every stage then has a backward pass, needed or
            not, so that each process gathers and reduces the same layers in the same order.
    """

    linked = False

    def __init__(
        self, qwen: PreTrainedModel, encoders: dict[str, ReEncoder], *, vocabulary: PerceptionVocabulary,
        passes: InnerPasses,
    ) -> None:  # fmt: skip
        super().__init__()
        self.qwen: Any = qwen
        self.vocabulary, self.passes = vocabulary, passes
        self.encoders = nn.ModuleDict(encoders)
        self.store: FeatureStore | None = None
        answer_where_asked(self.language.layers[-1])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VPTModel":
        """The model in a folder, on the CPU; `vpt.load` returns its tokenizer and transforms as well."""
        from vpt.pretrained import load  # which builds models, and so cannot be imported from here at first

        return load(folder, device="cpu").model

    @property
    def language(self) -> Any:
        """transformers' text model."""
        return self.qwen.model.language_model

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.language.norm.weight.device

    def train(self, mode: bool = True) -> "VPTModel":
        """As any module, but frozen towers stay in evaluation mode: what they see of an image is always the same."""
        super().train(mode)
        towers = [self.qwen.model.visual, *(e.vision for e in map(self.encoder, self.encoders) if e.vision is not None)]
        for tower in towers:
            if not _is_trained(tower):
                tower.eval()
        return self

    def forward(self, batch: Batch, *, keep_logits: bool = False) -> Output:
        """The paper's figure: look at every image, walk the conversations with perception, predict."""
        tokens = self.project(self.look(batch.looks), batch)
        walk = self.plan(batch, batch.predicting)
        hidden, states = self.walk(batch, walk, tokens, StageCache())
        output = self.predict(batch, hidden[walk.hidden], states, keep_logits=keep_logits)
        if self.linked:
            output.anchor = 0.0 * (hidden[:, 0].sum() + self.logits(hidden[:1]).sum())
        return output

    def look(self, looks: dict[str, Looks]) -> dict[str, Tensor]:
        """Features of every image, once for each view: view -> [positions, feature_dim]."""
        return {view: images.with_known(self._see(view, images)) for view, images in sorted(looks.items())}

    def _see(self, view: str, images: Looks) -> Tensor | None:
        """Features of the images that are not known yet."""
        if not images.fresh:
            return None
        module = self.qwen.model.visual if view == TOWER else self._encoder_of(view).vision
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(module)):
            if view == TOWER:
                seen = self.see(images.pixels, images.grids)
            else:
                seen = self._encoder_of(view).features(images.pixels)
        if self.store is not None:
            self.store.keep(images, seen)
        return seen

    def see(self, pixels: Tensor, grids: list[Grid]) -> Tensor:
        """Image tokens through Qwen's own tower, [tokens, D]."""
        return see(self.qwen.model.visual, pixels, grids)

    def project(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Unconditioned tokens of every source that the batch refers to: source -> [tokens, D]."""
        sources = {block.source for row in batch.rows for block in row.blocks}
        return {
            source: features[TOWER]
            if source == TOWER
            else self.encoder(source).projector.project(features[self.view_of(source)])
            for source in sorted(sources)
        }

    def plan(self, batch: Batch, asked: np.ndarray | None = None) -> Walk:
        """Lay out the stages; `asked` are the positions whose hidden states are wanted, ascending, all by default."""
        sources = {block.source for row in batch.rows for block in row.blocks}
        offsets = {source: [0, *accumulate(batch.looks[self.view_of(source)].tokens)] for source in sources}
        segments = self.cut(batch.rows)
        return Planner(batch.rows, segments, offsets, asked=asked, device=batch.input_ids.device).walk()

    def cut(self, rows: list[Row]) -> list[list[Segment]]:
        """Cut each row into segments."""
        passes = self.passes
        return [
            cut(row, inner_forward=passes.inner_forward, passes=passes.num_inner_forward_run, mode=passes.mask_mode)
            for row in rows
        ]

    def walk(self, batch: Batch, walk: Walk, tokens: dict[str, Tensor], cache: StageCache) -> tuple[Tensor, Tensor]:
        """Extend, read the control states, perceive, extend, ...

        Returns:
            hidden states that the stages were asked for, [n, D]; control states in the order they were read, [r, D].
        """
        hidden: list[Tensor] = []
        states = batch.positions.new_zeros((0, self.language.config.hidden_size), dtype=torch.float32)
        for stage in walk.stages:
            embeddings = self.compose(batch.input_ids[stage.tokens], stage, tokens, states)
            if self.linked and torch.is_grad_enabled() and not embeddings.requires_grad:
                embeddings.requires_grad_()
            positions = batch.positions[:, stage.tokens]
            out = extend(
                self.language, cache.open_stage(), embeddings, positions, stage.layout,
                asked=stage.asked, checkpointing=self.passes.checkpointing,
            )  # fmt: skip
            states = torch.cat([states.to(out.dtype), out[stage.reads]])
            hidden.append(out)
        return torch.cat(hidden), states

    def compose(self, ids: Tensor, stage: Stage, tokens: dict[str, Tensor], states: Tensor) -> Tensor:
        """The embeddings of a stage: text, control states, what has been perceived, zeros where it is masked."""
        x = self.language.embed_tokens(ids)
        if len(stage.control_at):
            x = x.index_copy(0, stage.control_at, states[stage.control_state].to(x.dtype))
        for perceived in stage.perceived:
            x = x.index_copy(0, perceived.at, self.steer(perceived, tokens, states).to(x.dtype))
        if len(stage.zeroed):
            x = x.index_fill(0, stage.zeroed, 0.0)
        return x

    def steer(self, perceived: Perceived, tokens: dict[str, Tensor], states: Tensor) -> Tensor:
        """Tokens of a source, conditioned on their control states where they have any."""
        chosen = tokens[perceived.source][perceived.tokens]
        if perceived.states is None:
            return chosen
        projector = self.encoder(perceived.source).projector
        return projector(chosen, projector.direction(states[perceived.states])[perceived.block])

    def predict(self, batch: Batch, hidden: Tensor, states: Tensor, *, keep_logits: bool) -> Output:
        """Next-token predictions where there is a label, and only there: the vocabulary is 152 k wide.

        Args:
            batch: what was walked.
            hidden: [M, D] at the positions that predict a label.
            states: the control states.
            keep_logits: whether the logits are wanted too.
        """
        at = torch.from_numpy(batch.predicting).to(hidden.device, non_blocking=True)
        targets = batch.labels[at + 1]
        nll, hits, logits = [], [], []
        for part, target in zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True):
            if len(at) > LOGIT_CHUNK and not keep_logits and torch.is_grad_enabled():
                scores = checkpoint(self._score, part, target, use_reentrant=False)
            else:
                scores = self._score(part, target)
            nll.append(scores[0])
            hits.append(scores[1])
            if keep_logits:
                logits.append(self.logits(part))
        empty = hidden.new_zeros(0)
        return Output(
            nll=torch.cat(nll) if nll else empty,
            hits=torch.cat(hits) if hits else empty.bool(),
            targets=targets,
            at=at,
            states=states,
            logits=torch.cat(logits) if logits else None,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, vocabulary], in float32."""
        return self.qwen.lm_head(hidden).float()

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1) == targets

    def view_of(self, source: str) -> str:
        """The view through which a source looks."""
        return TOWER if source == TOWER else self.encoder(source).view.name

    def encoder(self, name: str) -> ReEncoder:
        """A re-encoder by its name."""
        return self.encoders[name]  # type: ignore[return-value]  # a ModuleDict knows modules only

    def _encoder_of(self, view: str) -> ReEncoder:
        return next(e for e in map(self.encoder, self.encoders) if e.view.name == view)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
