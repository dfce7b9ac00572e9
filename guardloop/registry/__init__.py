"""Runs and adapters in MLflow: what was tried, what it brought, which adapter is the champion.

`registry.Registry` records, registers and promotes; `training_log` shows a training as it goes; `serving` serves.
Nothing is imported here, since MLflow takes seconds and settings alone do not need it.
"""
