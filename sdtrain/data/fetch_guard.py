"""The way to the web for img2dataset: public addresses only, within limits, and every failure has a reason.

`install` puts a `GuardedOpener` behind `urllib.request.urlopen`, which img2dataset calls. Proxies
of the environment are not used: behind one, nobody could tell which address is really asked.
"""

from __future__ import annotations

import io
import time
import urllib.request
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, urljoin, urlsplit

from sdtrain.data.addresses import why_not_allowed
from sdtrain.data.connections import Handler, Limits
from sdtrain.data.failures import FetchError, failure_of, is_worth_another_try

_FIRST_PAUSE_S = 0.25
_REDIRECTS = 5
_SAFE_IN_PATH = "%/:=&?~#+!$,;'@()*[]|"


class Answer(io.BytesIO):
    """A whole response body with its headers, as img2dataset reads it."""

    def __init__(self, body: bytes, headers: HTTPMessage) -> None:
        super().__init__(body)
        self.headers = headers


class GuardedOpener:
    """Stands in for urllib's opener: whole responses, or a `FetchError` whose text begins with the reason.

    Failures that may pass (no connection, cut short, 5xx, 429) are tried again after a pause;
    a page that does not exist, or a host that never answers, is asked for once.
    """

    def __init__(self, limits: Limits, num_retries: int) -> None:
        self.limits = limits
        self.num_retries = num_retries
        self._director = urllib.request.OpenerDirector()
        redirect = _Redirect(limits.allow_private)
        for handler in (Handler(limits), redirect, urllib.request.HTTPErrorProcessor(), _EveryErrorRaises()):
            self._director.add_handler(handler)

    def open(self, request: urllib.request.Request, data: None = None, timeout: float = 10) -> Answer:
        """Fetches one URL; the signature is the one that `urlopen` calls.

        Raises:
            FetchError: the last failure.
        """
        for attempt in range(self.num_retries + 1):
            try:
                return self._fetch(request, timeout)
            except FetchError as error:
                if attempt == self.num_retries or not is_worth_another_try(error.reason):
                    raise
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _fetch(self, original: urllib.request.Request, timeout_s: float) -> Answer:
        _check(original.full_url, self.limits.allow_private)
        # A new one each time, because urllib counts redirects in the request.
        request = urllib.request.Request(_quoted(original.full_url), headers=dict(original.header_items()))  # noqa: S310 - checked above
        request.deadline = time.monotonic() + self.limits.deadline_s  # type: ignore[attr-defined]
        try:
            with self._director.open(request, timeout=timeout_s) as response:
                return Answer(response.read(), response.headers)
        except (OSError, HTTPException, ValueError) as error:
            raise failure_of(error) from error


class _Redirect(urllib.request.HTTPRedirectHandler):
    max_redirections = _REDIRECTS
    max_repeats = _REDIRECTS

    def __init__(self, allow_private: bool) -> None:
        self.allow_private = allow_private

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        target = urljoin(req.full_url, newurl)
        _check(target, self.allow_private)
        request = super().redirect_request(req, fp, code, msg, headers, _quoted(target))
        if request is not None:
            request.deadline = req.deadline  # type: ignore[attr-defined]
        return request

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: HTTPMessage) -> Any:
        if len(getattr(req, "redirect_dict", ())) >= self.max_redirections or self._repeats(req) >= self.max_repeats:
            fp.close()
            raise FetchError("too_many_redirects", f"more than {self.max_redirections}")
        # urllib itself knows http, https and ftp; what it would refuse otherwise is a scheme of ours to name.
        location = headers.get("location") or headers.get("uri")
        if location:
            _check(urljoin(req.full_url, location), self.allow_private)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    @staticmethod
    def _repeats(req: Any) -> int:
        return max(getattr(req, "redirect_dict", {}).values(), default=0)


class _EveryErrorRaises(urllib.request.HTTPDefaultErrorHandler):
    def http_error_default(self, req: Any, fp: Any, code: int, msg: str, hdrs: HTTPMessage) -> Any:
        fp.close()
        raise HTTPError(req.full_url, code, msg, hdrs, None)


def install(limits: Limits, num_retries: int) -> None:
    """Makes every `urllib.request.urlopen` of this process go through the guard."""
    urllib.request.install_opener(GuardedOpener(limits, num_retries))  # type: ignore[arg-type]


def _check(url: str, allow_private: bool) -> None:
    why = why_not_allowed(url, allow_private)
    if why == "private_host":
        raise FetchError("blocked_address", "the host is private")
    if why is not None:
        raise FetchError("url_not_allowed", why)


def _quoted(url: str) -> str:
    """The URL with spaces and letters outside ASCII escaped, as browsers send it."""
    parts = urlsplit(url.strip())
    return parts._replace(path=quote(parts.path, _SAFE_IN_PATH), query=quote(parts.query, _SAFE_IN_PATH)).geturl()
