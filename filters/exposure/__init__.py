"""Finds the samples whose use in training is asked for."""
