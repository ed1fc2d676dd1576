"""SFT rows -> examples; examples and synthetic responses -> pairs; and the order of the pairs."""
