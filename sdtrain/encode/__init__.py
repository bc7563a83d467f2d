"""Latents of the packed images: the stage ENCODE."""
