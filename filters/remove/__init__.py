"""Permanent removal of samples from a finished dataset."""
