"""Failed attempts: one request's own, the server's, or a setting's."""

from __future__ import annotations

import json
from typing import Any

from sdtrain.download.http.retry import retry_after_s
from sdtrain.errors import UserError

_BUSY = (429, 502, 503, 529)
_REJECTED = (400, 413, 415, 422)
_MOST_CHARS = 300


class BrokenAnswerError(Exception):
    """An attempt without a whole answer; another may succeed."""


class ServerBusyError(Exception):
    """The server takes no requests now; `retry_after_s` is how long it asks to wait, None if it does not say."""

    def __init__(self, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class RejectedError(Exception):
    """The server does not accept this request."""


class EndpointError(UserError):
    """The server cannot be used as it is configured."""


def failure_of_status(status: int, headers: Any, body: bytes, setting: str, url: str) -> Exception:
    """The failure that a status other than 200 means; an `EndpointError` is permanent.

    `setting` names the endpoint's section of the configuration, such as caption.endpoint.
    """
    said = _message(body)
    if status in (401, 403):
        return EndpointError(
            f"{setting}.api_key_env: {url} refuses access (HTTP {status}{said}). Name the environment variable that "
            "holds a valid key."
        )
    if status == 402 or (status == 429 and b"insufficient_quota" in body):
        return EndpointError(f"{setting}: the account at {url} has no credit left (HTTP {status}{said}).")
    if status == 404:
        return EndpointError(
            f"{setting}.model or {setting}.url: {url} answers 404{said}. The address usually ends in /v1, and the "
            "model must be one that the server lists under /models."
        )
    if 300 <= status < 400:
        target = headers.get("Location", "elsewhere")
        return EndpointError(f"{setting}.url: {url} redirects to {target}; redirects are not followed. Give that one.")
    if status in _BUSY:
        return ServerBusyError(f"HTTP {status}{said}", retry_after_s(headers.get("Retry-After")))
    if status in _REJECTED:
        return RejectedError(f"HTTP {status}{said}")
    if status >= 500 or status in (408, 409, 425):
        return BrokenAnswerError(f"HTTP {status}{said}")
    return EndpointError(f"{setting}.url: {url} answers HTTP {status}{said}.")


def _message(body: bytes) -> str:
    """The server's own words, shortened, after a colon; "" if there are none."""
    text = body.decode(errors="replace").strip()
    try:
        content = json.loads(text)
        error = content.get("error", content) if isinstance(content, dict) else content
        said = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
        text = said if isinstance(said, str) else json.dumps(said)
    except ValueError:
        text = "" if text.startswith("<") else text  # a page of a proxy
    text = " ".join(text.split())
    return f": {text[:_MOST_CHARS]}" if text else ""
