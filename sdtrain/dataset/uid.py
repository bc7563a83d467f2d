"""The uid of a sample: the hex md5 of its URL, a line feed and its caption. SQL and Python agree."""

from __future__ import annotations

import hashlib


def uid_of(url: str, caption: str) -> str:
    """The uid; the URL is stripped of white space, and "" stands for a missing value."""
    return hashlib.md5(f"{url}\n{caption}".encode(), usedforsecurity=False).hexdigest()


def uid_sql(url: str = "url", caption: str = "caption") -> str:
    """The uid as SQL."""
    return f"md5({uid_text_sql(url, caption)})"


def uid_text_sql(url: str, caption: str) -> str:
    """The text whose md5 is the uid, as SQL."""
    return f"{url} || chr(10) || {caption}"
