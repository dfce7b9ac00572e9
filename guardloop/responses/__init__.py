"""Responses: what a responder answers to the prompts that the guard let through."""
