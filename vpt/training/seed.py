"""Random numbers of a step (LoRA's dropout; nothing else) as a function of the step's number.

Generators' states would have to be kept for every process and every device, and would fit no other number of
processes. Instead all generators of a process are seeded before each step with the run's seed, the step and the rank.
Checkpoints hold the first two, so a run that goes on draws what it would have drawn, on CPUs and GPUs, whatever has
been drawn meanwhile: by an evaluation, or by steps that were lost and are tried again.

Processes draw apart from each other, since they have other rows. A run that goes on with another number of processes
draws from there on what a run of that many would have drawn: other masks of the same distribution.
"""

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators, those of all devices, for the step with this number (counted from 0) on this process."""
    [seed_of_step] = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(seed_of_step))
