"""Our checkpoints in other evaluation programs."""
