"""Checks of a configuration for reward learning, before anything is loaded."""

from vpt.config.schema import TrainConfig
from vpt.errors import ConfigError


def check_rl(config: TrainConfig) -> None:
    """Raise ConfigError, with what to type, where reward learning cannot run as configured."""
    rl, generation = config.rl, config.generation
    if rl.algorithm == "none":
        return
    if config.init_from is None:
        raise ConfigError(
            f"rl.algorithm={rl.algorithm} learns from answers, so it starts from a run that can give some; "
            "type init_from=outputs/RUN"
        )
    if not config.encoder and not config.model.region_bins:
        raise ConfigError("rl needs a model with perception tokens; type encoder=[dino] or model.region_bins=8")
    if not rl.rewards:
        raise ConfigError("rl.rewards is empty; type +rewards=[correct]")
    if config.masking.para_mask_ratio and config.masking.para_mask_id:
        raise ConfigError("masking would make other log-probabilities than answers were drawn with; type masking=none")
    if generation.top_p < 1 or generation.top_k:
        raise ConfigError(
            f"generation.top_p={generation.top_p} and generation.top_k={generation.top_k} draw from another "
            "distribution than the loss has; type generation.top_p=1 generation.top_k=0"
        )
    if config.model.lora.dropout:
        raise ConfigError("dropout makes ratios of equal weights differ from 1; type model.lora.dropout=0")
    if config.data.on_error == "skip":
        raise ConfigError("data.on_error=skip is for records with labels; type data.on_error=raise")
    _check_numbers(config)


def _check_numbers(config: TrainConfig) -> None:
    rl, training = config.rl, config.training
    if training.batch_size % rl.num_generations:
        raise ConfigError(
            f"training.batch_size={training.batch_size} rollouts are no whole groups of "
            f"rl.num_generations={rl.num_generations}; make it a multiple"
        )
    period = rl.steps_per_generation * rl.num_iterations
    if training.steps % period:
        raise ConfigError(
            f"training.steps={training.steps} must be a multiple of the {period} steps that rollouts are trained on "
            "(rl.steps_per_generation times rl.num_iterations)"
        )
    if rl.algorithm == "dpo" and not (rl.beta and training.micro_batch_size > 1):
        raise ConfigError("rl.algorithm=dpo needs rl.beta above 0, such as 0.1, and training.micro_batch_size of 2")
