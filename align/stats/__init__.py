"""Metrics, bootstrap intervals, tables and charts, shared with evaluate."""
