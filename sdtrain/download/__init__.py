"""Downloads images into shards and retries failed rows: the stage DOWNLOAD."""
