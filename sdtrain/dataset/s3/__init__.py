"""Datasets on S3: a work folder on a local disk, and its mirror under a prefix of a bucket."""
