"""Which pictures of a dataset are nearest to a caption or to another picture, by the embeddings that SCORE stored."""
