"""Measures a model's images: FID against CLIP score over guidance scales, always with the protocol."""
