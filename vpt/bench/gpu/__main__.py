"""Measure, print, write. Under torchrun every process trains, and rank 0 prints."""

import argparse
import json
import platform
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vpt.bench.generation import Answering
from vpt.bench.gpu.profiling import idle, shares
from vpt.bench.gpu.training import StepTiming, Training
from vpt.bench.measure import Measurement, time_in_turns
from vpt.bench.models import TINY, BenchModel
from vpt.config.schema import LoraConfig
from vpt.distributed.process_group import World, init_process_group
from vpt.errors import first_line
from vpt.utils.device import free_unreachable

# Rows of a micro-batch and whether layers are recomputed, tried in turn (what does not fit is passed over), and rows
# that are answered together; of the published sizes, and of toy sizes.
STEPS = {False: ((8, False), (12, False), (16, True), (32, True)), True: ((1, False), (2, True))}
BATCHES = {False: (1, 8, 64), True: (1, 2)}
RANK, ALPHA = 512, 1024.0  # the published adapters of the 7B
UTILISATION, SAMPLES = 0.40, 40.0  # bounds for the 2B on one H100


@dataclass(frozen=True)
class GpuBench:
    """The parts of the bench, each a method that returns what is written about it.

    Attributes:
        tiny: toy sizes instead of the published ones.
        world, device: the processes, and what this one runs on.
        out: where the figures go; profiles lie beside it.
    """

    tiny: bool
    world: World
    device: torch.device
    out: Path

    def measured(self, part: str) -> dict[str, Any]:
        """What a part finds; what goes wrong in one, such as too little memory, leaves the others their turn."""
        try:
            found: dict[str, Any] = getattr(self, part)()
        except Exception as error:
            if self.world.size > 1:  # the other processes wait for this one
                raise
            traceback.print_exc()
            return {"error": first_line(error)}
        return found

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.world.is_main:
            print(text, flush=True)

    def sizes(self, name: str) -> BenchModel:
        """The model that is measured."""
        return TINY if self.tiny else BenchModel.published(name)

    def train_2b(self) -> dict[str, Any]:
        """Full training: the best pace, and where its time goes."""
        return self._full_training(compiled=False)

    def compiled_2b(self) -> dict[str, Any]:
        """Full training with compiled decoder layers."""
        return self._full_training(compiled=True)

    def _full_training(self, *, compiled: bool) -> dict[str, Any]:
        self.say("Qwen2-VL-2B with DINOv2, all but the towers trained" + ", decoder layers compiled" * compiled)
        training = Training(self.sizes("qwen2_vl_2b"), self.world, self.device, compiled=compiled, lora=None)
        paces = self._paces(training)
        if not paces:
            self.say("  nothing fits into this GPU's memory")
            return {}
        best = max(paces, key=lambda pace: pace.samples_a_second)
        training.set(checkpointing=best.checkpointing)
        table = self.out.with_suffix(".compiled.profile.txt" if compiled else ".profile.txt")
        parts = shares(training, training.batch(best.rows), table)
        self.say("\n".join(f"  {share:6.1%} {kind}" for kind, share in {**parts, "waiting": idle(parts)}.items()))
        return {
            "utilisation": with_bound(best.utilisation, UTILISATION),
            "samples_a_second": with_bound(best.samples_a_second * self.world.size, SAMPLES),
            "paces": [asdict(pace) for pace in paces], "profile": parts,
        }  # fmt: skip

    def lora_7b(self) -> dict[str, Any]:
        """Training by adapters."""
        self.say(f"Qwen2-VL-7B with DINOv2, adapters of rank {RANK}")
        sizes = self.sizes("qwen2_vl_7b")
        lora = LoraConfig(min(RANK, sizes.qwen["hidden_size"] // 2), ALPHA)
        try:
            training = Training(sizes, self.world, self.device, compiled=False, lora=lora)
        except ModuleNotFoundError as error:
            self.say(f"  not measured, {error.name} is missing; pip install peft")
            return {}
        return {"paces": [asdict(pace) for pace in self._paces(training)]}

    def _paces(self, training: Training) -> list[StepTiming]:
        paces, (warm_up, steps) = [], (1, 2) if self.tiny else (3, 10)
        for rows, checkpointing in STEPS[self.tiny]:
            pace = training.measure(rows, checkpointing=checkpointing, warm_up=warm_up, steps=steps)
            self.say(f"  {pace}" if pace else f"  {rows} rows do not fit")
            paces += [pace] if pace else []
        return paces

    def decode_2b(self) -> dict[str, Any]:
        """Tokens a second while answering, ours and transformers'; the best of three rounds each."""
        sizes = self.sizes("qwen2_vl_2b")
        self.say(f"Qwen2-VL-2B answers, {sizes.new_tokens} tokens each, in bf16: ours, transformers' generate")
        answering = Answering(sizes, sizes.build(self.device, dtype="bfloat16"), max(BATCHES[self.tiny]))
        found = {}
        for rows in BATCHES[self.tiny]:
            taken = time_in_turns({"ours": answering.ours(rows), "theirs": answering.theirs(rows)}, rounds=3)
            rates = {side: rows * sizes.new_tokens / min(seconds) for side, seconds in taken.items()}
            ratio = rates["ours"] / rates["theirs"]
            self.say(f"  batch {rows}: {rates['ours']:,.0f} and {rates['theirs']:,.0f} tokens/s, {ratio:.2f}")
            found[f"batch_{rows}"] = rates | with_bound(ratio, 1.0)
        return found


PARTS = ("train_2b", "compiled_2b", "lora_7b", "decode_2b")


def with_bound(value: float, bound: float) -> dict[str, Any]:
    """A value beside the bound that it should reach."""
    figure = Measurement("", value, bound, "higher").as_json()
    return {key: figure[key] for key in ("value", "bound", "better", "ok")}


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with init_process_group(device=device.type) as world:
        bench = GpuBench(asked.tiny, world, device, asked.out)
        where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        bench.say(f"{world.size} x {where}, torch {torch.__version__}")
        found: dict[str, Any] = {"device": where, "processes": world.size, "torch": torch.__version__}
        for part in asked.parts:
            if part == "decode_2b" and world.size > 1:
                continue  # every process would measure the same
            found[part] = bench.measured(part)
            free_unreachable()
            if world.is_main:
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
        bench.say(f"written to {asked.out}")
    sys.exit(any("error" in figures for figures in found.values() if isinstance(figures, dict)))


if __name__ == "__main__":
    main()
