"""Shards, manifests and the stages that turn pictures into latents."""
