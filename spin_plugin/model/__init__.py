"""The policy: a micro-batch of pairs in, log-probs of their responses out."""
