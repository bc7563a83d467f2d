"""Inspection of a dataset: views, queries, status, metrics, the report."""
