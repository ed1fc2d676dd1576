"""One iteration: prepare the pairs, train on them, save the model."""
