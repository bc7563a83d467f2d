"""The stage SCORE: scores by networks and measures of quality of every image."""
