"""Why a picture could not be had: a short stable word for each way in which a download fails."""

from __future__ import annotations

import re
import socket
import ssl
from http.client import HTTPException, IncompleteRead
from urllib.error import HTTPError, URLError

MEANINGS: dict[str, str] = {
    "blocked_address": "the host's address is private or reserved",
    "connection_failed": "no connection to the host",
    "dns_failed": "the host's name is not known",
    "http_403": "the server refuses (403)",
    "http_404": "the page does not exist (404)",
    "http_410": "the page is gone (410)",
    "http_429": "the server was asked too often (429)",
    "invalid_answer": "the server does not speak HTTP properly",
    "not_an_image": "what came is not a picture that can be decoded",
    "robots_header": "the site opts out by X-Robots-Tag",
    "timeout": "the server was too slow",
    "tls_failed": "the server's certificate or TLS is not valid",
    "too_large": "the file is too large",
    "too_many_redirects": "redirected too often",
    "truncated": "the connection ended before the file did",
    "url_not_allowed": "not a plain http or https URL",
}
# Not "timeout": hosts that do not answer are many, each has had its full time, and a shard ends with its slowest row.
_PASSING = {"connection_failed", "dns_failed", "http_429", "truncated", "invalid_answer"}
_ROBOTS = "Use of image disallowed by X-Robots-Tag directive"  # img2dataset's words
_REASON = re.compile(r"([a-z0-9_]+): ")


class FetchError(Exception):
    """A failed download. Its text is `reason: detail`, and the same for the same failure.

    Attributes:
        reason: one of `MEANINGS`, or `http_` and a status code.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def failure_of(error: Exception) -> FetchError:
    """What urllib, http.client, ssl or the socket raised, as a `FetchError`."""
    if isinstance(error, FetchError):
        return error
    if isinstance(error, HTTPError):
        return FetchError(f"http_{error.code}", error.msg)
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return failure_of(error.reason)
    if isinstance(error, TimeoutError):
        return FetchError("timeout", "no answer in time")
    if isinstance(error, IncompleteRead):
        return FetchError("truncated", f"{error.expected} bytes more expected" if error.expected else "ended early")
    if isinstance(error, ssl.SSLCertVerificationError):
        return FetchError("tls_failed", error.verify_message)
    if isinstance(error, ssl.SSLError):
        return FetchError("tls_failed", error.reason or "handshake failed")
    if isinstance(error, socket.gaierror):
        return FetchError("dns_failed", "the name could not be resolved")
    if isinstance(error, OSError):
        return FetchError("connection_failed", error.strerror or type(error).__name__)
    if isinstance(error, HTTPException):
        return FetchError("invalid_answer", type(error).__name__)
    return FetchError("url_not_allowed", f"malformed ({type(error).__name__})")


def is_worth_another_try(reason: str) -> bool:
    """Whether a failure may be gone a moment later."""
    return reason in _PASSING or reason.startswith("http_5")


def reason_of(status: str, error_message: str | None) -> tuple[str, str]:
    """The reason of a row that img2dataset marks as failed, and its message without what changes from run to run."""
    message = error_message or "no message"
    if message == _ROBOTS:
        return "robots_header", message
    if status == "failed_to_resize":
        # OpenCV names its version and its source file, which are no business of the dataset.
        return "not_an_image", "the picture could not be decoded"
    match = _REASON.match(message)
    return (match.group(1), message) if match else ("connection_failed", message)


def meaning_of(reason: str) -> str:
    """A download reason in plain words."""
    return MEANINGS.get(reason) or re.sub(r"^http_(\d+)$", r"the server answered \1", reason).replace("_", " ")
