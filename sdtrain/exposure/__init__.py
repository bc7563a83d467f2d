"""Tells which optimizer steps of a run, and of the runs that it descends from, used a sample."""
