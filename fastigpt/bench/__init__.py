"""Measures engines beside the machine's own limits: what `fastigpt bench` and benchmarks/ print."""
