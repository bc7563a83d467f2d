"""A small synthetic world for the whole pipeline: images, captions, a web server, tiny weights."""
