"""Tests. A package, because one that is installed has this name too and would come first."""
