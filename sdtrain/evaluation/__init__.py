"""How good a model's images are: FID against CLIP score over guidance scales, with the protocol beside each."""
