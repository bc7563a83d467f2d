"""Shared parts of flows: task runners, child processes, SLURM, progress, credentials, automations."""
