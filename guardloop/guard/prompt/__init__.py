"""How a guard is asked and how its answer reads: families, templates, policies, verdicts."""
