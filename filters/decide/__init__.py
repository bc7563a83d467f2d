"""Which samples are kept by their scores and their duplicates: the stage KEEP."""
