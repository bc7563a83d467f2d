"""Rebuilds Stable Diffusion v1 from public data: from an image to a trained, documented model."""

import os

__version__ = "0.1.0"

# Before torch is imported, and handed on to child processes: a thread that waits for another one sleeps after a moment.
# By default GNU's OpenMP keeps its core busy for milliseconds, which beside other load made training 10 to 30 times as
# slow; with this many turns nothing is lost where the cores are idle (docs/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
