"""From prompts to pictures in a folder."""
