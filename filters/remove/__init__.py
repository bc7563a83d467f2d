"""Takes samples out of a finished dataset for good."""
