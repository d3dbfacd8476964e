"""Sampling from a policy, and the statistics of what comes back."""
