"""Running the pipeline: on this machine, and as compiled YAML. The only place besides components that knows KFP."""
