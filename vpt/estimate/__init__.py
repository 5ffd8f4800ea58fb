"""Estimate parameters, FLOPs, memory and time of a run from its configuration alone (`vpt estimate`)."""
