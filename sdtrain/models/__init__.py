"""The networks of Stable Diffusion and CLIP: built, placed and sped up."""
