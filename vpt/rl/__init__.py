"""Reward learning: rollouts of groups of answers, their rewards, and the losses of policy gradient algorithms."""
