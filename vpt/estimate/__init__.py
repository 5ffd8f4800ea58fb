"""What a run will need, from its configuration alone: `vpt estimate`. See `vpt.cli.estimate`."""
