"""The main player: a micro-batch of pairs in, log-probabilities of their responses out."""
