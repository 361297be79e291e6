"""The training loop: plan, step, processes, log."""
