"""What compose.yaml starts, started natively with its own settings: entrypoint, secrets, Redis, services apart.

Minutes; needs PostgreSQL and redis-server: `make test-long ARGS=tests/infra/test_compose_settings.py`.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from infra.box.layout import BoxDir
from infra.box.postgres import find_postgres
from infra.box.services import Program, Service
from tests.flows.server_fixtures import ROOT, answers, free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]
FOLDER = ROOT / "infra" / "compose"
BIN = Path(sys.executable).parent


class Composition:
    """Services of compose.yaml as processes of this machine: other addresses and folders, all else as it stands."""

    def __init__(self, stack: ExitStack):
        self.root = Path(tempfile.mkdtemp(prefix="sdtrain-compose-"))
        self.root.chmod(0o711)
        stack.callback(shutil.rmtree, self.root)
        self._stack = stack
        self._running: list[Service] = []
        shutil.copy(FOLDER / "make-secrets", self.root)
        subprocess.run([self.root / "make-secrets"], check=True, capture_output=True)
        self.secrets = self.root / "secrets"
        self.redis_port, self.api_port = free_port(), free_port()
        url = self.secrets / "redis_url"
        url.write_text(url.read_text().replace("@redis:6379", f"@127.0.0.1:{self.redis_port}"))
        command = [BIN / "docker-compose", "-f", FOLDER / "compose.yaml", "config", "--format", "json"]
        self.config = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)[
            "services"
        ]
        self.postgres = self._start_postgres()
        self._start_redis()

    def _start_postgres(self) -> Any:
        place = BoxDir(self.root)
        postgres = find_postgres(place, free_port())
        postgres.prepare()
        (self.secrets / "postgres_password").write_text(place.passfile.read_text().strip().rpartition(":")[2])
        self._start(postgres.program)
        wait_until(postgres.is_ready, 60)
        postgres.make_database()
        return postgres

    def _start_redis(self) -> None:
        """Compose's own command, but for folder and port; `$$` is compose's way to write a dollar."""
        script = self.config["redis"]["command"][-1].replace("$$", "$").replace("/run/secrets", str(self.secrets))
        (self.root / "redis").mkdir()
        script = script.replace("/tmp/redis.conf", f"{self.root}/redis.conf").replace(
            "dir /data", f"dir {self.root}/redis\\nport {self.redis_port}\\nbind 127.0.0.1"
        )
        self._start(Program("redis", ["sh", "-c", script]))
        password = (self.secrets / "redis_password").read_text()
        environment = {**os.environ, "REDISCLI_AUTH": password}
        ask = ["redis-cli", "-p", str(self.redis_port), "ping"]
        wait_until(lambda: "PONG" in subprocess.run(ask, env=environment, capture_output=True, text=True).stdout, 20)
        refused = subprocess.run(ask, capture_output=True, text=True).stdout
        assert "NOAUTH" in refused, "Redis lets everybody in"

    def environment(self, name: str) -> dict[str, str]:
        addresses = {
            "http://server:4200/api": f"http://127.0.0.1:{self.api_port}/api",
            "postgres": "127.0.0.1",
            "redis": "127.0.0.1",
            "5432": str(self.postgres.port),
            "6379": str(self.redis_port),
            "/tmp/prefect": str(self.root / f"home-{name}"),
        }
        wanted = {k: addresses.get(v, v) for k, v in self.config[name]["environment"].items()}
        wanted = {k: v.replace("/run/secrets", str(self.secrets)) for k, v in wanted.items()}
        return {**wanted, "SDTRAIN_SECRETS": str(self.secrets), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def command(self, name: str) -> list[str | Path]:
        replaced = {"0.0.0.0": "127.0.0.1", "4200": str(self.api_port), "--yes": "--yes"}
        return ["sh", FOLDER / "entrypoint.sh", *(replaced.get(part, part) for part in self.config[name]["command"])]

    def once(self, name: str) -> str:
        """A service that ends, such as the migration."""
        environment = {**os.environ, **self.environment(name)}
        done = subprocess.run(
            self.command(name), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str) -> None:
        self._start(Program(name, self.command(name), self.environment(name)))

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def _start(self, program: Program) -> None:
        service = Service(program, self.root, self.root / f"{program.name}.log")
        service.start()
        self._stack.callback(service.end)
        self._stack.callback(service.ask_to_end)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.api_port}/api"

    def ask(self, path: str, body: dict[str, Any] | None = None, password: bool = True) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if password:
            auth = base64.b64encode((self.secrets / "prefect_auth").read_bytes()).decode()
            headers["Authorization"] = f"Basic {auth}"
        with urllib.request.urlopen(urllib.request.Request(self.api + path, data, headers), timeout=10) as answer:
            return json.load(answer)


def wait_until(holds: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def composition() -> Iterator[Composition]:
    with ExitStack() as stack:
        composition = Composition(stack)
        composition.once("migrate")
        composition.start("server")
        composition.start("services")
        wait_until(lambda: answers(composition.api + "/health"), 90)
        composition.once("setup")
        composition.start("worker-cpu")
        yield composition


def test_nobody_gets_in_without_the_password(composition: Composition) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        composition.ask("/flow_runs/count", {}, password=False)
    assert composition.ask("/flow_runs/count", {}) == 0


def test_setup_has_made_pools_automations_and_deployments(composition: Composition) -> None:
    pools = {pool["name"]: pool["concurrency_limit"] for pool in composition.ask("/work_pools/filter", {})}
    assert pools == {"cpu": None, "gpu": None, "train": 1}
    assert len(composition.ask("/automations/filter", {})) == 2
    assert len(composition.ask("/deployments/filter", {})) >= 6


def test_worker_builds_the_demo_and_events_reach_the_services_through_redis(
    composition: Composition, tmp_path: Path
) -> None:
    environment = {**os.environ, **composition.environment("setup"), "PREFECT_PLUGINS_ENABLED": "true"}
    command = [
        "prefect",
        "deployment",
        "run",
        "build-demo",
        "-p",
        f"output={tmp_path}",
        "-p",
        "num_rows=100",
        "--watch",
    ]
    done = subprocess.run(
        ["sh", FOLDER / "entrypoint.sh", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr + composition.log("worker-cpu")
    assert (tmp_path / "data" / "latents" / "00000.tar").exists()
    password = (composition.secrets / "redis_password").read_text()
    keys = subprocess.run(
        ["redis-cli", "-p", str(composition.redis_port), "--scan"],
        env={**os.environ, "REDISCLI_AUTH": password},
        capture_output=True,
        text=True,
    ).stdout
    assert re.search("events", keys)
    # Task runs reach the database only by way of the services, which run apart from the server.
    wait_until(lambda: len(composition.ask("/task_runs/filter", {})) >= 7, 60)


def test_no_secret_is_in_a_log(composition: Composition) -> None:
    for secret in ("postgres_password", "redis_password", "prefect_auth", "s3_secret_key"):
        word = (composition.secrets / secret).read_text().removeprefix("admin:")
        assert [log.name for log in composition.root.glob("*.log") if word in log.read_text(errors="replace")] == []
