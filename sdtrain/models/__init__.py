"""The networks of Stable Diffusion and CLIP: how they are built, loaded, placed and sped up."""
