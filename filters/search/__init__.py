"""Search for a dataset's images by caption or image, with SCORE's embeddings."""
