"""`sail-align selftest`: checks and measurements of a machine."""
