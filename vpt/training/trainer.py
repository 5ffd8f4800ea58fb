"""The training loop: `Trainer.fit` goes step by step, `Trainer.train_step` is one optimizer step."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vpt.checkpoint.format import STEP_FOLDER, save_metadata
from vpt.checkpoint.frozen_weights import FrozenWeights
from vpt.checkpoint.resume import check_same_config, latest_checkpoint, verify_together
from vpt.checkpoint.saver import Saver
from vpt.checkpoint.tensors import unique_state_dict
from vpt.checkpoint.train_state import TrainState, optimizer_tensors, restore
from vpt.config.schema import TrainConfig
from vpt.distributed.batch_alignment import BatchAligner, GlobalCounts
from vpt.distributed.dtensor import full_tensor
from vpt.distributed.process_group import World
from vpt.flops.hardware import peak_flops
from vpt.perception.batch import Batch
from vpt.training.failures import FailureLog
from vpt.training.frozen_features import open_feature_cache
from vpt.training.optimizer import build_optimizer, lr_factor, set_lr
from vpt.training.policy_objective import build_objective
from vpt.training.preemption import PreemptionHandler
from vpt.training.run_logger import RunLogger
from vpt.training.seed import seed_step
from vpt.training.setup import build_training
from vpt.training.step_metrics import StepMetrics
from vpt.training.validator import Validator
from vpt.utils.device import choose_device
from vpt.utils.heap import keep_freed_heap
from vpt.utils.threads import set_threads


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient of one optimizer step, as all processes agree on them, and what there is to log of it.

    Attributes:
        loss: over the global batch; NaN where the step was skipped because it or the gradient is not finite.
        tokens: of the global batch.
        exit_code: for which a process has been asked to stop; 0 while none has.
        metrics: for `metrics.jsonl`; on most steps those of the loss and the gradient alone.
    """

    loss: float
    tokens: int
    exit_code: int
    metrics: dict[str, float]


class Trainer:
    """A run, or one process's part in it: everything it holds, and `fit`."""

    def __init__(self, config: TrainConfig, folder: Path, world: World | None = None) -> None:
        """Build the run, or take up the one that `folder` holds. Raises UserError for whatever cannot run."""
        self.config, self.folder, self.world = config, folder, world or World()
        self.device = choose_device(config.device)
        self.threads = set_threads(config.threads, processes=self.world.local_size)
        if self.device.type == "cpu":
            keep_freed_heap()
        found = latest_checkpoint(folder / "checkpoints", self.world)
        if found:
            verify_together(found, config, self.world)
            check_same_config(found, config)
        # 1. The model, sharded or copied; 2. the optimizer, which holds parameters and hence comes after sharding;
        # 3. their values, read in place; 4. the feature cache, whose keys digest these values.
        self.bundle, self.strategy, meter, self.table, frozen = build_training(config, found, self.world, self.device)
        self.model = self.bundle.model
        self.optimizer = build_optimizer(self.model, config.optim)
        self.state = restore(found, self.model, self.optimizer, frozen) if found else TrainState()
        # What checkpoints name instead of copying it
        self.frozen_weights = FrozenWeights() if config.training.save_frozen_weights else frozen
        if self.world.is_main:
            self.frozen_weights.start_hashing()
        self.model.feature_cache = open_feature_cache(config.data, self.model, precision=config.training.precision)
        # In any order from here on, but for collectives: all processes make the saver's group at the same point.
        processor = self.bundle.processor.with_feature_cache(self.model.feature_cache)
        self.objective = build_objective(config, self.bundle, processor, self.world, self.strategy)
        self.aligner = BatchAligner(self.world, self.model, processor.transforms)
        self.validator = Validator(config, processor, self.aligner, self.device)
        peak = peak_flops(self.device, precision=config.training.precision)
        self.step_metrics = StepMetrics(self.model, self.optimizer, self.world, meter=meter, peak=peak)
        self.failures = FailureLog(folder, self.world, self.state, config)
        self.run_logger = RunLogger(config, folder, self.world)
        self.preemption = PreemptionHandler()
        self.saver = Saver(folder / "checkpoints", self.world, keep=config.training.keep_checkpoints)

    def fit(self) -> None:
        """Train from where the run stands to its last step, or until a signal; the last checkpoint is then in place."""
        strategy = f"{self.world.size} x {self.device.type} ({self.strategy.name})"
        self.run_logger.start(self.state, f"{self.table}\n  {self.threads}", strategy)
        training, exit_code = self.config.training, 0
        with self.preemption, self.saver, self.run_logger.progress_bar(self.state.step) as bar:
            if self.state.step and self._evaluate():  # what was due where the run was stopped
                self.saver.link_best(self.state)
            loader = self.objective.batches(self.state.step)
            for step in range(self.state.step, training.steps):
                started = time.perf_counter()
                batches = [batch.to(self.device) for batch in next(loader)]
                waited = time.perf_counter() - started
                result = self.train_step(batches, step)
                if self.failures.limit_exceeded:
                    self._abort()
                self.state.step, exit_code = step + 1, result.exit_code
                self._log_step(bar, result, waited=waited, took=time.perf_counter() - started)
                resumable = self.objective.resumable(self.state.step)
                better = resumable and not exit_code and self._evaluate()
                last = self.state.step == training.steps or (bool(exit_code) and resumable)
                due = step % training.checkpoint_every == training.checkpoint_every - 1
                if last or better or (resumable and due and not self.state.consecutive_nonfinite):
                    self._save()
                if last:
                    break
        self._close_feature_cache()
        exit_code = exit_code or int(self.world.all_gather([self.preemption.code]).max())  # after the last step
        if exit_code:
            self.run_logger.close()
        self.world.barrier()  # the last checkpoint is in place for all, and whoever leaves first interrupts nobody
        if exit_code:
            self.run_logger.info(f"stopped after step {self.state.step}, saved; type the same command to go on")
            self.preemption.exit(exit_code)

    def _log_step(self, bar: tqdm, result: StepResult, *, waited: float, took: float) -> None:
        self.run_logger.update(bar, loss=result.loss, speed=result.tokens / took)
        if self._should_log(self.state.step):
            speed = self.step_metrics.throughput(result.metrics, tokens=result.tokens, waited=waited, took=took)
            self.run_logger.log_metrics(result.metrics | speed, step=self.state.step)
            self.run_logger.log_rollouts(self.objective.examples(), step=self.state.step)

    def _close_feature_cache(self) -> None:
        """Wait until all features are written; `shared_features` opens the cache anew for the final answers."""
        if self.model.feature_cache is not None:
            self.model.feature_cache.flush()
            self.model.feature_cache = None

    def train_step(self, batches: list[Batch], step: int) -> StepResult:
        """One optimizer step over a global batch, this process's part in `batches`; how it is cut changes nothing."""
        self.model.train()
        set_lr(self.optimizer, self._lr_factor(step))
        seed_step(self.config.seed, step, self.world.rank)
        self.failures.start_step()
        own = batches
        batches, totals = self.aligner.align(own, exit_code=self.preemption.code)
        self.failures.record_skipped(own, totals)
        logged = self._should_log(step + 1)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            with self.strategy.grad_sync(last=number == len(batches)):
                with self._autocast():
                    out = self.strategy(batch)
                    part = self.objective.loss(batch, out, totals)
                if logged:
                    self.step_metrics.update(batch, out)
                if part.requires_grad:  # not so where a batch has no label that trained weights lead to
                    (part * self.world.size).backward()  # processes take the mean of their gradients
            loss += part.detach()
        norms = self.step_metrics.grad_norms() if logged else {}
        norm, reached = self._clip_gradients(), self.world.all_reduce(loss).item()
        finite = math.isfinite(norm) and math.isfinite(reached)  # the same on all processes
        if finite:
            self.optimizer.step()
            self.state.consecutive_nonfinite = 0
        else:  # weights and moments stay, the schedule goes on
            self.failures.record_nonfinite(own, loss=reached, norm=norm)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {"train/loss": reached, "train/grad_norm": norm, **norms} if finite else {}
        metrics |= self._details(own, totals) if logged else {}
        reached = reached if finite else math.nan
        return StepResult(reached, tokens=totals.tokens, exit_code=totals.exit_code, metrics=metrics)

    def _details(self, own: list[Batch], totals: GlobalCounts) -> dict[str, float]:
        """Metrics of a logged step besides its loss and its gradient."""
        return {
            **self.step_metrics.learning_rates(),
            "train/nonfinite_steps": self.state.nonfinite_steps,
            "masking/fraction": totals.masked / max(totals.rows, 1),
            **self.step_metrics.compute(own),
            "data/skipped_records": self.state.skipped,
            **self.objective.metrics(),
        }

    def _abort(self) -> None:
        """End the run after too many non-finite steps, with a checkpoint from before them."""
        error = self.failures.error()
        self.state = self.failures.last_good
        self.saver.wait()
        there = self.folder / "checkpoints" / STEP_FOLDER.format(self.state.step)
        resumable = self.state.step and self.objective.resumable(self.state.step)
        if resumable and not self.world.broadcast(there.is_dir()):
            self.save()
        raise error

    def _lr_factor(self, step: int) -> float:
        optim = self.config.optim
        return lr_factor(step, steps=self.config.training.steps, warmup=optim.warmup_ratio, final=optim.min_lr_ratio)

    def _clip_gradients(self) -> float:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        limit = self.config.optim.max_grad_norm or float("inf")
        return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, limit)).item()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.precision != "fp32")

    def evaluate(self) -> dict[str, float]:
        """Teacher-forced metrics on test records (`Validator`)."""
        with self._autocast():
            return self.validator.validate(self.model)

    def _evaluate(self) -> bool:
        """Evaluate and log where due and not done yet. Returns True for the best so far by `training.best_metric`."""
        training, step = self.config.training, self.state.step
        due = training.eval_every and (step % training.eval_every == 0 or step == training.steps)
        if not (due and training.eval_rows) or step == self.state.evaluated_step:
            return False
        metrics = self.evaluate()
        if metrics:
            self.run_logger.log_metrics(metrics, step=step)
        self.state.evaluated_step = step
        return self.state.is_best(metrics, by=training.best_metric)

    def _save(self) -> None:
        held = self.save()
        self.run_logger.log_metrics({"perf/checkpoint_stall_seconds": held}, step=self.state.step)
        self.run_logger.info(f"checkpoint of step {self.state.step} begun; it held the loop for {held:.2f} s")

    def save(self) -> float:
        """Begin to write a checkpoint of this moment. Returns the seconds for which that held the loop."""
        own = unique_state_dict(self.model)
        tensors = {"model": {name: tensor for name, tensor in own.items() if name not in self.frozen_weights}}
        if states := optimizer_tensors(self.optimizer):  # none where every step so far was lost
            tensors["optimizer"] = states
        return self.saver.save(tensors, self.state, self._save_metadata)

    def _save_metadata(self, folder: Path) -> None:
        save_metadata(folder, self.bundle)
        self.frozen_weights.save(folder)

    def _should_log(self, step: int) -> bool:
        """Metrics of the step with this number, counted from 1, are logged."""
        return step % self.config.training.log_every == 0 or step == self.config.training.steps
