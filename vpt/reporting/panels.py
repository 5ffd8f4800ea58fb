"""Sections of dashboard panels, the same at W&B and on a local page."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Panel:
    """One plot over the steps.

    Attributes:
        title, metrics: the patterns of the metrics it shows.
        log: a logarithmic axis.
        smooth: long curves have their running mean drawn over them.
        mean: the mean of the metrics in place of each.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    smooth: bool = False
    mean: bool = False

    def metrics_of(self, runs: Mapping[str, Iterable[str]]) -> list[str]:
        """The metrics of all runs that belong here."""
        return self.shown(dict.fromkeys(name for known in runs.values() for name in known))

    def shown(self, known: Iterable[str]) -> list[str]:
        """The metrics of a run that belong here."""
        return [name for name in known if any(fnmatchcase(name, pattern) for pattern in self.metrics)]


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "train": (
        Panel("loss per labelled token", ("train/loss", "eval/loss"), log=True, smooth=True),
        Panel("gradient norm", ("train/grad_norm", "train/grad_norm/*"), log=True),
        Panel("learning rate", ("train/lr", "train/lr/*")),
        Panel("steps lost to a gradient that is not finite", ("train/nonfinite_steps",)),
    ),
    "rl": (
        Panel("reward", ("rl/reward",), smooth=True),
        Panel("deviation of the reward", ("rl/reward_std",), smooth=True),
        Panel("parts of the reward", ("rl/rewards/*",), smooth=True),
        Panel("share of rollouts that look again", ("rl/look_rate", "rl/look_rate/*"), smooth=True),
        Panel("perceived visual tokens of a rollout", ("rl/perceived_tokens",), smooth=True),
        Panel("share of groups whose rewards are all the same", ("rl/frac_reward_zero_std",)),
        Panel("entropy of drawn tokens", ("rl/entropy",), smooth=True),
        Panel("share of tokens that are clipped", ("rl/clip_ratio/*",)),
        Panel("KL to the reference", ("rl/kl",)),
        Panel(
            "log-probability, rollout against training",
            ("rl/log_prob_difference", "rl/log_prob_difference/max"),
            log=True,
        ),
        Panel("tokens of a rollout", ("rl/completions/length",)),
        Panel("share of rollouts cut off", ("rl/completions/clipped_ratio",)),
    ),
    "eval": (
        Panel("accuracy, teacher-forced", ("eval/token_accuracy",)),
        Panel("accuracy of tokens that ask for perception", ("eval/perception/*_start", "eval/perception/*_end")),
        Panel("accuracy of region cells", ("eval/perception/x_*", "eval/perception/y_*"), smooth=True, mean=True),
    ),
    "perception": (
        Panel("norm of control states", ("perception/control_state_norm",)),
        Panel("re-encoding actions in a row", ("perception/actions_per_row",)),
        Panel("accuracy in training: asking", ("perception/accuracy/*_start", "perception/accuracy/*_end")),
        Panel(
            "accuracy in training: region cells",
            ("perception/accuracy/x_*", "perception/accuracy/y_*"),
            smooth=True,
            mean=True,
        ),
    ),
    "masking": (Panel("share of rows that are masked", ("masking/*",)),),
    "perf": (
        Panel(
            "tokens and samples a second", ("perf/tokens_per_second", "perf/samples_per_second"), log=True, smooth=True
        ),
        Panel("seconds of a step", ("perf/seconds_per_step",)),
        Panel("share of the step that waits for data", ("perf/data_wait_fraction",)),
        Panel("utilisation: share of the peak", ("perf/mfu",)),
        Panel("seconds for which a checkpoint holds the loop", ("perf/checkpoint_stall_seconds",)),
        Panel("memory, GiB at the most", ("perf/peak_memory_gib",)),
    ),
    "data": (
        Panel("rows of a step", ("data/rows",)),
        Panel("records left out so far", ("data/skipped_records",)),
    ),
}
