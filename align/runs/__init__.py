"""A run's folder: settings, checkpoints, claims."""
