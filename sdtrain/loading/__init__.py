"""Loads batches from latents or packed images, in an order that any number of ranks shares."""
