"""Features computed elsewhere, brought into a store, and features of a store, written for other programs."""
