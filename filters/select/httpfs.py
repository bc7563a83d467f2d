"""DuckDB's httpfs extension: metadata on S3, Google Cloud Storage, the Hugging Face hub or any web server."""

from __future__ import annotations

import importlib.util
import os
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import duckdb

from sdtrain.errors import UserError
from sdtrain.redaction import LEFT_OUT, remember_secrets, without_secrets

SCHEMES = ("s3", "s3a", "gs", "gcs", "hf", "http", "https")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_ADVICE = "pip install 'sdtrain[remote]'"


def is_remote(path: str) -> bool:
    """Returns whether `path` is a URL; raises `UserError` for an unsupported scheme."""
    scheme, separator, _ = path.partition("://")
    if separator and scheme.lower() not in SCHEMES:
        raise UserError(f"{without_secrets(path)} cannot be read: use a local path or {'://, '.join(SCHEMES)}://.")
    return bool(separator)


def whole_location(location: str, purpose: str) -> str:
    """Expands `${NAME}` in a recipe's path or URL; raises `UserError` if unset, or a record omits the credential."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise UserError(
                f"The recipe names {location} as {purpose}, and there is no environment variable {found[1]}."
            )
        return os.environ[found[1]]

    whole = _VARIABLE.sub(value, location)
    if whole.endswith(f"?{LEFT_OUT}"):
        shown = whole.removesuffix(f"?{LEFT_OUT}")
        raise UserError(
            f"{shown}, which the recipe names as {purpose}, needs its query or password, which a record never holds. "
            "Give the whole URL again (--metadata URL, or in a recipe file of your own), or write ${NAME} for it and "
            "set an environment variable of that name."
        )
    remember_secrets(whole)
    return whole


def load_remote(connection: duckdb.DuckDBPyConnection) -> None:
    """Lets `connection` read URLs, with any credentials in the environment.

    S3 and compatible stores: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION or
    AWS_DEFAULT_REGION, AWS_ENDPOINT_URL. Google: GCS_ACCESS_KEY_ID, GCS_SECRET_ACCESS_KEY (HMAC keys). Hugging Face:
    HF_TOKEN. They live as long as the connection and are never written. Proxies are those of HTTPS_PROXY, HTTP_PROXY,
    ALL_PROXY and NO_PROXY. Raises `UserError` if httpfs is not installed.
    """
    _load_httpfs(connection)
    _set_proxy(connection)
    _add_secret(connection, "s3", _s3_options())
    get = os.environ.get
    _add_secret(connection, "gcs", {"KEY_ID": get("GCS_ACCESS_KEY_ID"), "SECRET": get("GCS_SECRET_ACCESS_KEY")})
    _add_secret(connection, "huggingface", {"TOKEN": get("HF_TOKEN")})


def _load_httpfs(connection: duckdb.DuckDBPyConnection) -> None:
    version = str(connection.execute("SELECT version()").fetchall()[0][0])
    wheel = _wheel()
    file = wheel / "extensions" / version / "httpfs.duckdb_extension" if wheel else None
    try:
        # The wheel's file, if installed: needs no network and writes nothing to the user's home.
        connection.load_extension(str(file) if file and file.is_file() else "httpfs")
    except duckdb.Error as error:
        why = "is not installed"
        if wheel and file and not file.is_file():
            found = ", ".join(sorted(folder.name for folder in (wheel / "extensions").glob("*"))) or "none"
            why = f"is installed for DuckDB {found} only, and this is {version}"
        raise UserError(
            f"Reading s3://, gs://, hf:// and https:// needs DuckDB's extension httpfs, which {why}. "
            f"Install it: {_ADVICE}."
        ) from error


def _set_proxy(connection: duckdb.DuckDBPyConnection) -> None:
    """Passes HTTP_PROXY on in parts, because DuckDB fails at one with a login or a final slash.

    The extension's libcurl reads the other variables itself, where there is none of DuckDB's own.
    """
    found = urllib.request.getproxies_environment()
    value = "" if found.keys() & {"https", "all"} else found.get("http", "")
    parts = urlsplit(value if "://" in value else f"http://{value}")
    login = [unquote(word or "") for word in (parts.username, parts.password)]
    host = f"{parts.hostname}:{parts.port or 80}" if parts.hostname and parts.scheme == "http" else ""
    for name, setting in zip(("", "_username", "_password"), (host, *login), strict=True):
        connection.execute(f"SET http_proxy{name} = ?", [setting])


def _wheel() -> Path | None:
    """Returns the folder of the PyPI package duckdb-extension-httpfs."""
    found = importlib.util.find_spec("duckdb_extension_httpfs")
    return Path(found.origin).parent if found and found.origin else None


def _s3_options() -> dict[str, str | bool | None]:
    get = os.environ.get
    options: dict[str, str | bool | None] = {
        "KEY_ID": get("AWS_ACCESS_KEY_ID"),
        "SECRET": get("AWS_SECRET_ACCESS_KEY"),
        "SESSION_TOKEN": get("AWS_SESSION_TOKEN"),
        "REGION": get("AWS_REGION") or get("AWS_DEFAULT_REGION"),
    }
    endpoint = get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        # Buckets go in the path: self-hosted stores seldom have a host name for each bucket.
        options |= {"ENDPOINT": parts.netloc, "USE_SSL": parts.scheme == "https", "URL_STYLE": "path"}
    return options


def _add_secret(connection: duckdb.DuckDBPyConnection, kind: str, options: Mapping[str, str | bool | None]) -> None:
    given = {name: value for name, value in options.items() if value is not None and value != ""}
    if given:
        settings = ", ".join(f"{name} ?" for name in given)
        connection.execute(
            f"CREATE OR REPLACE TEMPORARY SECRET sdtrain_{kind} (TYPE {kind}, {settings})", [*given.values()]
        )
