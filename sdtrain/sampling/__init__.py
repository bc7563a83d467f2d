"""From prompts to images in a folder."""
