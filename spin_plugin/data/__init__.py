"""SFT rows to examples, examples and synthetic responses to pairs, and the order of the pairs."""
