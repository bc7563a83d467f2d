"""What runs, in which order, where: thin Prefect flows."""
