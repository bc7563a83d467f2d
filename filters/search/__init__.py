"""Which images of a dataset are nearest to a caption or to another image, by the embeddings that SCORE stored."""
