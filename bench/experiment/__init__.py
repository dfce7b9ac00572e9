"""The experiment behind docs/results.md: the recipe of GuardLoop against every control, over several seeds."""
