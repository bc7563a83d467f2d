"""Credentials of an S3-compatible store, from a Prefect block."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdtrain.errors import UserError

_NAMES: tuple[str, ...] = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
)
_NAMES += ("AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@contextmanager
def s3_credentials(block: str | None) -> Iterator[None]:
    """Puts the values of an `AwsCredentials` block (if named) into this process's environment within the context.

    All s3:// access reads it, DuckDB's too; the values are in no parameter, log or argument list. It does not reach
    workers on other machines. UserError if there is no such block, or prefect-aws is not installed.
    """
    before = dict(os.environ)
    try:
        if block:
            held = _read(block)
            for name in _NAMES:  # values missing from the block must not come from another account
                os.environ.pop(name, None)
            os.environ.update(held)
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("AWS_") and name not in before]:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if name.startswith("AWS_")})


def _read(block: str) -> dict[str, str]:
    try:
        from prefect_aws import AwsCredentials
    except ImportError as error:
        raise UserError("Credentials from a block need prefect-aws: pip install 'sdtrain[remote]'.") from error
    try:
        held: Any = AwsCredentials.load(block)
    except ValueError as error:
        raise UserError(
            f"There is no block AwsCredentials named '{block}'. Make one in Prefect's page under Blocks, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the worker."
        ) from error
    secret, token = held.aws_secret_access_key, held.aws_session_token
    found = {
        "AWS_ACCESS_KEY_ID": held.aws_access_key_id,
        "AWS_SECRET_ACCESS_KEY": secret.get_secret_value() if secret else None,
        "AWS_SESSION_TOKEN": token.get_secret_value() if hasattr(token, "get_secret_value") else token,
        "AWS_PROFILE": held.profile_name,
        "AWS_DEFAULT_REGION": held.region_name,
        "AWS_ENDPOINT_URL": held.aws_client_parameters.endpoint_url,
    }
    return {name: str(value) for name, value in found.items() if value}
