"""A little world to run the whole pipeline on: pictures, captions, a web server, tiny weights."""
