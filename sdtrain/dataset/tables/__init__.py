"""Tables of a whole dataset, one file a shard: read in one scan, in memory that hardly grows with their number."""
