"""Estimates rows, disk, hours, money and CO2 of a dataset or a chain of runs, from rates with their sources."""
