"""Downloads images into shards, and retries rows that failed: the stage DOWNLOAD."""
