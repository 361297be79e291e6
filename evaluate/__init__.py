"""Stage 3: score a run zero-shot."""
