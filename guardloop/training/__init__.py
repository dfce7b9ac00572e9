"""Training the candidate: a LoRA adapter on the baseline."""
