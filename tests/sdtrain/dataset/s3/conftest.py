"""A real S3-compatible server process on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET, Store


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"MOTO_S3_CUSTOM_ENDPOINTS": ""})
    store = Store(port)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    store.client.create_bucket(Bucket=BUCKET)
    yield store
    process.terminate()
    process.wait()
    log.close()


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    """The server, with credentials in this process's environment and work folders of this test's own."""
    from sdtrain.dataset import open as opening
    from sdtrain.dataset.s3 import mirror
    from sdtrain.dataset.s3 import store as module

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SDTRAIN_WORK_DIR", str(tmp_path / "work"))
    caches = (mirror._mirror, module._client, opening.training_root)
    for cache in caches:
        cache.cache_clear()
    yield server
    for cache in caches:
        cache.cache_clear()
