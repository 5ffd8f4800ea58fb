"""Rewards as a user would write them: functions of rollouts."""


def few_tokens(rollouts, *, scale=1.0):
    """Short answers are worth more."""
    return [-scale * len(one.draws) for one in rollouts]


def not_a_number(rollouts):
    return [float("nan")] * len(rollouts)


def too_few(rollouts):
    return [1.0]
