"""Drawing tokens."""

import numpy as np
import pytest
import torch

from vpt.generation.sampling import Sampling


class Fixed:
    """Dice that show one number."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


LOGITS = torch.tensor([[0.5, 0.2, 0.0, 0.15, 0.1, 0.05]]).log()


def drawn(sampling, logits=LOGITS, count=4000):
    rng = sampling.rng_for(3)
    chosen = sampling.sample(logits.expand(count, -1), [rng] * count)
    return np.bincount(chosen, minlength=logits.shape[1]) / count


def test_greedy_takes_the_likeliest():
    assert Sampling(top_k=3, seed=5).sample(LOGITS, [Fixed(0.99)]) == [0]
    assert Sampling(temperature=5.0, top_k=1).sample(LOGITS, [Fixed(0.99)]) == [0]


@pytest.mark.parametrize("value", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(value):
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [10, 500]] = 0.0
    assert Sampling(1.0).sample(logits, [Fixed(value)])[0] in (10, 500)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.2, 0, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0, 0]),
        ({"top_p": 0.8}, [0.5 / 0.85, 0.2 / 0.85, 0, 0.15 / 0.85, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.325, 0.04 / 0.325, 0, 0.0225 / 0.325, 0.01 / 0.325, 0.0025 / 0.325]),
    ],
)
def test_frequencies(settings, expected):
    """Within five standard errors; what is left out is never drawn."""
    expected = np.array(expected)
    got = drawn(Sampling(**{"temperature": 1.0} | settings))
    assert (np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()


def test_rows_draw_by_seed_and_number():
    logits = torch.zeros(1, 400)

    def row(seed, number):
        sampling = Sampling(1.0, seed=seed)
        rng = sampling.rng_for(number)
        return [sampling.sample(logits, [rng])[0] for _ in range(8)]

    assert row(0, 1) == row(0, 1)
    assert len({tuple(row(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6
