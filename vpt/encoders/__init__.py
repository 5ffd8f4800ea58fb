"""Re-encoders. One class and one YAML each; see `vpt.encoders.base`."""
