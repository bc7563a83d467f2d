"""Credentials from a Prefect block are in the environment while a flow runs, and nowhere else."""

import os

import pytest
from prefect.testing.utilities import prefect_test_harness
from prefect_aws import AwsCredentials

from flows.support.credentials import s3_credentials
from sdtrain.errors import UserError


@pytest.mark.slow
def test_a_blocks_credentials_last_as_long_as_the_flow(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    with prefect_test_harness(server_startup_timeout=120):
        block = AwsCredentials(aws_access_key_id="the-id", aws_secret_access_key="s3cr3t")
        block.aws_client_parameters.endpoint_url = "http://store:9000"
        block.save("lab")
        with s3_credentials("lab"):
            assert os.environ["AWS_SECRET_ACCESS_KEY"] == "s3cr3t"
            assert os.environ["AWS_ENDPOINT_URL"] == "http://store:9000"
        assert {name for name in os.environ if name.startswith("AWS_")} == {"AWS_REGION"}
        with (
            pytest.raises(UserError, match="There is no block AwsCredentials named 'none'"),
            s3_credentials("none"),
        ):
            pass
