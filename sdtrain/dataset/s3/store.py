"""Reads and writes one bucket's objects through boto3; its errors are sentences without secrets."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdtrain.dataset.files import publish, sha256_of
from sdtrain.dataset.s3.url import S3Url
from sdtrain.errors import UserError

SHA256 = "sha256"
"""The metadata key of our objects' content digest."""
_DELETED_AT_ONCE = 1000
_MULTIPART_BYTES = 64 * 2**20
_FETCHED_AT_ONCE_BYTES = 8 * 2**20
_CONNECTIONS = 64
_NOT_THERE = "it is not there. Run the build again: it makes what is missing."
_MISSING = ("404", "NoSuchKey", "NotFound")
# 409: a concurrent conditional write. Missing: the object that the condition names is gone.
_CONFLICTS = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict", *_MISSING)
_BEYOND = ("416", "InvalidRange")
_PAUSES_S = (0.2, 1.0, 3.0)
"""Pauses before reading content again after a broken connection."""
_REFUSED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


@dataclass(frozen=True)
class Object:
    """An object in a bucket's listing."""

    size: int
    etag: str


@dataclass(frozen=True)
class Read:
    """A small object, read whole; both times are the store's own, so that no two clocks are compared."""

    content: bytes
    etag: str
    age_s: float


class ConflictError(Exception):
    """The condition of a conditional write does not hold."""


class ObjectStore:
    """The objects under one prefix, by their names below it.

    UserError if boto3 is not installed; in each method, if the store cannot be reached, refuses, or has no such bucket.
    """

    def __init__(self, url: S3Url) -> None:
        self.url = url
        self._client = _client(os.getpid())

    def list(self, begin: str = "", delimiter: str = "") -> dict[str, Object]:
        """All objects whose names start with `begin`, without those that have the delimiter after it."""
        found, num_before = dict[str, Object](), len(self.url.key(""))
        with self._sentences("listed"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.url.bucket, Prefix=self.url.key(begin), Delimiter=delimiter
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    found[item["Key"][num_before:]] = Object(item["Size"], item["ETag"].strip('"'))
        return found

    def digest(self, name: str) -> str | None:
        """The sha256 stored with an object; empty if its writer stored none, None if there is no object."""
        with self._sentences(f"read ({name})"):
            try:
                head = self._client.head_object(Bucket=self.url.bucket, Key=self.url.key(name))
            except self._client.exceptions.ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise
        return str(head["Metadata"].get(SHA256, ""))

    def put(self, path: Path, name: str, sha256: str | None = None) -> None:
        """Uploads a file of any size as an object, which appears whole or not at all."""
        from boto3.s3.transfer import TransferConfig

        extra = {"Metadata": {SHA256: sha256 or sha256_of(path)}}
        config = TransferConfig(multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES)
        with self._sentences(f"written ({name})"):
            self._client.upload_file(str(path), self.url.bucket, self.url.key(name), ExtraArgs=extra, Config=config)

    def put_bytes(self, content: bytes, name: str, **condition: str) -> str:
        """Writes a small object; returns its ETag. ConflictError if the condition does not hold.

        `condition` is `IfNoneMatch="*"` if there must be no object yet, or `IfMatch=etag` if it must be that one.
        """
        metadata = {SHA256: hashlib.sha256(content).hexdigest()}
        with self._sentences(f"written ({name})"):
            try:
                answer = self._client.put_object(
                    Bucket=self.url.bucket, Key=self.url.key(name), Body=content, Metadata=metadata, **condition
                )
            except self._client.exceptions.ClientError as error:
                if _code(error) in _CONFLICTS:
                    raise ConflictError from error
                raise
        return str(answer["ETag"]).strip('"')

    def read(self, name: str) -> Read | None:
        """A small object; None if there is none."""
        try:
            content, answer = self._get(name)
        except FileNotFoundError:
            return None
        return Read(content, answer["ETag"].strip('"'), _age_s(answer))

    def read_part(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Part of a large object, shorter if the object ends there; FileNotFoundError if there is none."""
        return self._get(name, Range=f"bytes={offset}-{offset + num_bytes - 1}")[0]

    def _content(self, name: str) -> bytes:
        try:
            return self._get(name)[0]
        except FileNotFoundError:
            raise UserError(f"{self.url} cannot be read ({name}): {_NOT_THERE}") from None

    def _get(self, name: str, **part: str) -> tuple[bytes, dict[str, Any]]:
        """Content and answer; retries connections that end within the content, which boto3 does not."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        with self._sentences(f"read ({name})"):
            for pause_s in _PAUSES_S:
                with suppress(IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    return self._get_once(name, part)
                time.sleep(pause_s)
            return self._get_once(name, part)

    def _get_once(self, name: str, part: dict[str, str]) -> tuple[bytes, dict[str, Any]]:
        try:
            answer = self._client.get_object(Bucket=self.url.bucket, Key=self.url.key(name), **part)
        except self._client.exceptions.ClientError as error:
            if _code(error) in _MISSING:
                raise FileNotFoundError(f"{self.url}/{name}") from None
            if _code(error) in _BEYOND:
                return b"", {}
            raise
        return answer["Body"].read(), answer

    def fetch(self, name: str, path: Path, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Fetches an object to `path`, its final name, once its content is verified.

        `sha256` is by default the digest stored with it; of known, small `num_bytes` one request is enough. UserError
        if it is missing, or has another content.
        """
        with self._sentences(f"read ({name})"), publish(path) as temporary:
            wanted = sha256 or self.digest(name)
            if num_bytes is not None and num_bytes <= _FETCHED_AT_ONCE_BYTES:
                temporary.write_bytes(self._content(name))
            else:
                self._client.download_file(self.url.bucket, self.url.key(name), str(temporary))
            if wanted and sha256_of(temporary) != wanted:
                raise UserError(
                    f"{self.url}/{name} has another content than the manifest says: it was changed while it was in "
                    "use, or is damaged. Run the command again; if it stays so, delete the object and build again."
                )

    def delete(self, *names: str) -> None:
        """Deletes objects; missing ones are no error."""
        for begin in range(0, len(names), _DELETED_AT_ONCE):
            keys = [{"Key": self.url.key(name)} for name in names[begin : begin + _DELETED_AT_ONCE]]
            with self._sentences("changed"):
                answer = self._client.delete_objects(Bucket=self.url.bucket, Delete={"Objects": keys, "Quiet": True})
            if refused := answer.get("Errors"):  # although the request succeeded
                raise UserError(
                    f"{self.url}: {refused[0].get('Key')} cannot be deleted ({refused[0].get('Code')}). Let the "
                    "credentials delete objects, and run the same command again."
                )

    def sweep(self) -> None:
        """Aborts a killed process's multipart uploads, which are not objects yet but are charged for."""
        with self._sentences("listed"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.url.bucket, Prefix=self.url.key("")
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                self._client.abort_multipart_upload(
                    Bucket=self.url.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    @contextmanager
    def _sentences(self, done: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise UserError(f"{self.url} cannot be {done}: {_why(error)}") from None  # the cause may show a request


def _why(error: BaseException) -> str:
    from botocore import exceptions

    cause = error.__cause__ or error.__context__
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
    if isinstance(error, exceptions.ResponseStreamingError | exceptions.IncompleteReadError):
        return "the connection ended before the content did. Run the same command again; what is finished is kept."
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        return "nobody answers at the store's address. Is the network up, and is AWS_ENDPOINT_URL right?"
    if not isinstance(error, exceptions.ClientError) and isinstance(cause, exceptions.ClientError):
        error = cause  # as transfers wrap it
    if not isinstance(error, exceptions.ClientError):
        return f"{type(error).__name__}. Run the same command again; everything finished before is kept."
    code = _code(error)
    if code == "NoSuchBucket":
        return "there is no such bucket. Make it first, or name another in the URL."
    if code in _REFUSED:
        return f"the store refuses these credentials ({code}). Check them, and what they may do in this bucket."
    if code in _MISSING:
        return _NOT_THERE
    return f"the store answers {code}. Run the same command again; everything finished before is kept."


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "an error"))


def _age_s(answer: dict[str, Any]) -> float:
    from email.utils import parsedate_to_datetime

    modified: datetime = answer["LastModified"]
    now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return (parsedate_to_datetime(now) - modified).total_seconds() if now else 0.0


@lru_cache(maxsize=1)
def _client(pid: int) -> Any:
    """One client for all threads of a process; a forked child must not share its parent's connections."""
    if not importlib.util.find_spec("boto3"):
        raise UserError(
            "Datasets on s3:// need boto3, which is not installed. Install it: pip install 'sdtrain[remote]'."
        )
    import boto3
    from botocore.config import Config

    for name in ("boto3", "botocore", "s3transfer"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below it they log signed requests
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a full pool is normal
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # Path-style addresses, because a self-hosted store seldom has a host name for each bucket.
    style = {"addressing_style": "path"} if endpoint else None
    config = Config(
        retries={"mode": "standard", "max_attempts": 6}, connect_timeout=10, max_pool_connections=_CONNECTIONS, s3=style
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    session = boto3.session.Session(region_name=region)
    return session.client("s3", config=config, region_name=session.region_name or "us-east-1")
