"""Rebuilds Stable Diffusion v1 from public data: from an image to a trained, documented model."""

import os

__version__ = "0.1.0"

# Must precede the import of torch, and is inherited by child processes: waiting threads soon sleep. GNU OpenMP's
# default spins for milliseconds, which made training 10 to 30 times as slow beside other load (docs/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
