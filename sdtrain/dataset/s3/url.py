"""Parses the URL of a dataset on S3 and locates its work folder."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sdtrain.dataset.files import refuse_url
from sdtrain.errors import UserError

MARKER = ".s3"
"""The file in a work folder that holds its dataset's URL."""
_SCHEMES = ("s3://", "s3a://")


@dataclass(frozen=True)
class S3Url:
    """A prefix in a bucket; all keys start with it, and it has no slashes at its ends."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def key(self, name: str) -> str:
        """The key of a file, by its name inside the dataset."""
        return f"{self.prefix}/{name}"


def is_s3(text: str) -> bool:
    """Whether a path is on S3."""
    return text.lower().startswith(_SCHEMES)


def parse_url(text: str) -> S3Url:
    """The bucket and prefix of a URL.

    UserError if one is missing, or there are excess parts, which the message does not repeat: they may be secret.
    """
    bucket, _, prefix = text.partition("://")[2].partition("/")
    if "@" in bucket or ":" in bucket or "?" in text or "#" in text:
        raise UserError(
            "An s3:// URL is bucket and prefix alone, such as s3://bucket/aesthetics. Credentials and endpoint come "
            "from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL."
        )
    parts = [part for part in prefix.split("/") if part]
    if not bucket or not parts:
        raise UserError(f"{text} names no place for a dataset: write s3://BUCKET/PREFIX.")
    return S3Url(bucket, "/".join(parts))


def work_parent() -> Path:
    """The folder of work folders: SDTRAIN_WORK_DIR, or `sdtrain/datasets` in the user's cache."""
    if named := os.environ.get("SDTRAIN_WORK_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdtrain" / "datasets"


def work_folder(url: S3Url, parent: Path | None = None) -> Path:
    """The local folder that mirrors a dataset on S3, the same for all processes that name the same dataset.

    `parent` is by default `work_parent()`. UserError if it is a URL.
    """
    parent = parent or work_parent()
    # Two stores may have buckets of one name.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    digest = hashlib.sha256(f"{endpoint} {url}".encode()).hexdigest()[:12]
    return refuse_url(parent).expanduser().absolute() / f"{url.prefix.rpartition('/')[2]}-{digest}"
