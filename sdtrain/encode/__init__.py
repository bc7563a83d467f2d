"""Encodes the packed images into latents: the stage ENCODE."""
