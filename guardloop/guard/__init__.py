"""The safeguard model: prompt in the guard's own form, one forward pass, a verdict."""
