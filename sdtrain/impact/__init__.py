"""The environmental cost of computing: energy counted or estimated, and its CO2."""
