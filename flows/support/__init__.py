"""What flows share: task runners, child processes, SLURM, progress, credentials, automations."""
