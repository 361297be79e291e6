"""The scheduling of shards: local processes or Ray, retries, costs."""
