"""What a run will need later is opened before its work begins."""
