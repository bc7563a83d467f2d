"""A user's own images on disk: lists what a source holds, and reads its images for the download."""
