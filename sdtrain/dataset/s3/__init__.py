"""Datasets on S3: a work folder on a local disk, mirrored under a prefix of a bucket."""
