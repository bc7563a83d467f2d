"""Latents of the packed pictures: the stage ENCODE."""
