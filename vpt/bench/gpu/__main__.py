"""Measure, print, write. Under torchrun every process trains, and rank 0 speaks."""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vpt.bench.gpu.decoding import Decoding
from vpt.bench.gpu.profiling import idle, shares
from vpt.bench.gpu.published_sizes import QWEN2_VL_2B, QWEN2_VL_7B, TINY, BenchModel, build
from vpt.bench.gpu.training import StepTiming, Training
from vpt.config.schema import LoraConfig
from vpt.distributed.process_group import World, init_process_group
from vpt.models.lora import freeze_base, inject

# Rows of a micro-batch and whether layers are recomputed, tried in turn; what does not fit is passed over.
STEPS = ((8, False), (12, False), (16, True), (32, True))
BATCHES = (1, 8, 64)
PARTS = ("train_2b", "compiled_2b", "lora_7b", "decode_2b")
RANK, ALPHA = 512, 1024.0  # the published adapters of the 7B
UTILISATION, SAMPLES = 0.40, 40.0  # bounds for the 2B on one H100
Print = Callable[[str], None]


def train(
    sizes: BenchModel, world: World, device: torch.device, say: Print, *, rank: int = 0, compiled: bool = False
) -> tuple[Training, list[StepTiming]]:
    """Paces of a model that is trained whole, or by adapters of `rank`."""
    model = build(sizes, device)
    if rank:
        inject(model.language, LoraConfig(rank, ALPHA))
        freeze_base(model.language)
    training = Training(model, sizes, world, compiled=compiled)
    paces = []
    for rows, checkpointing in STEPS:
        pace = training.measure(rows, checkpointing=checkpointing)
        say(f"  {pace}" if pace else f"  {rows} rows do not fit")
        paces += [pace] if pace else []
    return training, paces


def step_and_profile(
    name: str, sizes: BenchModel, world: World, device: torch.device, say: Print, out: Path, *, compiled: bool
) -> dict[str, Any]:
    """The best pace of full training, and where its time goes."""
    say(f"{name} with DINOv2, all but the towers trained" + ", decoder layers compiled" * compiled)
    training, paces = train(sizes, world, device, say, compiled=compiled)
    if not paces:
        say("  nothing fits into this GPU's memory")
        return {}
    best = max(paces, key=lambda pace: pace.samples_a_second)
    training.set(checkpointing=best.checkpointing)
    parts = shares(training, training.batch(best.rows), out.with_suffix(".profile.txt"))
    say("".join(f"\n  {share:6.1%} {kind}" for kind, share in {**parts, "waiting": idle(parts)}.items())[1:])
    return {
        "utilisation": with_bound(best.utilisation, UTILISATION),
        "samples_a_second": with_bound(best.samples_a_second * world.size, SAMPLES),
        "paces": [asdict(pace) for pace in paces], "profile": parts,
    }  # fmt: skip


def adapters(name: str, sizes: BenchModel, world: World, device: torch.device, say: Print) -> dict[str, Any]:
    """Training by adapters."""
    say(f"{name} with DINOv2, adapters of rank {RANK}")
    try:
        _, paces = train(sizes, world, device, say, rank=min(RANK, sizes.language["hidden_size"] // 2))
    except ModuleNotFoundError as error:
        say(f"  not measured, {error.name} is missing; pip install peft")
        return {}
    return {"paces": [asdict(pace) for pace in paces]}


def answer(name: str, sizes: BenchModel, device: torch.device, say: Print) -> dict[str, Any]:
    """Tokens a second while answering."""
    say(f"{name} answers, {sizes.new_tokens} tokens each, in bf16: ours, transformers' generate")
    speaking = Decoding(build(sizes, device, dtype=torch.bfloat16), sizes)
    found = {}
    for rows in BATCHES:
        ours, theirs = speaking.rates(rows)
        say(f"  batch {rows}: {ours:,.0f} and {theirs:,.0f} tokens/s, {ours / theirs:.2f}")
        found[f"batch_{rows}"] = {"ours": ours, "theirs": theirs, **with_bound(ours / theirs, 1.0)}
    return found


def with_bound(value: float, bound: float) -> dict[str, Any]:
    """A value beside the bound that it should reach."""
    return {"value": value, "bound": bound, "better": "higher", "ok": value >= bound}


def main() -> None:
    """Everything in turn; what one part holds in memory is gone before the next one begins."""
    parser = argparse.ArgumentParser(description="What training and answering cost on a GPU, at the published sizes.")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any machine: only to see that it runs")
    parser.add_argument("parts", nargs="*", default=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_gpu.json"))
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not asked.tiny:
        parser.error("there is no GPU here; --tiny runs anywhere and says nothing")
    small, large = (TINY, TINY) if asked.tiny else (QWEN2_VL_2B, QWEN2_VL_7B)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with init_process_group(device=device.type) as world:
        say: Print = partial(print, flush=True) if world.is_main else (lambda text: None)
        where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        say(f"{world.size} x {where}, torch {torch.__version__}")
        whole = partial(step_and_profile, "Qwen2-VL-2B", small, world, device, say)
        measures = {
            "train_2b": partial(whole, asked.out, compiled=False),
            "compiled_2b": partial(whole, asked.out.with_suffix(".compiled.json"), compiled=True),
            "lora_7b": partial(adapters, "Qwen2-VL-7B", large, world, device, say),
            "decode_2b": partial(answer, "Qwen2-VL-2B", small, device, say),
        }
        found: dict[str, Any] = {"device": where, "processes": world.size, "torch": torch.__version__}
        for part in asked.parts:
            if part == "decode_2b" and world.size > 1:
                continue  # every process would measure the same
            found[part] = measures[part]()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if world.is_main:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
