"""Prompts in: read from anywhere, normalised, deduplicated, and kept apart from the test set."""
