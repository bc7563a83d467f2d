"""The box's programs and their settings: Prefect's server, workers, and bootstrap."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from infra.box.layout import ROOT, Box
from infra.box.postgres import Postgres
from infra.box.services import BOX_MARK, Program, tail
from sdtrain.dataset.files import publish
from sdtrain.errors import UserError

_KEEP_EVENTS = "P2D"
_KEEP_HEARTBEATS_S = 3600
_KEEP_RUNS_S = 30 * 24 * 3600
_HEARTBEAT_S = 30  # as in flows.support.automations, which would import Prefect


def client_environment(box: Box) -> dict[str, str]:
    """The environment of the box's clients and flows."""
    hosts = {*filter(None, os.environ.get("no_proxy", "").split(",")), "127.0.0.1", "localhost"}
    return {
        "DO_NOT_TRACK": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "PREFECT_API_URL": box.api,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_S),
        "PREFECT_HOME": str(box.directory.home),
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "no_proxy": ",".join(sorted(hosts)),
    }


def server_program(box: Box, postgres: Postgres) -> Program:
    """Prefect's server, which reads the database password from its private file."""
    environment = {
        **client_environment(box),
        **postgres.environment,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.url,
        # Half of a run's rows are events, needed only by automations and the page's charts.
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": _KEEP_EVENTS,
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(_KEEP_RUNS_S),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_EVENT_RETENTION_OVERRIDES": json.dumps(
            {"prefect.flow-run.heartbeat": _KEEP_HEARTBEATS_S}
        ),
    }
    command: list[str | Path] = [_prefect(), "server", "start", "--host", "127.0.0.1", "--port", str(box.port)]
    return Program("server", command, environment)


def worker_program(box: Box, pool: str) -> Program:
    """A worker that starts a process per run of its pool."""
    name = f"{pool}@{socket.gethostname()}"
    command: list[str | Path] = [_prefect(), "worker", "start", "--pool", pool, "--type", "process", "--name", name]
    environment = {**client_environment(box), "PREFECT_WORKER_QUERY_SECONDS": "2"}
    return Program(f"worker-{pool}", command, environment)


def write_variables(box: Box) -> None:
    """Writes a file to source, which puts `prefect` and `sdtrain` on the path and points them to this box."""
    lines = [
        f"export PREFECT_API_URL={shlex.quote(box.api)}",
        "export PREFECT_SERVER_EPHEMERAL_ENABLED=false PREFECT_PLUGINS_ENABLED=true DO_NOT_TRACK=1",
        f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        'export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"',
    ]
    with publish(box.directory.variables) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def run_bootstrap(box: Box) -> None:
    """Runs `infra.box.bootstrap` in a child process, as it loads Prefect, once the server is up.

    UserError if a deployment was refused.
    """
    log = box.directory.log("bootstrap")
    environment = {**os.environ, **client_environment(box), BOX_MARK: str(box.directory.root)}
    with log.open("ab") as output:
        done = subprocess.run(
            [sys.executable, "-m", "infra.box.bootstrap"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise UserError(f"The deployments were not accepted. {tail(log)}")


def _prefect() -> Path:
    return Path(sys.executable).with_name("prefect")
