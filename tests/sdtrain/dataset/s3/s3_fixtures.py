"""What the tests know of their S3-compatible server."""

from __future__ import annotations

from pathlib import Path

import boto3

BUCKET, KEY_ID, SECRET = "bucket", "AKIATESTKEYIDENTITY0", "s3cr3t-of-the-test/AbCdEfGhIjKl"


class Store:
    """The server's address, and a client of our own to look into it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET, region_name="us-east-1"
        )

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Content by name below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return {
            key.removeprefix(f"{prefix}/"): self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in keys
        }

    def put(self, path: Path, key: str) -> None:
        self.client.upload_file(str(path), BUCKET, key)
