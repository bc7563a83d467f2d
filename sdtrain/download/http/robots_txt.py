"""robots.txt as in RFC 9309."""

from __future__ import annotations

from protego import Protego
from yarl import URL

from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.robots import OUR_NAMES

PATH = "/robots.txt"
# Not to be had for good, which is as if there were none.
_NO_RULES = {"blocked_address", "too_many_redirects", "url_not_allowed"}


def parse_robots_txt(file: bytes | FetchError) -> Protego | None:
    """The rules of a robots.txt; None where there are none (4xx).

    Raises:
        FetchError: robots_txt where the server fails (5xx), which forbids everything. A site that cannot be reached
            gives the failure itself, which says more about its URLs.
    """
    if isinstance(file, bytes):
        return Protego.parse(file.decode("utf-8-sig", "replace"))
    if file.reason.startswith("http_5") or file.reason == "unknown_encoding":
        raise FetchError("robots_txt", "the rules cannot be read")
    if file.reason.startswith("http_") or file.reason in _NO_RULES:
        return None
    raise FetchError(file.reason, file.detail, passing=False)  # it was tried again already


def check_robots_txt(rules: Protego | None, url: URL) -> None:
    """Raises where the rules keep robots like this one away from `url`.

    Raises:
        FetchError: robots_txt.
    """
    if rules is not None and not all(rules.can_fetch(str(url), name) for name in OUR_NAMES):
        raise FetchError("robots_txt", "disallowed")
