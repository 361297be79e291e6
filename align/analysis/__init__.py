"""Measurements of stores and runs: alignment, linear probes, ablations."""
