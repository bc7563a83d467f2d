"""How long to wait before asking again: what the server says, else longer each time and never in step with others."""

from __future__ import annotations

import random
import re
import time
from email.utils import parsedate_to_datetime

LONGEST_PAUSE_S = 60.0
"""A server that wants a longer rest gets it, but nobody waits for that: its URLs fail."""
_FIRST_PAUSE_S = 0.5


def backoff_s(attempt: int) -> float:
    """A random pause up to twice as long after each attempt (full jitter)."""
    return random.uniform(0, min(LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))


def retry_after_s(header: str | None) -> float | None:
    """The pause that a Retry-After header asks for, in seconds or as a date; None where it says nothing sensible."""
    text = (header or "").strip()
    if re.fullmatch(r"[0-9]{1,10}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
