"""The training loop."""

import contextlib
import math
import time
from functools import partial
from pathlib import Path

import torch

from vpt.allocator import keep_freed_memory
from vpt.batch import Batch
from vpt.config import TrainConfig
from vpt.data.build import build_batches
from vpt.data.loader import step_loader
from vpt.errors import CheckpointError
from vpt.features import FeatureStore
from vpt.flops.peak import peak_flops
from vpt.pretrained import choose_device
from vpt.seal import damage
from vpt.training import checkpoint
from vpt.training.accord import Accord, Totals
from vpt.training.books import Books
from vpt.training.chance import seed_step
from vpt.training.exam import Exam
from vpt.training.gauges import Gauges
from vpt.training.optimizer import account, build_optimizer, rate, set_rate
from vpt.training.resume import compare
from vpt.training.saving import Saver
from vpt.training.setbacks import Setbacks
from vpt.training.signals import Signals
from vpt.training.start import begin
from vpt.weights import full, own_tensors
from vpt.world import World


class Trainer:
    """A run, or one process's part in it: everything it holds, and `fit`."""

    def __init__(self, config: TrainConfig, folder: Path, world: World | None = None) -> None:
        """Build the run, or take up the one that `folder` holds. Raises UserError for whatever cannot run."""
        self.config, self.folder = config, folder
        self.world = world or World()
        self.device = choose_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        found = self._found()
        if found:
            self._check(found)
            compare(found, config)
        self.parts, self.strategy, meter = begin(config, found, self.world, self.device)
        self.model = self.parts.model
        self.accord = Accord(self.world, self.model, self.parts.encoder.views)
        self.optimizer = build_optimizer(self.model, config.optim)
        peak = peak_flops(self.device, precision=config.training.precision)
        self.gauges = Gauges(self.model, self.optimizer, self.world, meter=meter, peak=peak)
        self.progress = checkpoint.Progress()
        if found:
            self.progress = checkpoint.restore(found, self.model, self.optimizer)
        self.model.store = FeatureStore.open(config.data, self.model, precision=config.training.precision)
        self.encoder = self.parts.encoder.keeping(self.model.store)
        self.saver = Saver(folder / "checkpoints", self.world, keep=config.training.keep)
        self.batches = build_batches(config, self.encoder, self.world)
        self.setbacks = Setbacks(folder, self.world, self.progress, config)
        self.exam = Exam(config, self.encoder, self.accord, self.device)
        self.books = Books(config, folder, self.world)
        self.signals = Signals()  # what this process has been told
        self.stopping = 0  # the exit code that all processes have agreed on

    def _found(self) -> Path | None:
        """The last checkpoint, as rank 0 sees it: file systems may show others an older state."""
        folder = self.folder / "checkpoints"
        last = max((int(path.name.rpartition("_")[2]) for path in checkpoint.steps(folder)), default=-1)
        last = self.world.said_by_main(last)
        return folder / checkpoint.STEP_FOLDER.format(last) if last >= 0 else None

    def _check(self, found: Path) -> None:
        """Raise CheckpointError, on every process, where a file of the checkpoint is damaged."""
        said = self.world.texts(damage(found, rank=self.world.rank, ranks=self.world.size))
        for text in filter(None, said):
            raise CheckpointError(text)

    def fit(self) -> None:
        """Train from where the run stands to its end, then say what it reached."""
        strategy = f"{self.world.size} x {self.device.type} ({self.strategy.name})"
        self.books.open(self.progress, account(self.model), strategy)
        training, done = self.config.training, self.progress.step
        loader = step_loader(self.batches, start=done, workers=self.config.data.workers, pin=self.device.type == "cuda")
        with self.signals, self.saver, self.books.bar(done) as bar:
            for step in range(done, training.steps):
                started = time.perf_counter()
                batches = [batch.to(self.device) for batch in next(loader)]
                waited = time.perf_counter() - started
                metrics = self.train_step(batches, step)
                if self.setbacks.too_many:
                    self._give_up()
                self.progress.step = step + 1
                took = time.perf_counter() - started
                self.books.advance(bar, loss=metrics.get("train/loss", math.nan), speed=self.tokens / took)
                if self._logged(self.progress.step):
                    speed = self.gauges.speed(metrics, tokens=self.tokens, waited=waited, took=took)
                    self.books.log(metrics | speed, step=self.progress.step)
                last = self.progress.step == training.steps or bool(self.stopping)
                better = self._due(training.eval_every) and not last and self._evaluate()
                due = self._due(training.checkpoint_every) and not self.progress.lost_in_a_row
                if last or better or due:
                    self._save()
                if self.stopping:
                    break
        self._close_store()
        if self.stopping:
            self.books.close()
        self.world.wait()  # the last checkpoint is in place for all, and whoever leaves first interrupts nobody
        if self.stopping:
            self.books.say(f"stopped after step {self.progress.step}, saved; type the same command to go on")
            self.signals.leave(self.stopping)

    def _close_store(self) -> None:
        """What is answered from here on runs in a precision of its own."""
        if self.model.store is not None:
            self.model.store.finish()
            self.model.store = None

    def train_step(self, batches: list[Batch], step: int) -> dict[str, float]:
        """One optimizer step over a global batch, this process's part in `batches`; how it is cut changes nothing."""
        self.model.train()
        set_rate(self.optimizer, self._rate(step))
        seed_step(self.config.seed, step, self.world.rank)
        self.setbacks.begin()
        own = batches
        batches, totals = self.accord.meet(own, stopping=self.signals.code)
        self.setbacks.left_out(own, totals)
        logged = self._logged(step + 1)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            with self.strategy.micro_batch(last=number == len(batches)):
                with self._autocast():
                    out = self.strategy(batch)
                    part = out.loss_sum / max(totals.labels, 1)
                if logged:
                    self.gauges.see(batch, out)
                if part.requires_grad:  # not so where a batch has no label that trained weights lead to
                    (part * self.world.size).backward()  # processes take the mean of their gradients
            loss += part.detach()
        norms = self.gauges.gradients() if logged else {}
        norm, reached = self._clip(), self.world.sum(loss).item()
        finite = math.isfinite(norm) and math.isfinite(reached)  # the same on all processes
        if finite:
            self.optimizer.step()
            self.progress.lost_in_a_row = 0
        else:  # weights and moments stay, the schedule goes on
            self.setbacks.lost(own, loss=reached, norm=norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.stopping, self.tokens = totals.stopping, totals.tokens
        metrics = {"train/loss": reached, "train/gradient_norm": norm, **norms} if finite else {}
        return metrics | (self._details(own, totals) if logged else {})

    def _details(self, own: list[Batch], totals: Totals) -> dict[str, float]:
        """What is logged of a step besides its loss and its gradient."""
        return {
            **self.gauges.rates(),
            "train/lost_steps": self.progress.lost,
            "masking/share_of_rows": totals.masked / max(totals.rows, 1),
            **self.gauges.read(own),
            "data/skipped_records": self.progress.skipped,
        }

    def _give_up(self) -> None:
        """Too many steps in a row were lost: leave a checkpoint from before them, and end the run."""
        ending = self.setbacks.ending()
        self.progress = self.setbacks.before
        self.saver.wait()
        there = self.folder / "checkpoints" / checkpoint.STEP_FOLDER.format(self.progress.step)
        if self.progress.step and not self.world.said_by_main(there.is_dir()):
            self.save()
        raise ending

    def _rate(self, step: int) -> float:
        optim = self.config.optim
        return rate(step, steps=self.config.training.steps, warmup=optim.warmup, final=optim.final_lr)

    def _clip(self) -> float:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        limit = self.config.optim.clip or float("inf")
        return full(torch.nn.utils.clip_grad_norm_(parameters, limit)).item()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.config.training.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def evaluate(self) -> dict[str, float]:
        """Teacher-forced scores on test records; `Exam` has them."""
        with self._autocast():
            return self.exam.scores(self.model)

    def _evaluate(self) -> bool:
        """Evaluate and log; whether this is the best so far by `training.best`."""
        metrics = self.evaluate()
        self.books.log(metrics, step=self.progress.step)
        return self.progress.is_best(metrics, by=self.config.training.best)

    def _save(self) -> None:
        held = self.save()
        self.books.log({"perf/seconds_held_by_checkpoint": held}, step=self.progress.step)
        self.books.say(f"checkpoint of step {self.progress.step} begun; it held the loop for {held:.2f} s")

    def save(self) -> float:
        """Begin to write a checkpoint of this moment; the seconds for which that held the loop."""
        tensors = {"model": own_tensors(self.model)}
        if states := checkpoint.optimizer_tensors(self.optimizer):  # none where every step so far was lost
            tensors["optimizer"] = states
        small = partial(
            checkpoint.describe, model=self.model, config=self.config, tokenizer=self.parts.tokenizer
        )  # fmt: skip
        return self.saver.save(tensors, self.progress, small)

    def release(self) -> None:
        """Give back the memory of model and optimizer; the run is over."""
        del self.model, self.optimizer, self.strategy, self.accord, self.exam, self.parts, self.gauges
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _logged(self, step: int) -> bool:
        """Whether the step with this number, counted from 1, is logged."""
        return step % self.config.training.log_every == 0 or step == self.config.training.steps

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0
