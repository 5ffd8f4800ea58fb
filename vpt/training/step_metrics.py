"""Metrics of a logged step besides its loss; sums over processes travel in one collective."""

import resource
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vpt.distributed.dtensor import full_tensor
from vpt.distributed.process_group import World
from vpt.flops import FlopMeter
from vpt.models.output import Output
from vpt.models.vpt import VPTModel
from vpt.perception.batch import Batch
from vpt.perception.segments import by_stage
from vpt.training.optimizer import module_of


class StepMetrics:
    """Gradient norms by module, learning rates, perception metrics and throughput of one step."""

    def __init__(
        self, model: VPTModel, optimizer: torch.optim.Optimizer, world: World, *, meter: FlopMeter, peak: float
    ) -> None:  # fmt: skip
        """`meter` counts the FLOPs of a batch, `peak` are the FLOP/s that one process could reach."""
        self.optimizer, self.world, self.meter, self.peak = optimizer, world, meter, peak
        self._modules: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                self._modules.setdefault(module_of(name), []).append(parameter)
        self._device, self._names = model.device, model.vocabulary.perception_ids()
        rows = model.qwen.lm_head.weight.shape[0]
        self._place = torch.full((rows,), len(self._names))  # token -> its index among the names, or their number
        self._place[list(self._names)] = torch.arange(len(self._names))
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._flops = 0.0

    def update(self, batch: Batch, out: Output) -> None:
        """Keep of a micro-batch what `compute` needs."""
        self._seen.append((out.targets, out.correct, out.control_states.detach()[self._real_rows(batch)]))

    def _real_rows(self, batch: Batch) -> list[bool]:
        """For each of `Output.control_states`: whether its row is no dummy."""
        cuts = list(map(by_stage, batch.rows, self.meter.model.split_segments(batch.rows)))
        return [
            not batch.rows[row].dummy
            for stage in range(max(map(len, cuts)))
            for row, stages in enumerate(cuts)
            if stage < len(stages)
            for segment in stages[stage]
            for _ in segment.control_positions
        ]

    def grad_norms(self) -> dict[str, float]:
        """The norm of each module's gradient, before it is clipped."""
        norms = {
            module: full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            for module, parameters in self._modules.items()
        }
        return {f"train/grad_norm/{module}": norm.item() for module, norm in norms.items()}

    def learning_rates(self) -> dict[str, float]:
        """The learning rate, and that of each group with a factor of its own."""
        groups = self.optimizer.param_groups
        rates = {f"x{group['scale']:g}": group["lr"] for group in groups}
        scaled = {f"train/lr/{scale}": rate for scale, rate in rates.items()} if len(rates) > 1 else {}
        return {"train/lr": rates.get("x1", groups[0]["lr"])} | scaled

    def compute(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Perception and masking metrics over all processes; `batches` are this process's, without dummy rows."""
        seen, self._seen = self._seen, []
        count = len(self._names)
        tokens, states, norms = torch.zeros(2, count, dtype=torch.float64), 0, 0.0
        for targets, correct, control_states in seen:
            places = self._place.to(targets.device)[targets]
            tokens += torch.stack([p.bincount(minlength=count + 1)[:count] for p in (places, places[correct])]).cpu()
            states += len(control_states)
            norms += float(control_states.float().norm(dim=-1).sum())
        own = [row for batch in batches for row in batch.rows]
        flops = sum(cost.useful for batch in batches if batch.rows for cost in self.meter.step(batch).values())
        mine = [
            len(own), sum(bool(row.actions) for row in own), sum(bool(row.masked) for row in own),
            sum(len(row.actions) for row in own), states, norms, flops,
        ]  # fmt: skip
        sums = self.world.all_reduce(torch.cat([torch.tensor(mine, dtype=torch.float64), tokens.flatten()]))
        rows, acting, masked, actions, states, norms, self._flops = sums[: len(mine)].tolist()
        return {
            "masking/fraction_of_action_rows": masked / max(acting, 1),
            "perception/actions_per_row": actions / max(rows, 1),
            **({"perception/control_state_norm": norms / states} if states else {}),
            **self._accuracies(sums[len(mine) :].view(2, count)),
            "data/rows": rows,
        }

    def _accuracies(self, counts: Tensor) -> dict[str, float]:
        totals, correct = counts.tolist()
        return {
            f"perception/accuracy/{name}": right / labels
            for name, labels, right in zip(self._names.values(), totals, correct, strict=True)
            if labels
        }

    def throughput(self, metrics: Mapping[str, float], *, tokens: int, waited: float, took: float) -> dict[str, float]:
        """Speed and memory of the step that `compute` was last called for; MFU counts no recomputed work."""
        return {
            "perf/tokens_per_second": tokens / took,
            "perf/samples_per_second": metrics["data/rows"] / took,
            "perf/seconds_per_step": took,
            "perf/data_wait_fraction": waited / took,
            "perf/mfu": self._flops / (took * self.peak * self.world.size),
            "perf/peak_memory_gib": peak_memory(self._device) / 2**30,
        }


def peak_memory(device: torch.device) -> int:
    """Peak bytes that this process has held so far: on its GPU, or in memory where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
