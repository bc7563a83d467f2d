"""Furnishes the server at PREFECT_API_URL with pools, automations and deployments; again changes nothing.

`python -m infra.box.bootstrap` is what the box runs at each start; `make deploy` runs it after a change of
prefect.yaml.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from flows.support.automations import apply_automations
from infra.box.layout import ROOT
from infra.box.pools import POOLS, Pool, write_deployments


def furnish() -> None:
    """Pools, automations, deployments.

    Raises:
        subprocess.CalledProcessError: a deployment was refused; Prefect has said why.
    """
    with get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        for pool in POOLS:
            _apply_pool(client, pool, template)
        apply_automations(client)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "prefect.yaml")
        write_deployments(target)
        prefect = Path(sys.executable).with_name("prefect")
        command: list[str | Path] = [prefect, "--no-prompt", "deploy", "--all", "--prefect-file", target]
        subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603


def _apply_pool(client: SyncPrefectClient, pool: Pool, template: dict[str, Any]) -> None:
    """Makes the pool; one that is there keeps what its owner changed, but for the limit."""
    try:
        there = client.read_work_pool(pool.name)
    except ObjectNotFound:
        wanted = WorkPoolCreate(
            name=pool.name, type="process", base_job_template=template, concurrency_limit=pool.limit
        )
        client.create_work_pool(wanted)
        return
    if pool.limit is not None and there.concurrency_limit is None:
        client.update_work_pool(pool.name, WorkPoolUpdate(concurrency_limit=pool.limit))


if __name__ == "__main__":
    furnish()
