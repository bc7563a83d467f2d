"""The setup of a server, as Kubernetes' setup job does it, on a real server; and Prefect's commands on the pages."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.support.automations import AUTOMATIONS
from tests.flows.server_fixtures import ROOT, Environment, Running, answers, api, free_port, wait_until
from tests.infra.test_docs import PREFECT

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
JOBS = ROOT / "infra" / "kubernetes" / "jobs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("setup")
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    with Running(["server", "start", "--port", str(port)], environment, folder / "log"):
        wait_until(lambda: answers(environment["PREFECT_API_URL"] + "/health"), 60, folder / "log")
        yield environment


def test_setup_job_makes_pools_of_kubernetes_with_our_templates_and_our_deployments(server: Environment) -> None:
    job = yaml.safe_load((ROOT / "infra" / "kubernetes" / "setup.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    script = container["args"][0].replace("/jobs", str(JOBS))
    done = subprocess.run([*container["command"], script], cwd=ROOT, env=server, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pools = {pool["name"]: pool for pool in api(server, "/work_pools/filter", {})}
    assert {name: (pool["type"], pool["concurrency_limit"]) for name, pool in pools.items()} == {
        "cpu": ("kubernetes", None),
        "gpu": ("kubernetes", None),
        "train": ("kubernetes", 1),
    }
    for name, pool in pools.items():
        assert pool["base_job_template"] == json.loads((JOBS / f"{name}.json").read_text())
    used = {deployment["work_pool_name"] for deployment in api(server, "/deployments/filter", {})}
    assert used == set(pools)


def test_automations_again_change_nothing(server: Environment) -> None:
    def apply() -> dict[str, str]:
        subprocess.run([sys.executable, "-m", "flows.support.automations"], cwd=ROOT, env=server, check=True)
        return {one["name"]: one["id"] for one in api(server, "/automations/filter", {})}

    first = apply()
    assert set(first) == {automation.name for automation in AUTOMATIONS}
    assert apply() == first


@pytest.mark.parametrize("command", [command for command in PREFECT if PREFECT[command]], ids=" ".join)
def test_prefect_has_the_commands_of_the_pages(command: tuple[str, str]) -> None:
    said = subprocess.run([BIN / "prefect", *command, "--help"], capture_output=True, text=True, check=True).stdout
    for option in PREFECT[command]:
        assert re.search(rf"{option}\b", said), option
