"""Whether a model draws its training pictures again."""
