"""Which rows of the metadata are taken, in which order: the stage SELECT."""
