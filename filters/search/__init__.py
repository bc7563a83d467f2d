"""Search for images of a dataset by caption or image, with the embeddings that SCORE stored."""
