"""Rebuilds Stable Diffusion v1 from public data: from a picture to a trained, documented model."""

__version__ = "0.1.0"
