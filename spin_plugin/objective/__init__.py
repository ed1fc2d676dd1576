"""The SPIN objective: losses and metrics, computed from log-probs."""
