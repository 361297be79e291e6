"""Metrics with intervals, score records, reported numbers."""
