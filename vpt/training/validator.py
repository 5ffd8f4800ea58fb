"""Teacher-forced loss and accuracy on test records while a run trains."""

import torch

from vpt.config.schema import TrainConfig
from vpt.data.build import build_masking, build_sources
from vpt.data.loader import eval_batches
from vpt.data.processor import Processor
from vpt.distributed.batch_alignment import BatchAligner
from vpt.errors import ConfigError, did_you_mean
from vpt.evaluation.teacher_forced import teacher_forced_metrics
from vpt.models.vpt import VPTModel


class Validator:
    """The first `training.eval_rows` test records, of which every process takes a share."""

    def __init__(self, config: TrainConfig, processor: Processor, aligner: BatchAligner, device: torch.device) -> None:
        """Raises ConfigError where `training.best_metric` is no metric of `validate`."""
        self.config, self.processor, self.aligner, self.device = config, processor, aligner, device
        vocabulary = processor.chat_template.vocabulary
        names = ["loss", "token_accuracy", *(f"perception/{name}" for name in vocabulary.perception_ids().values())]
        best, known = config.training.best_metric, [f"eval/{name}" for name in names]
        if best not in (None, *known):
            raise ConfigError(
                f"training.best_metric={best} is not a metric of the evaluation; it has {', '.join(known[:2])} and "
                f"eval/perception/TOKEN{did_you_mean(str(best), known)}"
            )
        self.sources, self.folders = build_sources(config.data.test, config, split="test")

    def validate(self, model: VPTModel) -> dict[str, float]:
        """`eval/loss`, `eval/token_accuracy`, and `eval/perception/NAME` for each perception token."""
        config, world = self.config, self.aligner.world
        batches = (
            ready
            for source, folder in zip(self.sources, self.folders, strict=True)
            for batch in eval_batches(
                source, folder, self.processor, build_masking(config), rows=config.training.eval_rows,
                batch_size=config.training.micro_batch_size, seed=config.seed, rank=world.rank, ranks=world.size,
                on_error=config.data.on_error,  # type: ignore[arg-type]  # one of the choices
            )
            for ready in self.aligner.align([batch.to(self.device)])[0]
        )  # fmt: skip
        return {f"eval/{key}": value for key, value in teacher_forced_metrics(model, batches, world).items()}
