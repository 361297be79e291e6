"""Checks of a finished store: doctor, overlap, verify."""
