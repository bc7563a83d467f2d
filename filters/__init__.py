"""Which samples stay, and why."""
