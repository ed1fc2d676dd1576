"""One iteration: prepare the pairs, train on them, store the model."""
