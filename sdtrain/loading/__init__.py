"""From latents or packed images to batches, in an order that any number of ranks shares."""
