"""Whether a model draws its training images again."""
