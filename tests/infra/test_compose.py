"""The compose file as Docker Compose itself reads it; its processes run natively in test_compose_settings.py."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.support.automations import HEARTBEAT_S
from infra.box.bootstrap import POOLS
from infra.box.layout import Box, BoxDir
from infra.box.postgres import Postgres
from infra.box.programs import client_environment, server_program

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "compose"
BIN = Path(sys.executable).parent
WORKERS = [f"worker-{pool.name}" for pool in POOLS]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    command = [BIN / "docker-compose", "-f", FOLDER / "compose.yaml", "--profile", "gpu", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr
    return dict(json.loads(done.stdout)["services"])


def test_it_has_what_the_box_has(services: dict[str, Any]) -> None:
    assert set(services) >= {"postgres", "redis", "store", "server", "services", *WORKERS}


def test_images_are_pinned_to_the_versions_of_the_lock_file(services: dict[str, Any]) -> None:
    locked = re.search(r"^prefect==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"\d+\.\d+", tag), f"{name}: {service['image']}"
        if service["image"].startswith("sdtrain-"):
            assert tag == locked.group(1)


def test_nobody_is_root_but_the_one_that_gives_away_volumes(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if "user" not in service] == ["permissions"]
    assert services["permissions"]["cap_add"] == ["CHOWN"]
    assert services["permissions"]["network_mode"] == "none"
    for name, service in services.items():
        assert not service.get("user", "").startswith("0"), name
        assert service["cap_drop"] == ["ALL"], name


def test_every_lasting_service_is_watched_and_comes_back(services: dict[str, Any]) -> None:
    lasting = {name: service for name, service in services.items() if service.get("restart") == "unless-stopped"}
    assert set(lasting) == {"postgres", "redis", "store", "server", "services", *WORKERS}
    assert [name for name, service in lasting.items() if "healthcheck" not in service] == ["services"]


def test_only_the_page_is_published_and_only_on_loopback(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["server"]
    assert published["server"][0]["host_ip"] == "127.0.0.1"


def test_the_database_and_redis_have_no_way_out(services: dict[str, Any]) -> None:
    for name in ("postgres", "redis", "store", "services"):
        assert list(services[name]["networks"]) == ["inner"]


def test_secrets_come_from_files_only(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY|DOCKET_URL", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value.removeprefix("/run/secrets/") in {secret["source"] for secret in service["secrets"]}


def test_volumes_keep_database_and_data(services: dict[str, Any]) -> None:
    kept = {name: [volume["target"] for volume in services[name]["volumes"]] for name in ("postgres", "redis", "store")}
    assert kept == {"postgres": ["/var/lib/postgresql/data"], "redis": ["/data"], "store": ["/objects"]}
    assert all(services[name]["volumes"][0]["target"] == "/data" for name in WORKERS)


def test_server_and_workers_have_the_settings_of_the_box(services: dict[str, Any], tmp_path: Path) -> None:
    """Where both have a setting, it is the same; where they differ, it is because there are containers."""
    box = Box(BoxDir(tmp_path))
    own = server_program(box, Postgres(box.directory, tmp_path, 5432, None)).environment
    shared = {
        name: value for name, value in own.items() if "RETENTION" in name or "VACUUM" in name or "ANALYTICS" in name
    }
    assert len(shared) == 5
    for name in ("server", "services"):
        assert services[name]["environment"] | shared == services[name]["environment"]
    for name in WORKERS:
        assert services[name]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_S)
    assert client_environment(box)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_S)


def test_each_worker_serves_its_pool(services: dict[str, Any]) -> None:
    for pool in POOLS:
        command = services[f"worker-{pool.name}"]["command"]
        assert command[command.index("--pool") + 1] == pool.name


def test_secrets_are_made_once_and_hidden(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "make-secrets", tmp_path)
    for _ in range(2):
        subprocess.run([tmp_path / "make-secrets"], check=True, capture_output=True)
        if (known := tmp_path / "known").exists():
            assert known.read_text() == (tmp_path / "secrets" / "postgres_password").read_text()
        known.write_text((tmp_path / "secrets" / "postgres_password").read_text())
    folder = tmp_path / "secrets"
    assert folder.stat().st_mode & 0o077 == 0
    assert len((folder / "postgres_password").read_text()) == 48
    assert (
        json.loads((folder / "s3_config.json").read_text())["identities"][0]["credentials"][0]["secretKey"]
        == (folder / "s3_secret_key").read_text()
    )
    needed = set(re.findall(r"file: secrets/(\S+?)\}", (FOLDER / "compose.yaml").read_text()))
    assert needed == {file.name for file in folder.iterdir()}


def entrypoint(environment: dict[str, str], secrets: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    variables = {"PATH": "/usr/bin:/bin", "SDTRAIN_SECRETS": str(secrets), **environment}
    return subprocess.run(
        ["sh", FOLDER / "entrypoint.sh", *command], env=variables, capture_output=True, text=True, timeout=20
    )


def test_entrypoint_reads_secrets_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("a $word 'with\" signs")
    environment = {"SOME_WORD_FILE": f"{tmp_path}/word", "SSL_CERT_FILE": "/etc/ssl/cert.pem"}
    said = entrypoint(environment, tmp_path, "env").stdout
    assert "SOME_WORD=a $word 'with\" signs\n" in said
    assert "SSL_CERT_FILE=/etc/ssl/cert.pem\n" in said
    assert "SOME_WORD_FILE" not in said


def test_missing_secret_is_a_sentence(tmp_path: Path) -> None:
    done = entrypoint({"SOME_WORD_FILE": f"{tmp_path}/none"}, tmp_path, "true")
    assert done.returncode == 2
    assert "which SOME_WORD_FILE names, cannot be read" in done.stderr


def test_dockerfile_passes_its_linter() -> None:
    done = subprocess.run([BIN / "hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_images_get_all_that_they_copy_and_no_secrets() -> None:
    allowed = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert all((ROOT / name).exists() for name in allowed)
    assert not any("secrets" in name for name in allowed)
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert name == "." or name in allowed
