"""The SCORE stage: network scores and quality measures of every image."""
