"""Frozen vision and language encoders behind two small protocols."""
