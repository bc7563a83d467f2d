"""Fetches images into shards, and rows that failed again: the stage DOWNLOAD."""
