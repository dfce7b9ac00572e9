"""Training the improved guard: a LoRA adapter on the default guard."""
