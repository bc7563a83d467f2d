"""One prepared check of every CUDA path, for the few minutes in which a GPU is at hand."""
