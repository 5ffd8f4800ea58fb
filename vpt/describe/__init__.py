"""What a run will need, from its configuration alone: `python -m vpt.describe`. See `vpt.describe.__main__`."""
