"""Runs on a cluster, through Kubeflow Pipelines."""
