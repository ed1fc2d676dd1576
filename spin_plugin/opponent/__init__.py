"""The opponent: its weights and its log-probs of the pairs."""
