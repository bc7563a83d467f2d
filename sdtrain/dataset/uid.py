"""The uid of a sample: the hex md5 of its URL, a line feed and its caption. SQL and Python agree."""

from __future__ import annotations

import hashlib


def uid_of(url: str, caption: str) -> str:
    """The uid, of a URL without white space around it; "" stands for what is missing."""
    return hashlib.md5(f"{url}\n{caption}".encode(), usedforsecurity=False).hexdigest()


def uid_sql(url: str = "url", caption: str = "caption") -> str:
    """SQL for the same."""
    return f"md5({uid_text_sql(url, caption)})"


def uid_text_sql(url: str, caption: str) -> str:
    """SQL for the text whose md5 is the uid."""
    return f"{url} || chr(10) || {caption}"
