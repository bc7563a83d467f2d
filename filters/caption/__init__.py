"""Several captions of each image, each with its source: the stage CAPTION."""
