"""Reads and writes models in other projects' formats: CompVis files and diffusers folders."""
