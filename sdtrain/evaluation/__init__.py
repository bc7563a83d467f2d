"""How good a model's pictures are: FID against CLIP score over guidance scales, with the protocol beside each."""
