"""Decodes, resizes, crops and stores images."""
