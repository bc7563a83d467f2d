"""Decodes, resizes, crops and stores pictures."""
