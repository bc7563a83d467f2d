"""The decision which samples to keep, by scores and duplicates: the stage DECIDE."""
