"""Gives every download failure one short, stable reason, and says whether it is transient.

`sdtrain.download.rows.failed_row` writes the reason of a `FetchError` or an `ImageError` to the images' table.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import ssl
from http import HTTPStatus

from aiohttp import (
    ClientError,
    ClientHttpProxyError,
    ClientPayloadError,
    ClientResponseError,
    InvalidURL,
    ServerDisconnectedError,
)
from aiohttp.client_exceptions import ClientConnectorCertificateError, ClientConnectorDNSError
from aiohttp.http_exceptions import ContentLengthError, HttpProcessingError, TransferEncodingError

_log = logging.getLogger(__name__)

MEANINGS: dict[str, str] = {
    "blocked_address": "the host's address is private or reserved",
    "connection_failed": "no connection to the host",
    "dns_failed": "the host's name is not known",
    "empty_body": "the answer or file is empty",
    "hash_mismatch": "the file is not the one whose md5 or sha256 the metadata gives",
    "http_403": "the server refuses (403)",
    "http_404": "the page does not exist (404)",
    "http_410": "the page is gone (410)",
    "http_429": "the server was asked too often (429)",
    "invalid_answer": "the server does not speak HTTP properly",
    "not_an_image": "what came is not an image that can be decoded",
    "other_format": "an image of a kind that is not read (SVG, PDF, ICO, 32-bit floats ...)",
    "proxy_failed": "the proxy refuses, or cannot be reached",
    "removed": "the image was taken out of the dataset for good",
    "resize_failed": "the image's shape cannot be resized or encoded",
    "robots_header": "the site opts out by X-Robots-Tag",
    "robots_txt": "the site opts out by robots.txt",
    "source_changed": "the file has changed since it was listed for the import",
    "source_missing": "the imported file is gone, or its row holds no image",
    "source_unreadable": "the imported file cannot be read",
    "tdm_reserved": "the site reserves text and data mining (TDMRep)",
    "timeout": "the server was too slow",
    "tls_failed": "the server's certificate or TLS is not valid",
    "too_large": "the file is too large",
    "too_many_pixels": "the image is larger than max_pixels",
    "too_many_redirects": "redirected too often",
    "truncated": "the file ends early, on the way or at the server",
    "unknown_encoding": "the answer is compressed in a way that was not asked for",
    "url_not_allowed": "not a plain http or https URL",
}
TOO_SLOW = "no answer in time"
"""The detail of every timeout, because the limit that is reached first depends on the moment."""
ENDED_EARLY = "the connection ended within the body"
INVALID_HTTP = "the answer is against the rules of HTTP"
_CLOSED_ERRORS = (BrokenPipeError, ConnectionAbortedError, ConnectionResetError)
_CLOSED = {errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED}
# Not "timeout": dead hosts are many, each has had its full time, and a shard ends with its slowest row.
_OF_SOURCES = {"source_missing", "source_unreadable"}
_TRANSIENT = {"connection_failed", "dns_failed", "http_429", "truncated", "invalid_answer", "proxy_failed"}
_NOT_REACHED_BY_PROXY = {502, 503, 504} | _OF_SOURCES


class FetchError(Exception):
    """A failed download. Its text is `reason: detail`, the same for the same failure.

    `reason` is one of `MEANINGS`, or `http_` and a status code; `transient` says whether a retry may succeed, by
    default as `is_transient` decides.
    """

    def __init__(self, reason: str, detail: str, transient: bool | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.transient = is_transient(reason) if transient is None else transient

    def again(self) -> FetchError:
        """A copy for another URL: an exception raised twice collects both tracebacks."""
        return FetchError(self.reason, self.detail, self.transient)


def failure_of(error: Exception) -> FetchError:
    """Converts an exception of aiohttp, ssl or the socket."""
    if isinstance(error, FetchError):
        return error
    if isinstance(error, TimeoutError):  # aiohttp's timeouts too, which are also OSErrors
        return FetchError("timeout", TOO_SLOW)
    if isinstance(error, (ssl.SSLError, ssl.CertificateError, ClientConnectorCertificateError)):
        return _tls_failure(error)
    if isinstance(error, (socket.gaierror, ClientConnectorDNSError)):
        return FetchError("dns_failed", "the name could not be resolved")
    if isinstance(error, OSError):
        inner = getattr(error, "os_error", error)
        if error.errno in _CLOSED or isinstance(inner, _CLOSED_ERRORS):  # or no error at all: it depends on the moment
            return FetchError("connection_failed", "closed before an answer")
        # By number: the text of an error of several attempts names addresses in the order in which they failed.
        return FetchError("connection_failed", os.strerror(error.errno) if error.errno else "no address answers")
    if isinstance(error, (InvalidURL, UnicodeError)):
        return FetchError("url_not_allowed", "malformed")
    if isinstance(error, ClientError):
        return _http_failure(error)
    # An unforeseen failure must lose one image, not the shard, but must be reported.
    _log.error("Unexpected failure of a download", exc_info=error)
    return FetchError("invalid_answer", f"unexpected {type(error).__name__}", transient=False)


def _tls_failure(error: Exception) -> FetchError:
    inner = error.certificate_error if isinstance(error, ClientConnectorCertificateError) else error
    detail = getattr(inner, "verify_message", None) or getattr(inner, "reason", None) or "handshake failed"
    return FetchError("tls_failed", str(detail))


def _http_failure(error: ClientError) -> FetchError:
    if isinstance(error, ClientPayloadError):
        return _body_failure(error)
    if isinstance(error, ClientHttpProxyError):
        return failure_of_proxy(error.status)
    if isinstance(error, ServerDisconnectedError):
        return FetchError("connection_failed", "closed before an answer")
    if isinstance(error, ClientResponseError):
        return FetchError("invalid_answer", INVALID_HTTP)
    return FetchError("connection_failed", type(error).__name__)


def _body_failure(error: ClientPayloadError) -> FetchError:
    cause = error.__cause__
    ended = isinstance(cause, (ContentLengthError, TransferEncodingError)) and "Not enough data" in str(cause)
    if isinstance(cause, HttpProcessingError) and not ended:
        return FetchError("invalid_answer", INVALID_HTTP)
    return FetchError("truncated", ENDED_EARLY)


def failure_of_status(status: int) -> FetchError:
    """Converts a status other than success, in our own words because servers invent theirs."""
    known = status in set(HTTPStatus)
    return FetchError(f"http_{status}", HTTPStatus(status).phrase if known else "no standard status")


def failure_of_proxy(status: int) -> FetchError:
    """Converts a proxy's own refusal: to log us in, or to connect us with a host."""
    if status in _NOT_REACHED_BY_PROXY:
        return FetchError("connection_failed", f"the proxy does not reach the host ({status})")
    why = "asks for another login" if status == 407 else "refuses"
    return FetchError("proxy_failed", f"the proxy {why} ({status})", transient=False)


def is_transient(reason: str) -> bool:
    """Whether a retry may succeed."""
    return reason in _TRANSIENT or reason.startswith("http_5")


def meaning_of(reason: str) -> str:
    """A download reason in plain words."""
    return MEANINGS.get(reason) or re.sub(r"^http_(\d+)$", r"the server answered \1", reason).replace("_", " ")
