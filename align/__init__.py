"""Stage 2: train two light heads on stored features."""
