"""Files, leases, signals, progress and memory."""
