"""The flow over S3 with workers in processes of their own: each writes for the one that holds the lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET, KEY_ID, SECRET
from tests.sdtrain.dataset.s3.test_build_on_s3 import digests, outputs, recipe, run  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

# The credentials are a Prefect block's, and not in the environment.
FLOW = """
import json, os, sys
from prefect_aws import AwsCredentials, AwsClientParameters
from flows.build_dataset import build_dataset

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    held = json.loads(sys.stdin.read())
    endpoint = AwsClientParameters(endpoint_url=held.pop("endpoint"))
    AwsCredentials(**held, aws_client_parameters=endpoint).save("lab", overwrite=True)
    build_dataset(**given, credentials="lab")
"""


def start_flow(server, given: dict[str, object], work: Path, log: Path) -> subprocess.Popen:
    script = log.with_name("flow.py")
    script.write_text(FLOW)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_"))}
    environment |= {"PREFECT_HOME": str(log.with_name("prefect")), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    environment |= {"SDTRAIN_LOCK_EXPIRY_S": "3", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}  # on a busy machine it takes its time
    command = [sys.executable, str(script), json.dumps(given | {"work_dir": str(work)})]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    held = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    process.stdin.write(json.dumps(held | {"endpoint": server.url}).encode())
    process.stdin.close()
    return process


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_workers_build_the_same_objects_and_stop_when_another_machine_takes_over(
    server,
    recipe,  # noqa: F811
    tmp_path,
    engine,
):
    log = tmp_path / "log"
    whole, shared = (f"s3://{BUCKET}/{engine}-{name}" for name in ("whole", "shared"))
    run(server, ["build", str(recipe), "--output", whole], tmp_path / "alone", log)

    given = {"recipe": str(recipe), "output": shared, "engine": engine, "workers": 2, "keep_local": False}
    slept = start_flow(server, given, tmp_path / "slept", log)
    begin = f"{engine}-shared/manifest/score/"
    deadline = time.monotonic() + 240
    while not server.client.list_objects_v2(Bucket=BUCKET, Prefix=begin).get("KeyCount"):
        assert slept.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.killpg(slept.pid, signal.SIGSTOP)  # a laptop that was closed
    time.sleep(4)
    run(server, ["build", str(recipe), "--output", shared, "--no-keep-local"], tmp_path / "next", log)
    built = server.objects(f"{engine}-shared")
    os.killpg(slept.pid, signal.SIGCONT)
    assert slept.wait(timeout=120) != 0
    assert "another one has taken" in log.read_text() or "another command has taken" in log.read_text()

    assert server.objects(f"{engine}-shared") == built, "whoever slept wrote nothing"
    assert digests(built) == digests(server.objects(f"{engine}-whole"))
    assert outputs(built) == {name: digests(built)[name] for name in outputs(built)}
    assert not list((tmp_path / "next").rglob("*.tar"))
    again = start_flow(server, given | {"output": f"s3://{BUCKET}/{engine}-again"}, tmp_path / "again", log)
    assert again.wait(timeout=300) == 0, log.read_text()
    assert digests(server.objects(f"{engine}-again")) == digests(built)
    assert not list((tmp_path / "again").rglob("*.tar"))
    assert SECRET not in log.read_text()
