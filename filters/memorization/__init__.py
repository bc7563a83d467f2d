"""Search for training images that a model has memorised."""
