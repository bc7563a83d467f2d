"""The stage SELECT: rows of the metadata in shuffled order."""
