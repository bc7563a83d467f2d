"""Selection of samples, from metadata rows to decisions, each with its reason."""
