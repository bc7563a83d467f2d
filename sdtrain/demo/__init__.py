"""A little world to run the whole pipeline on: images, captions, a web server, tiny weights."""
