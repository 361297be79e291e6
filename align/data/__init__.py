"""From stores to shuffled batches of features."""
