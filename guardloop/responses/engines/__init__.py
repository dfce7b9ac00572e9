"""One module for each way to generate responses."""
