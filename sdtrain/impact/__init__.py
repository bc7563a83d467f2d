"""What computing costs the environment: energy counted or estimated, and the CO2 of it."""
