"""Rebuilds Stable Diffusion v1 from public data: from a picture to a trained, documented model."""

import os

__version__ = "0.1.0"

# Before torch is imported, and handed on to child processes: threads that wait for one another then sleep. By default
# they keep their core busy, so that beside any other load training is 10 to 30 times as slow; on an idle machine it
# makes no difference (docs/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
