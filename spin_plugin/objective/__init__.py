"""The SPIN objective: log-probabilities in, losses and metrics out. Needs torch alone."""
