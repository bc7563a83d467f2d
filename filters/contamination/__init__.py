"""Search for an evaluation's prompts and reference images in the data that a model was trained on."""
