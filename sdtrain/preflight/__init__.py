"""Opens everything that a run will need, before its work begins."""
