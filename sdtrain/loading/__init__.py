"""From latents or packed pictures to batches, in an order that any number of ranks shares."""
