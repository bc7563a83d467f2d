"""Measures a model's images: FID against CLIP score over guidance scales, recorded with their protocol."""
