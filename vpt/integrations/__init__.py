"""What other people's evaluation programs need to ask our checkpoints."""
