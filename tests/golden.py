"""Rebuild the golden cases with the classes that training uses, and compare.

    python tests/golden.py FOLDER        a line for each case and inner_forward; exits 1 past the tolerances

A case is NAME.json (what went in) and NAME.safetensors (what the authors' code computed). Weights are regenerated from
their names.
"""

import argparse
import json
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from helpers.upstream_generator import UpstreamGenerator
from vpt.checkpoint.upstream import UPSTREAM_PREFIXES, from_upstream_name
from vpt.data.images import MediaStore
from vpt.data.processor import Processor, Sample
from vpt.data.records import Record
from vpt.data.transforms import ImageTransform, ProcessedImage
from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.dino import DinoEncoder
from vpt.encoders.qwen_vit import QwenViTEncoder
from vpt.encoders.sam import SamEncoder
from vpt.generation.row_state import GenerationLimits
from vpt.models.attention import SEGMENT_ATTENTION
from vpt.models.inner_forward import InnerForwardConfig
from vpt.models.output import Output
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER, Action, Batch, ImageInputs, PlaceholderSpan, Row
from vpt.perception.masking import Masking
from vpt.perception.mrope import GridSpan, row_positions
from vpt.perception.tokens import ActionIds, PerceptionVocabulary

TOLERANCES = {"loss": 1e-6, "logits": 5e-5, "grads": 1e-4}


def regenerate(name: str, shape: list[int], seed: int) -> Tensor:
    """The tensor that belongs to a weight's name."""
    x = noise(name, shape, seed)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 0.5 * x
    if len(shape) >= 2:
        return 0.08 * x
    return 1 + 0.1 * x if name.endswith("weight") or "lambda" in name else 0.1 * x


def noise(name: str, shape: list[int], seed: int) -> Tensor:
    state = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.from_numpy(state.standard_normal(shape).astype(np.float32))


class PixelsAsGiven(ImageTransform):
    """The cases store pixels, not images: the tower's view is never asked."""

    name = VISION_TOWER

    def __call__(self, image: object) -> ProcessedImage:
        raise NotImplementedError


@dataclass
class Case:
    """One golden case, rebuilt."""

    name: str
    spec: dict
    expected: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "Case":
        return cls(path.stem, json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))

    @property
    def config(self) -> dict:
        return self.spec["config"]

    @property
    def encoder_names(self) -> list[str]:
        return [self.spec["encoder"]] if self.spec["encoder"] else list(self.config["vision_encoder_ls"])

    def model(self, inner_forward: str) -> VPTModel:
        config = Qwen2VLConfig(**self.config, attn_implementation=SEGMENT_ATTENTION)
        qwen = Qwen2VLForConditionalGeneration(config)
        encoders = {name: self._encoder(name) for name in self.encoder_names}
        passes = InnerForwardConfig(
            inner_forward=inner_forward,
            num_inner_forward_run=self.config["num_inner_forward_run"],
            projector_scale=self.config["projector_scale"],
        )
        model = VPTModel(qwen, encoders, vocabulary=self.vocabulary(), forward_config=passes)
        weights = {n: regenerate(n, shape, self.spec["seed"]) for n, shape in self.spec["weights"].items()}
        state = {from_upstream_name(name): tensor for name, tensor in weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        if config.tie_word_embeddings:
            qwen.tie_weights()
            missing = [name for name in missing if name != "qwen.lm_head.weight"]
        assert not missing and not unexpected, (missing, unexpected)
        return model

    def _encoder(self, name: str) -> ReEncoder:
        classes = {"dino": DinoEncoder, "sam": SamEncoder, "clip": QwenViTEncoder}
        sizes = self.spec["encoder_config"] or {}
        options = {"side": sizes["image_size"]} if name == "dino" else {}
        context = BuildContext(name, self.config["hidden_size"], PixelsAsGiven(), self.config["projector_scale"])
        return classes[name].build(context, config=sizes, **options)

    def vocabulary(self) -> PerceptionVocabulary:
        config = self.config
        actions = {}
        for name in self.encoder_names:
            token = UPSTREAM_PREFIXES[name]
            start, control, pad = (config[f"{token}_{key}_id"] for key in ("action_start", "action", "image_token"))
            actions[name] = ActionIds(start, control, control + 1, pad)
        return PerceptionVocabulary(
            im_start=config["para_start_id"], im_end=config["para_end_id"],
            vision_start=config["vision_start_token_id"], vision_end=config["vision_end_token_id"],
            image_pad=config["image_token_id"], video_pad=config["video_token_id"],
            end_of_text=config["pad_token_id"], actions=actions,
        )  # fmt: skip

    def batch(self, *, positions: str) -> Batch:
        builder = _RowBuilder(self)
        rows = [builder.row(ids, mask) for ids, mask in zip(self.spec["input_ids"], self.spec["attention_mask"])]
        kept = [torch.tensor(mask).bool() for mask in self.spec["attention_mask"]]
        starts = np.cumsum([0, *(row.length for row in rows)])
        return Batch(
            input_ids=torch.cat([torch.tensor(x)[k] for x, k in zip(self.spec["input_ids"], kept)]),
            labels=torch.cat([torch.tensor(x)[k] for x, k in zip(self.spec["labels"], kept)]),
            positions=torch.cat([builder.positions(row, positions) for row in rows], dim=1),
            rows=[replace(row, start=int(start)) for row, start in zip(rows, starts)],
            images=builder.looks(),
        )


class _RowBuilder:
    """Reads the structure of rows off their ids; the cases have no records."""

    def __init__(self, case: Case) -> None:
        self.case, self.vocabulary = case, case.vocabulary()
        self.seen = dict.fromkeys([VISION_TOWER, *case.encoder_names], 0)
        self.masking = Masking(case.config["para_mask_id"], case.config["para_mask_ratio"])

    def row(self, ids: list[int], mask: list[int]) -> Row:
        ids = ids[: sum(mask)]
        pads = {self.vocabulary.image_pad: VISION_TOWER} | {a.pad: n for n, a in self.vocabulary.actions.items()}
        controls = {a.control: n for n, a in self.vocabulary.actions.items()}
        blocks, actions = [], []
        for start, stop in _runs(ids, set(pads)):
            source = pads[ids[start]]
            look = self.seen[source]
            self.seen[source] += 1
            if source == "clip":
                look += len(self.case.spec["image_grid_thw"])  # the tower sees the plain images first
            blocks.append(PlaceholderSpan(start, stop - start, source, look))
        for start, stop in _runs(ids, set(controls)):
            name = controls[ids[start]]
            steered = [i for i, b in enumerate(blocks) if b.source == name and b.start > start]
            actions.append(Action(start, stop - start, name, steered[0] if steered else None))
        starts = [i for i, token in enumerate(ids) if token == self.vocabulary.im_start]
        ends = [i for i, token in enumerate(ids) if token == self.vocabulary.im_end]
        paragraphs = tuple((a + 1, b) for a, b in zip(starts, ends))
        row = Row(len(ids), tuple(blocks), tuple(actions), paragraphs)
        return replace(row, masked=self.masking.spans(row)) if self.masking.para_mask_ratio else row

    def positions(self, row: Row, kind: str) -> Tensor:
        grids = self.case.spec["image_grid_thw"]
        merge = self.case.config["vision_config"]["spatial_merge_size"]
        spans = [
            GridSpan(b.start, grids[b.image][0], grids[b.image][1] // merge, grids[b.image][2] // merge)
            for b in row.blocks
            if b.source == VISION_TOWER
        ]
        return row_positions(row.length, spans if kind == "mrope" else [])

    def looks(self) -> dict[str, ImageInputs]:
        spec, merge = self.case.spec, self.case.config["vision_config"]["spatial_merge_size"]
        pixels = {name: noise(f"input.{name}", shape, spec["seed"]) for name, shape in spec["inputs"].items()}
        grids = [tuple(grid) for grid in spec["image_grid_thw"]]
        again = "clip_pixel_values" in pixels
        tower = torch.cat([pixels["pixel_values"], pixels["clip_pixel_values"]]) if again else pixels["pixel_values"]
        grids = grids * 2 if again else grids
        looks = {VISION_TOWER: ImageInputs(tower, [t * h * w // merge**2 for t, h, w in grids], grids)}
        if "detection_images" in pixels:
            sizes = spec["encoder_config"]
            tokens = (sizes["image_size"] // sizes["patch_size"]) ** 2
            looks["dino"] = ImageInputs(pixels["detection_images"], [tokens] * len(pixels["detection_images"]))
        if "seg_images" in pixels:
            images = pixels["seg_images"].repeat_interleave(16, -1).repeat_interleave(16, -2)
            looks["sam"] = ImageInputs(images, [256] * len(images))
        return looks


def _runs(ids: list[int], wanted: set[int]) -> list[tuple[int, int]]:
    """Maximal runs of one and the same id out of `wanted`."""
    runs, start = [], 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or ids[stop] != ids[start]:
            if ids[start] in wanted:
                runs.append((start, stop))
            start = stop
    return runs


def check(case: Case, inner_forward: str) -> dict[str, float]:
    """The largest error of each kind, in units of its tolerance's definition."""
    model = case.model(inner_forward)
    batch = case.batch(positions=case.spec["position_ids"])
    out: Output = model(batch, keep_logits=True)
    loss = out.loss_sum / batch.num_labels
    loss.backward()
    want = case.expected
    errors = {
        "loss": abs(loss.item() / want["loss"].item() - 1),
        "logits": (out.logits - want["logits"]).abs().max().item(),
        "grads": _gradient_error(model, case),
    }
    if "position_ids" in want:
        mask = torch.tensor(case.spec["attention_mask"]).bool()
        errors["positions"] = float((batch.positions != want["position_ids"][:, mask]).sum())
    if case.spec["generate"]:
        got, ids = decoded(case, inner_forward), case.spec["generate"]["new_ids"]
        errors["decoded"] = float(sum(a != b for a, b in zip(got, ids, strict=True)))
    return errors


def decoded(case: Case, inner_forward: str) -> list[int]:
    """Ids that follow the first `prompt_len` tokens of row 0, greedily and in M-RoPE positions, masking off."""
    model, batch = case.model(inner_forward).eval(), case.batch(positions="mrope")
    wanted, length = case.spec["generate"]["new_ids"], case.spec["generate"]["prompt_len"]
    looks = {
        view: [((view, str(i)), look) for i, look in enumerate(_apart(view, x))] for view, x in batch.images.items()
    }
    row = replace(batch.rows[0], length=length, masked=())
    sources = {block.source for block in row.blocks}
    views = {source: model.transform_of(source) for source in sources}
    record = Record((), {}, case.name)
    sample = Sample(
        batch.input_ids[:length], batch.labels[:length], batch.positions[:, :length], row,
        {source: looks[views[source]] for source in sources}, views, record,
    )  # fmt: skip
    limits = GenerationLimits(max_new_tokens=len(wanted))
    generator = UpstreamGenerator(model, Processor(None, {}), lambda ids: "", limits)
    return generator.generate([sample], [MediaStore(Path())])[0].ids


def _apart(view: str, looks: ImageInputs) -> list[ProcessedImage]:
    """Stacked looks, one by one."""
    if not looks.grids:
        return [ProcessedImage(pixels, tokens) for pixels, tokens in zip(looks.pixels, looks.tokens)]
    patches = [t * h * w for t, h, w in looks.grids]
    return [ProcessedImage(*parts) for parts in zip(looks.pixels.split(patches), looks.tokens, looks.grids)]


def _gradient_error(model: VPTModel, case: Case) -> float:
    parameters, worst = dict(model.named_parameters()), 0.0
    for name, want in zip(case.spec["grad_names"], case.expected["grads"]):
        gradient = parameters[from_upstream_name(name)].grad.flatten()
        got = torch.cat([gradient.norm()[None], gradient[torch.linspace(0, len(gradient) - 1, 8).long()]])
        worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    paths = sorted(path for path in folder.glob("*.json") if path.with_suffix(".safetensors").exists())
    if not paths:
        print(f"no golden case (NAME.json with NAME.safetensors) in {folder}", file=sys.stderr)
        return 1
    failed = 0
    for path in paths:
        case = Case.load(path)
        for inner_forward in ("full", "shared"):
            errors = check(case, inner_forward)
            bad = [key for key, error in errors.items() if not error <= TOLERANCES.get(key, 0.0)]
            failed += bool(bad)
            shown = "  ".join(f"{key} {error:.1e}" for key, error in errors.items())
            print(f"{case.name:32} {inner_forward:7} {shown}  {'FAILED: ' + ', '.join(bad) if bad else 'ok'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
