"""The model of the paper's figure 2: encode images, run stages with perception in between, predict."""

from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vpt.data.feature_cache import FeatureCache
from vpt.encoders.base import ReEncoder
from vpt.errors import ConfigError
from vpt.models.families import family_of
from vpt.models.forward_plan import ForwardPlan, ForwardPlanner
from vpt.models.inner_forward import DeepFeatures, InnerForwardConfig, LastDecoderLayer, StagedKVCache, extend
from vpt.models.output import Output, compute_outputs
from vpt.models.stage import Stage, VisualInsert
from vpt.models.vision_tower import VisionTower
from vpt.perception.batch import VISION_TOWER, Batch, ImageInputs, Row
from vpt.perception.segments import Segment, split_segments
from vpt.perception.tokens import PerceptionVocabulary


class VPTModel(nn.Module):
    """A base model with re-encoders.

    Given its parts; `vpt.models.build` makes them from a configuration.

    Attributes:
        qwen: transformers' model; its tower and its last decoder layer become ours, with the same weights and names.
        family: of the base model.
        forward_config: how conversations are run; may be replaced at any time.
        feature_cache: keeps the features of frozen encoders where it is not None; may be replaced at any time.
    """

    def __init__(
        self, qwen: PreTrainedModel, encoders: dict[str, ReEncoder], *, vocabulary: PerceptionVocabulary,
        forward_config: InnerForwardConfig,
    ) -> None:  # fmt: skip
        super().__init__()
        self.qwen: Any = qwen
        self.family = family_of(qwen.config.model_type)
        self.vocabulary, self.forward_config = vocabulary, forward_config
        self.feature_cache: FeatureCache | None = None
        self.encoders = nn.ModuleDict(encoders)
        self.qwen.model.visual = VisionTower(self.tower, self.family)
        if len(self.family.deep_mergers(self.tower)) >= len(self.language.layers):
            raise ConfigError("deepstack_visual_indexes has as many entries as the model has layers, or more")
        self.language.layers[-1] = LastDecoderLayer(self.language.layers[-1])

    @property
    def language(self) -> Any:
        """transformers' text model."""
        return self.qwen.model.language_model

    @property
    def tower(self) -> Any:
        """Qwen's visual tower."""
        return self.qwen.model.visual

    @property
    def device(self) -> torch.device:
        """The device that it computes on: that of buffers, since weights may wait on the CPU."""
        return self.language.rotary_emb.inv_freq.device

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast where matrices are stored as bfloat16 beside a wider stream (`model.frozen_dtype`), as in
        training; what is around it elsewhere."""
        matrix, stream = self.language.layers[0].self_attn.q_proj.weight.dtype, self.language.norm.weight.dtype
        mixed = matrix == torch.bfloat16 != stream
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def train(self, mode: bool = True) -> "VPTModel":
        """As any module, but frozen towers stay in evaluation mode: their features of an image are always the same."""
        super().train(mode)
        for tower in (self.tower, *self.visions.values()):
            if not is_trained(tower):
                tower.eval()
        return self

    def forward(self, batch: Batch, *, keep_logits: bool = False, uniform_backward: bool = False) -> Output:
        """The paper's figure 2: encode every image, run the stages with perception in between, predict the labels.

        Args:
            keep_logits: return the logits too.
            uniform_backward: where processes reduce gradients layer by layer. Every stage then has a backward pass,
                needed or not, so that each process gathers and reduces the same layers in the same order.
        """
        tokens = self.project_features(self.encode_images(batch.images), batch)
        plan = self.plan_forward(batch, batch.loss_positions)
        hidden, states = self.run_stages(batch, plan, tokens, StagedKVCache(), uniform_backward=uniform_backward)
        output = compute_outputs(self.logits, batch, hidden[plan.output_index], states, keep_logits=keep_logits)
        if uniform_backward:
            output.grad_anchor = 0.0 * (hidden[:, 0].sum() + self.logits(hidden[:1]).sum())
        return output

    def encode_images(self, images: dict[str, ImageInputs]) -> dict[str, Tensor]:
        """Features of every image, once for each transform: transform -> [positions, feature_dim]."""
        return {name: own.merge_cached(self._encode_uncached(name, own)) for name, own in sorted(images.items())}

    def _encode_uncached(self, transform: str, images: ImageInputs) -> Tensor | None:
        """Features of the images that are not cached, written to the feature cache."""
        if not images.uncached:
            return None
        encoder = None if transform == VISION_TOWER else self._encoder_with(transform)
        trained = is_trained(self.tower if encoder is None else encoder.vision)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            if encoder is None:
                features = self.tower(images.pixels, images.grids)
            else:
                features = encoder.forward_features(images.pixels.to(next(encoder.vision.parameters()).dtype))
        if self.feature_cache is not None:
            self.feature_cache.put(images, features)
        return features

    def project_features(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Unconditioned tokens of every source that the batch refers to: source -> [tokens, D]."""
        sources = {block.source for row in batch.rows for block in row.blocks}
        return {
            source: features[VISION_TOWER]
            if source == VISION_TOWER
            else self.encoder(source).projector.project(features[self.transform_of(source)])
            for source in sorted(sources)
        }

    def plan_forward(self, batch: Batch, logits_to_keep: np.ndarray | None = None) -> ForwardPlan:
        """Lay out the stages; hidden states are wanted at `logits_to_keep`, ascending positions, all by default."""
        sources = {block.source for row in batch.rows for block in row.blocks}
        offsets = {source: [0, *accumulate(batch.images[self.transform_of(source)].tokens)] for source in sources}
        segments = self.split_segments(batch.rows)
        return ForwardPlanner(
            batch.rows, segments, offsets, logits_to_keep=logits_to_keep, device=batch.input_ids.device
        ).plan()

    def split_segments(self, rows: list[Row]) -> list[list[Segment]]:
        """Cut each row into segments."""
        passes = self.forward_config
        return [
            split_segments(
                row, inner_forward=passes.inner_forward, passes=passes.num_inner_forward_run, mode=passes.mask_mode
            )
            for row in rows
        ]

    def run_stages(
        self, batch: Batch, plan: ForwardPlan, tokens: dict[str, Tensor], cache: StagedKVCache, *,
        uniform_backward: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Extend, read the control states, perceive, extend, ...

        Returns:
            hidden states that the stages return, [n, D]; control states in the order they were read, [r, D].
        """
        hidden: list[Tensor] = []
        states = batch.positions.new_zeros((0, self.language.config.hidden_size), dtype=torch.float32)
        for stage in plan.stages:
            embeddings, deep = self.embed_inputs(batch.input_ids[stage.tokens], stage, tokens, states)
            if uniform_backward and torch.is_grad_enabled() and not embeddings.requires_grad:
                embeddings.requires_grad_()
            positions = batch.positions[:, stage.tokens]
            out = extend(
                self.language, cache.new_stage(), embeddings, positions, stage.layout, deep=deep,
                logits_to_keep=stage.logits_to_keep, checkpointing=self.forward_config.checkpointing,
            )  # fmt: skip
            states = torch.cat([states.to(out.dtype), out[stage.control_outputs]])
            hidden.append(out)
        return torch.cat(hidden), states

    def embed_inputs(
        self, ids: Tensor, stage: Stage, tokens: dict[str, Tensor], states: Tensor
    ) -> tuple[Tensor, DeepFeatures | None]:
        """The embeddings of a stage: text, control states, visual tokens, zeros where it is masked.

        Tokens of a source, and states, may be [T, (1 + k) D]: an embedding and k deep features, masked as it is.
        """
        x = self.language.embed_tokens(ids)
        deep: list[tuple[Tensor, Tensor]] = []

        def fill(positions: Tensor, filled: Tensor) -> None:
            nonlocal x
            x = x.index_copy(0, positions, filled[:, : x.shape[1]].to(x.dtype))
            if filled.shape[1] > x.shape[1]:
                deep.append((positions, filled[:, x.shape[1] :].to(x.dtype)))

        if len(stage.control_positions):
            fill(stage.control_positions, states[stage.control_sources])
        for insert in stage.inserts:
            fill(insert.positions, self.condition(insert, tokens, states[:, : x.shape[1]]))
        if len(stage.zeroed):
            x = x.index_fill(0, stage.zeroed, 0.0)
        return x, self._deep_features(deep, stage.zeroed, like=x) if deep else None

    def _deep_features(self, found: list[tuple[Tensor, Tensor]], zeroed: Tensor, *, like: Tensor) -> DeepFeatures:
        """The deep features of a stage's inserts, each (positions [T], features [T, k D]), zero where it is masked."""
        positions, features = (torch.cat(parts) for parts in zip(*found, strict=True))
        if len(zeroed):
            features = features * like.new_ones(len(like)).index_fill(0, zeroed, 0.0)[positions, None]
        return DeepFeatures(positions, features.unflatten(1, (-1, like.shape[1])).transpose(0, 1))

    def condition(self, insert: VisualInsert, tokens: dict[str, Tensor], states: Tensor) -> Tensor:
        """Tokens of a source, conditioned on their control states where they have any."""
        chosen = tokens[insert.source][insert.tokens]
        if insert.states is None:
            return chosen
        projector = self.encoder(insert.source).projector
        return projector(chosen, projector.condition_vector(states[insert.states])[insert.block])

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, vocabulary], in float32."""
        return self.qwen.lm_head(hidden).float()

    def transform_of(self, source: str) -> str:
        """The name of a source's image transform."""
        return VISION_TOWER if source == VISION_TOWER else self.encoder(source).transform.name

    def encoder(self, name: str) -> ReEncoder:
        """A re-encoder by its name."""
        return self.encoders[name]  # type: ignore[return-value]  # a ModuleDict knows modules only

    @property
    def visions(self) -> dict[str, Any]:
        """The vision encoders of the re-encoders that have one of their own, by name."""
        visions = {name: self.encoder(name).vision for name in self.encoders}
        return {name: vision for name, vision in visions.items() if vision is not None}

    @property
    def shard_units(self) -> list[Any]:
        """Modules whose weights are gathered together under sharding: decoder layers, the tower, vision encoders."""
        return [*self.language.layers, self.tower, *self.visions.values()]

    def _encoder_with(self, transform: str) -> ReEncoder:
        return next(e for e in map(self.encoder, self.encoders) if e.transform.name == transform)


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())
