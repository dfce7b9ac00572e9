"""What is asked before a run: preflight, doctor, plan."""
