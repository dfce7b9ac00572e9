"""Where weights come from: the hub, a folder, the registry, or the embedded models."""
