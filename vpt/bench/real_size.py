"""The life of a project at the published sizes, once: `make real-size`. For 24 GB of memory, 40 GB of disk.

Random folders of the published shapes, then what a project types: convert, estimate, alignment, instruction tuning with
adapters and masking that is killed and goes on, evaluation, a question, exports, and stock transformers beside them.
Every part is a program of its own; its time and its peak of memory are printed and written.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from vpt.bench.programs import ROOT, run_program
from vpt.bench.random_folders import write_folders
from vpt.checkpoint.format import COMPLETE
from vpt.config.overrides import compose_train
from vpt.utils.table import Table

LIVES = {"qwen2_vl_2b": ("dino", "detection"), "qwen2_5_vl_3b": ("sam", "seg")}  # model -> re-encoder and its token
REDUCED = [
    "model.size=tiny", "++model.config.hidden_size=256", "++model.config.intermediate_size=512",
    "++model.config.num_hidden_layers=4", "++model.config.num_attention_heads=4",
    "++model.config.num_key_value_heads=2", "++model.config.vocab_size=1024",
    "++model.config.rope_scaling={type:mrope,mrope_section:[8,12,12]}",
]  # fmt: skip
TOWERS = {  # of the reduced size
    "qwen2_vl_2b": "{depth:2,embed_dim:64,num_heads:2,hidden_size:256,mlp_ratio:4,patch_size:14}",
    "qwen2_5_vl_3b": "{depth:2,hidden_size:64,intermediate_size:128,num_heads:2,out_hidden_size:256,patch_size:14,"
    "fullatt_block_indexes:[1]}",
}


@dataclass(frozen=True)
class Part:
    """One program: seconds, the most bytes that it held, those on the disk after it, and what `vpt estimate` said."""

    name: str
    seconds: float
    peak: float
    disk: float
    estimated: float | None = None


class Life:
    """A base model and a re-encoder from random folders to exports, below `root`."""

    def __init__(self, model: str, root: Path, *, reduced: bool) -> None:
        self.root, self.model, self.reduced = root / model, model, reduced
        self.encoder, self.token = LIVES[model]
        self.image = self.root / "data" / "images" / "0.png"
        self.parts: list[Part] = []
        self.paths: list[str] = []

    @property
    def sizes(self) -> list[str]:
        """The model and its sizes."""
        smaller = [*REDUCED, f"++model.config.vision_config={TOWERS[self.model]}"] if self.reduced else []
        return [f"+experiment={self.encoder}", f"model={self.model}", *smaller]

    def overrides(self, name: str, *more: str) -> list[str]:
        """What every run of the life has in common, and what is its own."""
        return [
            *self.sizes, *self.paths, "data=vpt", f"data.root={self.root}/data", "data.workers=0", "device=cpu",
            "training.batch_size=2", "training.micro_batch_size=1", "training.eval_rows=2", "training.log_every=1",
            "training.precision=bf16", "model.frozen_dtype=bfloat16", "training.final_eval_questions=1",
            "training.checkpoint_every=1", "generation.max_new_tokens=8", "pictures=false", "tracking=none",
            f"output_dir={self.root}/runs", f"run_name={name}", *more,
        ]  # fmt: skip

    def live(self) -> None:
        """Every part in turn; the first that fails ends it."""
        self._folders()
        self._data()
        adapters = ["model.lora.rank=16", "model.activation_checkpointing=true"]
        self._train(adapters)
        tuned = f"checkpoint={self.root}/runs/tune"
        self.run("evaluate", "eval.py", tuned, "data.limit=1", "pictures=false")
        self.run("ask", "-m", "vpt", "ask", str(self.image), "what is it?", tuned, "generation.max_new_tokens=8")
        for kind in ("vpt", "peft", "hub", *(["upstream"] if self.model == "qwen2_vl_2b" else [])):
            self.run(f"export {kind}", "-m", "vpt", "export", tuned, f"to={self.root}/{kind}", f"format={kind}")
            shutil.rmtree(self.root / kind)
        self._beside_transformers(adapters)

    def _train(self, adapters: list[str]) -> None:
        """Alignment, then instruction tuning with masking, killed after a checkpoint and gone on with."""
        align = self.overrides("align", "model.num_inner_forward_run=1", "optim.freeze=['qwen.*']", "training.steps=1")
        start = f"init_from={self.root}/runs/align"
        tune = self.overrides("tune", start, *adapters, "training.steps=3", "masking=paper")
        self.run("align", "train.py", *align, estimate=align)
        self.run("tune, killed", "train.py", *tune, until=self.root / "runs/tune/checkpoints/step_00000001" / COMPLETE)
        self.run("tune, resumed", "train.py", *tune, estimate=tune)

    def _beside_transformers(self, adapters: list[str]) -> None:
        """A run without re-encoders, merged, answers as transformers' own class does."""
        files = [f"data.{split}.vpt.options.path=none.json" for split in ("train", "test")]
        plain = self.overrides("plain", *adapters, *files, "encoder=[]", "training.steps=1", "data.actions.none=1",
                               f"data.actions.{self.encoder}=0")  # fmt: skip
        run, qwen = f"{self.root}/runs/plain", f"{self.root}/qwen"
        self.run("plain", "train.py", *(item for item in plain if not item.startswith("encoder.")))
        self.run("export qwen", "-m", "vpt", "export", f"checkpoint={run}", f"to={qwen}", "format=qwen")
        self.run("stock transformers", "-m", "vpt.bench.stock_answer", run, qwen, str(self.image))

    def _folders(self) -> None:
        started = time.perf_counter()
        nothing = ["model.path=null", f"encoder.{self.encoder}.sizes.full.weights=null", "run_name=none"]
        found = write_folders(compose_train([*self.sizes, *nothing]), self.root)
        self.paths = [f"{key}={folder}" for key, folder in found.items()]
        self._note("folders", time.perf_counter() - started, 0.0)

    def _data(self) -> None:
        """Four pictures with a question each, as Visual-CoT writes them, converted."""
        self.image.parent.mkdir(parents=True)
        lines = []
        for number in range(4):
            Image.effect_noise((512, 384), 60 + number).convert("RGB").save(self.image.with_name(f"{number}.png"))
            shown = {"image": f"{number}.png", "width": 512, "height": 384, "bboxs": [[100, 100, 300, 300]]}
            lines.append({"question": "what is it?", "answer": "red", **shown, "dataset": "noise", "split": "train"})
        source = self.root / "data" / "source.jsonl"
        source.write_text("\n".join(map(json.dumps, lines)))
        for file, kind in (("train.json", self.token), ("test.json", self.token), ("none.json", "none")):
            target = str(self.root / "data" / file)
            self.run(
                f"convert {file}", "-m", "vpt", "convert", str(source), target, "--kind", kind, "--prefix", "images"
            )

    def run(self, name: str, *command: str, until: Path | None = None, estimate: list[str] | None = None) -> None:
        """Run a program to its end, or kill it once a file is there. Raises RuntimeError where it fails."""
        seconds, peak = run_program(command, self.root / "log.txt", until=until.exists if until else None)
        self._note(name, seconds, peak, estimate)

    def _note(self, name: str, seconds: float, peak: float, estimate: list[str] | None = None) -> None:
        disk = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        self.parts.append(
            Part(f"{self.model}: {name}", seconds, peak, disk, _estimated(estimate) if estimate else None)
        )
        print(f"{self.parts[-1].name:36}{seconds:8.0f} s{peak / 1e9:8.2f}{disk / 1e9:8.2f}", flush=True)


def _estimated(overrides: list[str]) -> float:
    """Bytes that `vpt estimate` says for a run."""
    said = subprocess.run(
        [sys.executable, "-m", "vpt", "estimate", *overrides], cwd=ROOT, capture_output=True, text=True
    )
    unit = re.search(r"memory of each GPU, 10\^(\d+) bytes", said.stdout)
    together = re.search(r"together +([\d.]+)", said.stdout)
    if not unit or not together:
        raise RuntimeError(f"vpt estimate: {said.stderr[-2000:]}")
    return float(together[1]) * 10.0 ** int(unit[1])


def main() -> None:
    """Live, print a table, write it beside the folder, as `outputs/real_size.json`."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--reduced", action="store_true", help="the same with small sizes: minutes")
    parser.add_argument("--root", type=Path, default=ROOT / "outputs" / "real_size")
    parser.add_argument("--models", nargs="+", default=[*LIVES], choices=[*LIVES])
    asked = parser.parse_args()
    shutil.rmtree(asked.root, ignore_errors=True)
    parts: list[Part] = []
    for model in asked.models:
        life = Life(model, asked.root, reduced=asked.reduced)
        life.live()
        parts += life.parts
        shutil.rmtree(life.root)
    rows = [[p.name, p.seconds, p.peak / 1e9, p.estimated and p.estimated / 1e9, p.disk / 1e9] for p in parts]
    print(Table(["part", "seconds", "peak, 10^9 bytes", "estimated", "disk"], rows).as_text())
    asked.root.with_suffix(".json").write_text(json.dumps([asdict(part) for part in parts], indent=1))


if __name__ == "__main__":
    main()
