"""Feature networks, and the metrics that compare two sets of their features."""
