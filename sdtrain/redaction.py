"""Keeps the secrets of URLs and of the environment out of messages, logs and records."""

from __future__ import annotations

import html
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any
from urllib.parse import parse_qsl, unquote, unquote_plus

LEFT_OUT = "credential-not-recorded"
"""Replaces the query and password of a URL in records."""
HIDDEN = "…"
PLAIN_LOCATION = r"^(?!.*://[^/?#]*@)(?!.*\?[^/]*=).*$"
"""JSON schema pattern of a path or URL without credentials."""


class _HasPattern:
    """Adds the pattern to pydantic's JSON schema without importing pydantic; does not validate values."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        return handler(core) | {"pattern": PLAIN_LOCATION}


Location = Annotated[str, _HasPattern()]
"""A path or URL; as a flow parameter without password or query, because the server would store them."""

# Here `?` begins a query only before `name=`; elsewhere it is a wildcard. DuckDB's s3:// has queries, and no such
# wildcard.
_GLOB_SCHEMES = ("hf", "file")
_RUN = r"[^\s\"'<>`“”]+"
# pathlib reduces a URL's slashes to one.
_URL = re.compile(
    rf"([a-z][a-z0-9+.-]*)(://|%3a%2f%2f)({_RUN})|\b(https?|s3a?|gs|gcs|hf|ftp)(:/)(?=[^/])({_RUN})", re.I
)
_WHOLE = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.I | re.S)
_END = re.compile(r"[).,:;\]}]*$")
_NO_PORT = re.compile(r"[^:\[\]]*:(?!\d*$)")
_NAMED_QUERY = re.compile(rf"\?(?:[\w.~%\[\]-]+=|{HIDDEN})")
_BARE_QUERY = re.compile(rf"\?[\w.~%\[\]-]+={_RUN}")
_BARE_LOGIN = re.compile(r"(?<![\w/:@.+-])[\w.+%-]+:[^\s/@'\"<>]+@(?=[\w\[])")
_REVEALING_NAME = (
    r"[\w.-]*(?:secret|passw(?:or)?d|signature|credential|security[_-]token|session[_-]token|auth[_-]token|"
    r"access[_-]token|api[_-]?key|access[_-]?key)[\w.-]*|\bsig|\btoken|\bpwd"
)
_NAMED = re.compile(rf"((?:{_REVEALING_NAME})[\"']?(?:=[\"']?|\s*:\s*[\"']))([^\s&\"'<>,;)]+)", re.I)
_HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:basic|bearer|digest)\s+)?[^\s\"',]+", re.I)
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bBearer\s+[\w.~+/=-]{16,}")
_REVEALING_VARIABLE = re.compile(
    r"(?<![A-Z])(SECRET|TOKEN|PASSWORD|PASSWD|API_KEY|APIKEY|SECRET_ACCESS_KEY|AUTH_STRING|DSN)(?![A-Z])"
)
# Plain words in URLs of S3, GCS and DuckDB: redacted everywhere, they would make messages unreadable.
_HARMLESS_NAME = re.compile(
    r"(?:s3_)?(?:region|endpoint|url_style|use_ssl)|x-(?:amz|goog)-(?:algorithm|date|expires|signedheaders)|"
    r"response-content-\w+|versionid|download|sv|sr|sp|spr|st|se",
    re.I,
)
_LEAST_CHARS = 8  # shortest value redacted wherever it occurs

_known: set[str] = set()


def without_secrets(text: str) -> str:
    """Removes users, passwords, queries and fragments from a text's URLs, and all known secrets."""
    if known := frozenset([*_known, *_of_environment()]):
        text = _any_of(known).sub(HIDDEN, text)
    text = _URL.sub(_shown_url, text)
    text = _BARE_LOGIN.sub("", _BARE_QUERY.sub("", text))
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, _NAMED.sub(rf"\1{HIDDEN}", text))


def remember_secrets(content: Any) -> None:
    """Registers the secrets in the URLs of nested settings for `without_secrets` to hide in any spelling."""
    for text in _texts(content):
        for secret in _secrets_of(text):
            _known.update(_decoded(secret))


def remember_secret(secret: str) -> None:
    """Registers a secret for `without_secrets` to hide in any spelling."""
    _known.update(_decoded(secret))


def holds_secret(location: str) -> bool:
    """Whether a path or URL has a user, password, query or fragment."""
    url = _WHOLE.fullmatch(location.strip())
    return url is not None and _stripped(url[1], url[2]) != url[2]


def as_recorded(content: Any) -> Any:
    """Replaces the secrets in the URLs of nested settings by `LEFT_OUT`."""
    if isinstance(content, dict):
        return {name: as_recorded(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(as_recorded, content))
    url = _WHOLE.fullmatch(content.strip()) if isinstance(content, str) else None
    if not url or not holds_secret(content):
        return content
    scheme, rest = url.groups()
    return f"{scheme}://{_stripped(scheme, rest)}?{LEFT_OUT}"


def safe_error(error: Exception) -> Exception:
    """Returns the error, or a redacted substitute if its text or that of a cause holds a secret."""
    seen, chain = set[int](), [error]
    while chain:
        one = chain.pop()
        if id(one) not in seen:
            seen.add(id(one))
            if without_secrets(str(one)) != str(one):
                shown = RuntimeError(without_secrets(f"{type(error).__name__}: {error}"))
                shown.__suppress_context__ = True
                return shown.with_traceback(error.__traceback__)
            chain += [other for other in (one.__cause__, one.__context__) if isinstance(other, Exception)]
    return error


def hide_secrets_in_logs() -> None:
    """Redacts all log records and printed tracebacks of this process; idempotent.

    Hooks into the creation of records, because handlers come and go and some libraries bring their own.
    """
    sys.excepthook = print_error
    threading.excepthook = lambda raised: print_error(
        raised.exc_type, raised.exc_value or raised.exc_type(), raised.exc_traceback
    )
    factory = logging.getLogRecordFactory()
    if getattr(factory, "hides_secrets", False):
        return

    def make(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = factory(*arguments, **named)
        _clean(record)
        return record

    make.hides_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook` that redacts."""
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        sys.__excepthook__(kind, error, trace)
        return
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _clean(record: logging.LogRecord) -> None:
    if isinstance(record.args, tuple):
        record.args = tuple(without_secrets(value) if isinstance(value, str) else value for value in record.args)
    try:
        said = record.getMessage()
    except (TypeError, ValueError, KeyError):  # logging reports it
        return
    if (shown := without_secrets(said)) != said:
        record.msg, record.args = shown, ()
    if record.exc_info and record.exc_info[1] is not None:
        # Handlers do not format existing text again.
        record.exc_text = without_secrets("".join(traceback.format_exception(record.exc_info[1])).rstrip("\n"))


def _shown_url(found: re.Match[str]) -> str:
    scheme, separator, rest = found[1] or found[4], found[2] or found[5], found[3] or found[6]
    if separator.startswith("%"):
        separator, rest = "://", unquote(rest)
    end = _END.search(rest)
    punctuation = end[0] if end else ""
    return f"{scheme}{separator}{_stripped(scheme, rest.removesuffix(punctuation))}{punctuation}"


def _stripped(scheme: str, rest: str) -> str:
    """Drops user, password, query and fragment from a URL without its scheme."""
    rest = rest[_login_end(rest) :]
    if scheme.lower() in _GLOB_SCHEMES:
        query = _NAMED_QUERY.search(rest)
        rest = rest[: query.start()] if query else rest
    else:
        rest = rest.partition("?")[0]
    return rest.partition("#")[0]


def _login_end(rest: str) -> int:
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        return authority.rindex("@") + 1
    if "@" in rest and _NO_PORT.match(authority):  # a password with an unescaped slash
        return rest.rindex("@") + 1
    return 0


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list | tuple | set | frozenset):
        for value in content:
            yield from _texts(value)


def _secrets_of(text: str) -> Iterator[str]:
    """Yields a URL's user or password, its query, and values in it that may be signatures or keys."""
    url = _WHOLE.fullmatch(text.strip())
    if not url or not holds_secret(text):
        return
    scheme, rest = url.groups()
    login = rest[: max(0, _login_end(rest) - 1)]
    user, colon, password = login.partition(":")
    yield from (word for word in (login, password if colon else user) if len(word) >= 4)
    left = rest[len(login) :].lstrip("@")
    query = left[len(_stripped(scheme, left)) + 1 :]
    if query == LEFT_OUT:
        return
    if len(query) >= 4:
        yield query
    for name, value in parse_qsl(query.replace("#", "&")):
        is_named = re.fullmatch(_REVEALING_NAME, name, re.I)
        may_be_one = len(value) >= _LEAST_CHARS and not value.isdigit() and not _HARMLESS_NAME.fullmatch(name)
        if (is_named and len(value) >= 4) or may_be_one:
            yield value
    # Also raw, because an invalid escape is left undecoded by others.
    for part in re.split("[&#]", query):
        name, _, value = part.partition("=")
        if len(value) >= _LEAST_CHARS and not value.isdigit() and not _HARMLESS_NAME.fullmatch(name):
            yield value


def _of_environment() -> Iterator[str]:
    """Yields the secrets in this process's environment, as in AWS_SECRET_ACCESS_KEY or a proxy's password."""
    for name, value in os.environ.items():
        if "://" in value:
            for secret in _secrets_of(value):
                yield from _decoded(secret)
        elif _REVEALING_VARIABLE.search(name) and len(value) >= _LEAST_CHARS and not _is_path(value):
            yield from _decoded(value)


@lru_cache(maxsize=16)
def _any_of(secrets: frozenset[str]) -> re.Pattern[str]:
    """Longest first; short secrets match only whole words, because they may be part of others."""
    return re.compile("|".join(map(_any_spelling, sorted(secrets, key=lambda word: (-len(word), word)))), re.I)


def _is_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~", ".")) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _decoded(secret: str) -> set[str]:
    """The secret, raw and decoded."""
    return {word for word in (secret, unquote(secret), unquote_plus(secret)) if len(word) >= 4}


def _any_spelling(secret: str) -> str:
    """A pattern of the secret with each character raw, escaped for URLs (also twice), or for HTML."""
    spelt = "".join(char if char.isascii() and char.isalnum() else f"(?:{_any_escape(char)})" for char in secret)
    return spelt if len(secret) >= _LEAST_CHARS else rf"(?<!\w){spelt}(?!\w)"


def _any_escape(char: str) -> str:
    escaped = "".join(f"%(?:25)*{byte:02X}" for byte in char.encode(errors="surrogatepass"))
    known = [re.escape(char), escaped, *([r"\+"] if char == " " else []), re.escape(html.escape(char))]
    return "|".join(dict.fromkeys(known))
