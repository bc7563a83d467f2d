"""Shards, manifests and the stages that turn images into latents."""
