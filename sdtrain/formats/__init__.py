"""Models in the formats of others: CompVis files and diffusers folders, in and out."""
