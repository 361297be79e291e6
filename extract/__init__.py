"""Stage 1: run frozen encoders over a data set once and keep the features in a store."""
