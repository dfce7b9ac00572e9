"""Scoring: packed sequences on a GPU, batches elsewhere."""
