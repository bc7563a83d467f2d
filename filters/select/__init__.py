"""The SELECT stage: filtered metadata rows in shuffled order."""
